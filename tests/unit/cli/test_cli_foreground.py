"""A mesh in the foreground, as a process: what it shows, how signals end it, and with which exit code."""

import asyncio
import errno
import json
import os
import pty
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress

import pytest

from kvmesh.cli.foreground import serve, show_by_log
from kvmesh.cli.options import CommandFailed
from kvmesh.services.channels import PortTakenError
from kvmesh.v1 import frontend_pb2

WAIT_S = 30

PROGRAM = """
import asyncio, sys
import uvloop
from kvmesh import telemetry
from kvmesh.cli.foreground import serve, set_up_output
from kvmesh.runtime.settings import LogSettings
from kvmesh.v1 import frontend_pb2

class Mesh:
    http_address, grpc_address = "127.0.0.1:8123", "127.0.0.1:50123"

    async def start(self):
        print("starting", flush=True)
        if "start-hangs" in sys.argv:
            await asyncio.Event().wait()

    def topology(self):
        telemetry.logger("test").info("topology.asked")
        telemetry.logger("test").warning("worker.suspect", worker_id="W")
        return frontend_pb2.Topology(workers=[frontend_pb2.TopologyWorker(id="NODE1/decode/0", state=1)])

    async def stop(self):
        print("stopping", flush=True)
        if "stop-hangs" in sys.argv:
            await asyncio.Event().wait()
        print("stopped", flush=True)

show = set_up_output(LogSettings(), level_is_chosen=False)
uvloop.run(serve(Mesh(), show))
"""


async def start(*arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, *arguments, stdout=PIPE, stderr=PIPE)


async def read_until(stream: asyncio.StreamReader | None, text: str) -> str:
    """Return the line with this text; the lines before it are dropped."""
    assert stream is not None
    async with asyncio.timeout(WAIT_S):
        while line := await stream.readline():
            if text in line.decode():
                return line.decode()
    raise AssertionError(f"the stream ended without {text!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_stops_the_mesh_gracefully(number: signal.Signals) -> None:
    process = await start()
    await read_until(process.stderr, "mesh.ready")

    process.send_signal(number)
    out, _ = await asyncio.wait_for(process.communicate(), WAIT_S)

    assert process.returncode == 0
    assert out.decode().split() == ["starting", "stopping", "stopped"]


async def test_without_a_terminal_one_log_line_says_where_the_mesh_is() -> None:
    process = await start()

    line = json.loads(await read_until(process.stderr, "mesh.ready"))

    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), WAIT_S)
    assert (line["http"], line["grpc"], line["workers"]) == ("http://127.0.0.1:8123", "127.0.0.1:50123", 1)
    assert 0 < line["ready_s"] < WAIT_S


async def test_a_signal_during_the_start_stops_what_was_started() -> None:
    process = await start("start-hangs")
    await read_until(process.stdout, "starting")

    process.send_signal(signal.SIGTERM)
    out, _ = await asyncio.wait_for(process.communicate(), WAIT_S)

    assert process.returncode == 0
    assert out.decode().split() == ["stopping", "stopped"]


async def test_a_second_signal_quits_at_once() -> None:
    process = await start("stop-hangs")
    await read_until(process.stderr, "mesh.ready")

    process.send_signal(signal.SIGINT)
    await read_until(process.stdout, "stopping")
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.communicate(), WAIT_S)

    assert process.returncode == 130


async def test_on_a_terminal_the_mesh_is_shown_live_and_only_warnings_are_logged_above_it() -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)

    screen = await asyncio.wait_for(asyncio.to_thread(_read_until, ours, "Ctrl-C stops"), WAIT_S)
    process.send_signal(signal.SIGINT)
    screen += await asyncio.wait_for(asyncio.to_thread(_read_to_end, ours), WAIT_S)  # the log has a writer of its own
    await asyncio.wait_for(process.wait(), WAIT_S)
    os.close(ours)

    assert process.returncode == 0
    assert "http://127.0.0.1:8123" in screen
    assert "NODE1/decode/0" in screen
    assert "worker.suspect" in screen
    assert "topology.asked" not in screen
    assert "mesh.ready" not in screen


def _read_until(terminal: int, text: str) -> str:
    read = ""
    while text not in read:
        read += os.read(terminal, 65_536).decode(errors="replace")
    return read


def _read_to_end(terminal: int) -> str:
    read = ""
    with suppress(OSError):  # how a terminal ends whose last process has gone
        while data := os.read(terminal, 65_536):
            read += data.decode(errors="replace")
    return read


class _TakenPort:
    http_address = grpc_address = ""
    stops = 0

    async def start(self) -> None:
        raise PortTakenError("127.0.0.1", 8000, flag="--http-port")

    def topology(self) -> frontend_pb2.Topology:
        return frontend_pb2.Topology()

    async def stop(self) -> None:
        self.stops += 1


async def test_a_failed_start_is_raised_after_what_was_started_is_stopped() -> None:
    mesh = _TakenPort()

    with pytest.raises(PortTakenError, match="--http-port"):
        await serve(mesh, show_by_log)

    assert mesh.stops == 1


class _FailingStart(_TakenPort):
    def __init__(self, error: OSError) -> None:
        self._error = error

    async def start(self) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/models/tiny"), "/models/tiny: Permission denied"),
        (
            OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"),
            "Cannot assign requested address: check --http-host, --grpc-host or --host",
        ),
        (
            OSError(socket.EAI_NONAME, "Name or service not known"),
            "Name or service not known: check --http-host, --grpc-host or --host",
        ),
    ],
    ids=["disk", "file", "address", "name"],
)
async def test_only_what_may_be_an_address_is_blamed_on_one(error: OSError, text: str) -> None:
    with pytest.raises(CommandFailed) as failed:
        await serve(_FailingStart(error), show_by_log)

    assert failed.value.message == text
