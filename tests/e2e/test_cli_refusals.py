"""What keeps a mesh from starting is said in one line that names the way out, and by the exit code."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmesh.testing.mesh_process import run_kvmesh

UP = ("up", "--http-port", "0", "--grpc-port", "0")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def only_line(stderr: str) -> str:
    """Return the one line beside log lines."""
    (line,) = [text for text in stderr.splitlines() if not text.startswith("{")]
    return line


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--engin", "echo"], "the nearest is --engine"),
        (["--decode", "65"], "mesh.decode = 65 (flag) is out of range: 1 to 64"),
        (["--http-port", "65536"], "http.port = 65536 (flag) is out of range: 0 to 65535"),
        (["--engine", "simulatd"], "the nearest is simulated"),
        (["--policy", "kv_awar"], "the nearest is kv_aware"),
        (["--engine", "echo", "--engine-option", "blocksize=4"], "the nearest is block_size"),
        (["--engine", "simulated", "--engine-option", "total_block=4"], "the nearest is total_blocks"),
        (["--engine", "simulated", "--engine-option", "total_blocks=0"], "total_blocks is 0, not in 1..16777216"),
        (["--engine", "simulated", "--engine-option", "total_blocks=many"], "not a whole number in 1..16777216"),
        (["--engine", "simulated", "--engine-option", "total_blocks"], "is not KEY=VALUE"),
        (["--engine", "echo", "--speedup", "2"], "--speedup is for --engine simulated"),
        (["--node-names", "a/b"], "'a/b' cannot name a node"),
        (["--node-names", "a,b,a"], "'a' is given twice: --node-names"),
        (["--node-label", "NOPE:zone=a"], "--node-label NOPE:zone=a: no worker is on that node; the nodes are NODE1, "),
        (["--log-level", "loud"], "'debug', 'info', 'warning', 'error' or 'critical'"),
        (["--grpc-host", "0.0.0.0"], "--insecure"),
        (["--config", "none.toml"], "none.toml: no such settings file"),
    ],
)
def test_a_wrong_flag_ends_with_2_and_one_line(flags: list[str], told: str) -> None:
    done = run_kvmesh(*UP, *flags)

    assert (done.returncode, done.stdout) == (2, "")
    assert only_line(done.stderr).startswith("error: ")
    assert told in done.stderr


def test_a_misspelt_variable_ends_with_2_and_the_nearest() -> None:
    done = run_kvmesh(*UP, KVMESH_ROUTER__POLICI="random")

    assert (done.returncode, done.stdout) == (2, "")
    assert "the nearest is KVMESH_ROUTER__POLICY" in only_line(done.stderr)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[mesh]\ndecod = 3\n", "mesh.decod (file {path}) is not a setting; the nearest is mesh.decode"),
        ("[queue]\nmax_attempts = 0\n", "queue.max_attempts = 0 (file {path}) is out of range: 1 to 100"),
        ("[waits]\ndrain_s = 0\n", "waits.drain_s = 0.0 (file {path}) is out of range"),
        ("[mesh\n", "{path}: cannot be read: "),
    ],
    ids=["unknown key", "out of range", "no wait at all", "no TOML"],
)
def test_a_bad_settings_file_ends_with_2_and_one_line(tmp_path: Path, content: str, told: str) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text(content)

    done = run_kvmesh(*UP, "--config", str(config))

    assert (done.returncode, done.stdout) == (2, "")
    assert told.format(path=config) in only_line(done.stderr)


@pytest.mark.parametrize("content", [None, "", "{"], ids=["no tokenizer", "empty tokenizer", "broken tokenizer"])
def test_a_broken_model_folder_ends_with_2_and_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)

    done = run_kvmesh(*UP, "--engine", "simulated", "--model", str(tmp_path))

    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(rf"^error: INVALID_FIELD: engine.model: {tmp_path}\S* .*tokenizer", only_line(done.stderr))


def test_a_missing_model_folder_ends_with_2_and_one_line(tmp_path: Path) -> None:
    done = run_kvmesh(*UP, "--engine", "simulated", "--model", str(tmp_path / "none"))

    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path / 'none'} is no folder" in only_line(done.stderr)


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_a_taken_port_ends_with_1_and_says_what_to_do(flag: str, taken_port: int) -> None:
    done = run_kvmesh(*UP, flag, str(taken_port))

    assert (done.returncode, done.stdout) == (1, "")
    assert only_line(done.stderr) == (
        f"error: port {taken_port} on 127.0.0.1 is taken: stop the process that listens there, "
        f"or choose another port with {flag} (0 = any free one)"
    )


@pytest.mark.parametrize("flag", ["--http-host", "--grpc-host"])
def test_a_host_that_is_not_of_this_machine_ends_with_1_and_names_the_flag(flag: str) -> None:
    done = run_kvmesh(*UP, "--insecure", flag, "192.0.2.1")  # reserved for documentation

    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(rf"^error: .*annot assign requested address.*{flag}", only_line(done.stderr))
