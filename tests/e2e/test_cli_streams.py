"""Where a mesh process prints: on a terminal, into a pipe whose reader is gone, on streams that were closed."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess

import httpx
import pytest

from kvmesh.testing.mesh_process import PROGRAM, WAIT_S, MeshProcess, clean_environment

SHOW_CURSOR = "\x1b[?25h"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def ask(http_url: str) -> str:
    answer = httpx.post(f"{http_url}/generate", json={"prompt": "hello"}, timeout=WAIT_S, trust_env=False)
    return str(answer.json()["worker_output"])


def refused(http_url: str, times: int) -> int:
    """Send requests that are refused, which is logged; return how many were."""
    with httpx.Client(base_url=http_url, timeout=WAIT_S, trust_env=False) as client:
        answers = [client.post("/generate", json={"prompt": ""}) for _ in range(times)]
    return sum(answer.status_code == 400 for answer in answers)


@pytest.mark.parametrize("redirections", [">&-", "<&- >&-"], ids=["stdout", "stdin and stdout"])
def test_closed_streams_do_not_matter(redirections: str) -> None:
    with MeshProcess("--engine", "echo", "--decode", "1", redirections=redirections) as mesh:
        assert ask(mesh.http_url) == "hello_GeneratedBy_NODE1"
        assert mesh.stop() == 0
        assert mesh.stray_lines == []


def test_stdout_stays_empty_where_there_is_no_terminal() -> None:
    process = subprocess.Popen(
        [PROGRAM, "up", "--engine", "echo", "--http-port", "0", "--grpc-port", "0"],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        http_url = _ready_url(process)
        ask(http_url)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()

    assert (process.returncode, out) == (0, "")


def test_requests_are_served_after_the_reader_of_the_log_went_away() -> None:
    with subprocess.Popen(
        [PROGRAM, "up", "--engine", "echo", "--http-port", "0", "--grpc-port", "0", "--decode", "1"],
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            http_url = _ready_url(process)
            assert process.stderr is not None
            process.stderr.close()

            answers = [ask(http_url) for _ in range(2)]
            process.send_signal(signal.SIGTERM)
            code = process.wait(WAIT_S)
        finally:
            process.kill()

    assert answers == ["hello_GeneratedBy_NODE1"] * 2
    assert code == 0


def test_requests_are_served_while_nobody_reads_the_log() -> None:
    with subprocess.Popen(
        [PROGRAM, "up", "--engine", "echo", "--http-port", "0", "--grpc-port", "0", "--decode", "1"],
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            capacity = fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
            http_url = _ready_url(process)
            refusals = refused(http_url, times=capacity // 50)
            answer = ask(http_url)
            process.send_signal(signal.SIGTERM)
            code = process.wait(WAIT_S)
            unread = process.stderr.read()
        finally:
            process.kill()

    assert refusals == capacity // 50
    assert answer == "hello_GeneratedBy_NODE1"
    assert code == 0
    assert 0 < unread.count("http.refused") < refusals, "the log was never full"


def test_a_terminal_shows_workers_queue_requests_rate_and_hits_live() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, "up", "--engine", "echo", "--http-port", "0", "--grpc-port", "0"],
        env=clean_environment(TERM="xterm", COLUMNS="120", LINES="40"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        screen = _read_until(ours, r"Ctrl-C stops")
        (http_url,) = set(re.findall(r"http://[\d.]+:\d+(?=  gRPC )", screen))
        ask(http_url)
        screen += _read_until(ours, r"served +1 requests[^\n]*\n.*Ctrl-C stops")
        process.send_signal(signal.SIGINT)
        code = process.wait(WAIT_S)
        end = _read_rest(ours)
    finally:
        process.kill()
        process.wait(WAIT_S)
        os.close(ours)

    last_view = screen.rpartition("kvmesh    ")[2]
    assert [name for name in ("NODE1/decode/0", "NODE2/decode/1", "NODE3/prefill/0") if name not in last_view] == []
    assert re.search(r"queue +0 waiting, 0 leased, 0 dead", last_view)
    assert re.search(
        r"served +1 requests, \d running, \d+ tokens, \d+ tokens/s, prefills: 1 remote, 0 local", last_view
    )
    assert re.search(r"cache +0\.0% of prompt tokens hit, 0\.0% predicted by least_work", last_view)
    assert "gRPC 127.0.0.1:" in last_view
    assert code == 0
    assert SHOW_CURSOR in end
    assert "Traceback" not in end


def _ready_url(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for text in process.stderr:
        if (line := json.loads(text))["event"] == "mesh.ready":
            return str(line["http"])
    raise AssertionError("the mesh ended before it was ready")


def _read_until(terminal: int, pattern: str) -> str:
    """Return what the terminal shows, without escapes, until the pattern is there."""
    raw, shown = "", ""
    while not re.search(pattern, shown, re.DOTALL):
        raw += os.read(terminal, 65_536).decode(errors="replace")
        shown = ESCAPES.sub("", raw)
    return shown


def _read_rest(terminal: int) -> str:
    raw = b""
    try:
        while read := os.read(terminal, 65_536):
            raw += read
    except OSError:  # how Linux tells that the other end is closed
        pass
    return raw.decode(errors="replace")


def test_a_full_disk_under_stdout_is_one_line_and_1() -> None:
    with MeshProcess("--engine", "echo", "--decode", "1") as mesh, open("/dev/full", "w") as full:
        status = (PROGRAM, "status", "--target", mesh.grpc_address)
        for command in (status, (*status, "--json"), (PROGRAM, "config", "show"), (PROGRAM, "version")):
            done = subprocess.run(
                command,
                env=clean_environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=WAIT_S,
                check=False,
            )

            assert done.stderr == "error: the output cannot be written: No space left on device\n"
            assert done.returncode == 1


def test_a_mesh_that_dies_within_a_stream_is_told_as_such() -> None:
    slow = ("--decode", "1", "--prefill", "0", "--engine", "simulated", "--speedup", "0.01")
    with MeshProcess(*slow) as mesh:
        process = subprocess.Popen(
            [PROGRAM, "generate", "hello", "--target", mesh.grpc_address],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.read(1)
            mesh.send_signal(signal.SIGKILL)
            _, error = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()

    assert process.returncode == 1
    address = re.escape(mesh.grpc_address)
    assert re.fullmatch(rf"error: the stream broke after \d+ tokens?: the connection to {address} was lost\n", error)
