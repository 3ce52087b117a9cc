"""The commands against a running mesh: what they print where, and with which exit code they end."""

import json
import re
import socket
from collections.abc import Iterator

import pytest

from kvmesh.testing.mesh_process import MeshProcess, run_kvmesh

WORKER_KEYS = {"id", "node", "role", "epoch", "state", "active_requests", "active_blocks", "total_blocks"}
QUEUE_KEYS = {"depth", "leased", "dead"}
COUNTER_KEYS = {
    "requests", "remote_prefills", "local_prefills", "kv_bytes_moved", "cached_tokens", "predicted_cached_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def mesh() -> Iterator[MeshProcess]:
    with MeshProcess("--engine", "simulated", "--speedup", "0", "--engine-option", "total_blocks=512") as mesh:
        yield mesh


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port of this machine where nobody listens: bound, so that nobody can begin to."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class TestStatus:
    def test_json_has_every_key_that_scripts_read_and_numbers_are_numbers(self, mesh: MeshProcess) -> None:
        done = run_kvmesh("status", "--json", "--target", mesh.grpc_address)

        assert (done.returncode, done.stderr) == (0, "")
        status = json.loads(done.stdout)
        assert [worker["id"] for worker in status["workers"]] == ["NODE1/decode/0", "NODE2/decode/1", "NODE3/prefill/0"]
        for worker in status["workers"]:
            assert worker.keys() >= WORKER_KEYS
            assert worker["id"].split("/")[:2] == [worker["node"], worker["role"]]
            assert (worker["state"], worker["active_requests"], worker["total_blocks"]) == ("ready", 0, 512)
            assert isinstance(worker["epoch"], int)
        assert {key: status["queue"][key] for key in QUEUE_KEYS} == dict.fromkeys(QUEUE_KEYS, 0)
        assert status["counters"].keys() >= COUNTER_KEYS
        assert all(isinstance(count, int) for count in status["counters"].values())

    def test_without_json_every_worker_has_its_row(self, mesh: MeshProcess) -> None:
        done = run_kvmesh("status", "--target", mesh.grpc_address)

        assert (done.returncode, done.stderr) == (0, "")
        rows = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines()]
        assert [row[:3] for row in rows[:4]] == [
            ["worker", "role", "state"],
            ["NODE1/decode/0", "decode", "ready"],
            ["NODE2/decode/1", "decode", "ready"],
            ["NODE3/prefill/0", "prefill", "ready"],
        ]

    def test_the_counters_tell_of_a_request_that_was_served(self, mesh: MeshProcess) -> None:
        before = _counters(mesh)

        run_kvmesh("generate", "x" * 400, "--max-tokens", "7", "--target", mesh.grpc_address)

        after = _counters(mesh)
        assert after["requests"] - before["requests"] == 1
        assert after["remote_prefills"] - before["remote_prefills"] == 1  # 400 tokens are above the default of 256
        assert after["kv_bytes_moved"] > before["kv_bytes_moved"]
        assert after["completion_tokens"] - before["completion_tokens"] == 7

    def test_without_a_mesh_one_line_says_how_to_start_one(self, silent_port: int) -> None:
        done = run_kvmesh("status", "--target", f"127.0.0.1:{silent_port}")

        assert (done.returncode, done.stdout) == (1, "")
        assert _only_line(done.stderr).startswith(f"error: cannot reach 127.0.0.1:{silent_port}")
        assert "kvmesh up" in done.stderr


class TestGenerate:
    def test_the_output_goes_to_stdout_and_its_footer_to_stderr(self, mesh: MeshProcess) -> None:
        done = run_kvmesh("generate", "a fresh prompt", "--max-tokens", "5", "--target", mesh.grpc_address)

        assert done.returncode == 0
        assert re.fullmatch(r".{5}\n", done.stdout)
        assert re.fullmatch(
            r"\[NODE[12]/decode/[01]: 5 tokens, length; prompt 14 tokens, 0 cached, 0 predicted; prefill local]\n",
            done.stderr,
        )

    def test_streamed_or_whole_the_output_is_the_same(self, mesh: MeshProcess) -> None:
        request = ("generate", "the same prompt", "--max-tokens", "20", "--target", mesh.grpc_address)

        streamed, whole = run_kvmesh(*request), run_kvmesh(*request, "--no-stream")

        assert whole.returncode == 0
        assert re.fullmatch(r".{20}\n", whole.stdout)
        assert streamed.stdout == whole.stdout

    def test_explain_shows_every_candidate_and_every_term_on_stderr(self, mesh: MeshProcess) -> None:
        done = run_kvmesh("generate", "why there", "--max-tokens", "5", "--explain", "--target", mesh.grpc_address)

        lines = done.stderr.splitlines()
        assert done.returncode == 0
        assert re.fullmatch(r".{5}\n", done.stdout)
        assert {"worker", "cost"} <= set(lines[0].split())
        assert {line.split()[0] for line in lines[1:3]} == {"NODE1/decode/0", "NODE2/decode/1"}
        assert sum("chosen" in line.split() for line in lines) == 1
        assert {"overlap_blocks", "prefill_blocks", "decode_blocks"} <= {*lines[0].split(), *lines[3].split()}
        assert lines[3].startswith("alike for all: ")
        assert lines[4].startswith("policy least_work (backlog_weight 0.3, ")
        assert re.fullmatch(r"9 prompt tokens, seed \d+", lines[5])

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [(["hello", "--model", "none"], "UNKNOWN_MODEL"), ([""], "EMPTY_PROMPT")],
        ids=["unknown model", "empty prompt"],
    )
    def test_a_refused_request_ends_with_1_and_the_reason(
        self, mesh: MeshProcess, arguments: list[str], reason: str
    ) -> None:
        done = run_kvmesh("generate", *arguments, "--target", mesh.grpc_address)

        assert (done.returncode, done.stdout) == (1, "")
        assert _only_line(done.stderr).startswith(f"error: {reason}: ")


