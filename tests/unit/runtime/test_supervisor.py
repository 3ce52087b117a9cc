"""The supervisor over real processes."""

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog

from kvmesh.runtime.supervisor import ChildSpec, Supervisor
from kvmesh.testing.worker_group import eventually

BOUND_S = 20.0
WAITS_FOR_STDIN = "import sys; sys.stdin.read()"
IGNORES_SIGTERM = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', file=sys.stderr); sys.stdin.read()"
)


def spec(name: str, program: str) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-u", "-c", program), os.environ)


@asynccontextmanager
async def supervised(stop_s: float = BOUND_S) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(stop_s=stop_s)
    try:
        yield supervisor
    finally:
        await supervisor.aclose()


async def test_a_killed_child_is_started_again() -> None:
    async with supervised() as supervisor:
        supervisor.start(spec("one", WAITS_FOR_STDIN))
        child = supervisor.children["one"]
        await eventually(lambda: child.pid is not None)
        first = child.pid
        assert first is not None

        os.kill(first, signal.SIGKILL)
        await eventually(lambda: child.starts == 2)

        assert child.pid not in (None, first)
        assert child.last_exit == -signal.SIGKILL


async def test_a_child_that_is_stopped_stays_stopped() -> None:
    async with supervised() as supervisor:
        supervisor.start(spec("one", WAITS_FOR_STDIN))
        child = supervisor.children["one"]
        await eventually(lambda: child.pid is not None)

        await supervisor.stop(["one"])

        assert child.pid is None
        assert child.starts == 1


async def test_a_child_that_ignores_sigterm_is_killed_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmesh.runtime.supervisor._KILL_GRACE_S", 0.2)
    with structlog.testing.capture_logs() as lines:
        async with supervised(stop_s=0.0) as supervisor:
            supervisor.start(spec("deaf", IGNORES_SIGTERM))
            await eventually(lambda: any(line.get("line") == "up" for line in lines))

            await supervisor.stop(["deaf"])

            assert supervisor.children["deaf"].last_exit == -signal.SIGKILL


async def test_output_is_logged_under_the_childs_name_and_a_log_line_stays_one() -> None:
    line = '{"event": "worker.started", "level": "info", "timestamp": "x", "address": "here"}'
    program = f"import sys; print({line!r}, file=sys.stderr); print('Traceback', file=sys.stderr); sys.stdin.read()"
    with structlog.testing.capture_logs() as lines:
        async with supervised() as supervisor:
            supervisor.start(spec("one", program))
            await eventually(lambda: any(each["event"] == "process.output" for each in lines))

    started = next(each for each in lines if each["event"] == "worker.started")
    assert (started["process"], started["address"], started["log_level"]) == ("one", "here", "info")
    stray = next(each for each in lines if each["event"] == "process.output")
    assert (stray["process"], stray["line"]) == ("one", "Traceback")


async def test_a_child_that_keeps_dying_is_started_ever_later() -> None:
    with structlog.testing.capture_logs() as lines:
        async with supervised() as supervisor:
            supervisor.start(spec("broken", "raise SystemExit(3)"))
            await eventually(lambda: supervisor.children["broken"].starts == 3)

    waits = [line["restart_in_s"] for line in lines if line["event"] == "process.died"]
    assert waits[:2] == [0.2, 0.4]
    assert {line["exit"] for line in lines if line["event"] == "process.died"} == {3}


async def test_a_program_that_is_not_there_is_reported_and_tried_again() -> None:
    with structlog.testing.capture_logs() as lines:
        async with supervised() as supervisor:
            supervisor.start(ChildSpec("none", ("/nowhere/kvmesh",), os.environ))
            await eventually(lambda: sum(line["event"] == "process.not_started" for line in lines) == 2)

    assert "/nowhere/kvmesh" in next(line["error"] for line in lines if line["event"] == "process.not_started")