class TestProbe:
    @pytest.mark.parametrize("service", ["", "kvmesh.v1.Frontend"])
    def test_a_serving_mesh_is_0(self, mesh: MeshProcess, service: str) -> None:
        done = run_kvmesh("probe", mesh.grpc_address, "--service", service)

        assert (done.returncode, done.stdout, done.stderr) == (0, "SERVING\n", "")

    @pytest.mark.parametrize("arguments", [["nowhere"], ["127.0.0.1:1", "--servce", "x"], []])
    def test_bad_flags_are_1(self, arguments: list[str]) -> None:
        done = run_kvmesh("probe", *arguments)

        assert (done.returncode, done.stdout) == (1, "")
        assert _only_line(done.stderr).startswith("error: ")

    def test_no_connection_is_2(self, silent_port: int) -> None:
        done = run_kvmesh("probe", f"127.0.0.1:{silent_port}")

        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: cannot connect to 127.0.0.1:{silent_port}\n"

    def test_a_failed_call_is_3(self, mesh: MeshProcess) -> None:
        done = run_kvmesh("probe", mesh.grpc_address, "--service", "kvmesh.v1.Nothing")

        assert (done.returncode, done.stdout) == (3, "")
        assert _only_line(done.stderr).startswith("error: ")


def test_a_drained_worker_takes_nothing_new_and_probes_as_4() -> None:
    with MeshProcess("--engine", "echo", "--prefill", "0") as mesh:
        address = {worker["id"]: worker["address"] for worker in _status(mesh)["workers"]}["NODE1/decode/0"]

        drained = run_kvmesh("drain", "NODE1/decode/0", "--timeout", "5", "--target", mesh.grpc_address)
        again = run_kvmesh("drain", "NODE1/decode/0", "--timeout", "5", "--target", mesh.grpc_address)
        probed = run_kvmesh("probe", address)
        served = [run_kvmesh("generate", f"prompt {n}", "--target", mesh.grpc_address).stdout for n in range(3)]

        assert (drained.returncode, drained.stderr) == (0, "")
        assert drained.stdout == "NODE1/decode/0 is drained: 0 finished, 0 cancelled\n"
        assert (again.returncode, again.stdout) == (0, "NODE1/decode/0 was drained already\n")
        assert {worker["id"]: worker["state"] for worker in _status(mesh)["workers"]} == {
            "NODE1/decode/0": "draining",
            "NODE2/decode/1": "ready",
        }
        assert (probed.returncode, probed.stderr) == (4, f"error: {address} is NOT_SERVING\n")
        assert served == [f"prompt {n}_GeneratedBy_NODE2\n" for n in range(3)]


def test_draining_an_unknown_worker_is_refused(mesh: MeshProcess) -> None:
    done = run_kvmesh("drain", "NODE9/decode/9", "--target", mesh.grpc_address)

    assert (done.returncode, done.stdout) == (1, "")
    assert "NODE9/decode/9" in _only_line(done.stderr)


def test_config_show_prints_a_setting_a_line_with_its_origin() -> None:
    done = run_kvmesh("config", "show", KVMESH_MESH__PREFILL="3")

    rows = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert ["mesh.prefill", "3", "env KVMESH_MESH__PREFILL"] in rows
    assert ["grpc.port", "50051", "default"] in rows


def test_the_version_is_printed() -> None:
    done = run_kvmesh("version")

    assert done.returncode == 0
    assert re.fullmatch(r"kvmesh \d+\.\d+\.\d+\n", done.stdout)


def _only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


def _status(mesh: MeshProcess) -> dict[str, list[dict[str, str]]]:
    status: dict[str, list[dict[str, str]]] = json.loads(
        run_kvmesh("status", "--json", "--target", mesh.grpc_address).stdout
    )
    return status


def _counters(mesh: MeshProcess) -> dict[str, int]:
    counters: dict[str, int] = json.loads(run_kvmesh("status", "--json", "--target", mesh.grpc_address).stdout)[
        "counters"
    ]
    return counters
