"""Keeps child processes running: their output to the log with their names, their deaths answered by a new start.

A child ends with its parent, also when that is killed: it reads its stdin, which ends then, or the kernel tells it.
"""

import asyncio
import ctypes
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kvmesh import telemetry
from kvmesh.services.owned_tasks import OwnedTasks

log = telemetry.logger(__name__)

_BACKOFF_BASE_S = 0.2
_BACKOFF_CAP_S = 10.0
_STEADY_S = 30.0
_KILL_GRACE_S = 5.0
"""What a child gets beyond its own bound before it is killed."""
_LINE_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to keep running."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    reads_stdin: bool = True
    """It ends when its stdin does; else the kernel ends it with its parent, where the kernel can (Linux)."""
    output_level: str = "warning"
    """How what it writes that is no log line of ours is logged."""


@dataclass(slots=True)
class Child:
    """A spec and the process that runs it now."""

    spec: ChildSpec
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    last_exit: int | None = None
    """How it ended last; negative: by that signal."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it will not be started again."""

    @property
    def pid(self) -> int | None:
        """Its process, while one runs."""
        return self.process.pid if self.process is not None else None


class Supervisor:
    """Runs children until `stop`."""

    def __init__(self, *, stop_s: float, steady_s: float = _STEADY_S) -> None:
        """Give each child `stop_s` to end once asked to; one that lived for `steady_s` starts its backoff anew."""
        self._stop_s = stop_s
        self._steady_s = steady_s
        self._children: dict[str, Child] = {}
        self._stopping: set[str] = set()
        self._tasks = OwnedTasks()

    @property
    def children(self) -> Mapping[str, Child]:
        """Every child by name."""
        return self._children

    def start(self, spec: ChildSpec) -> None:
        """Start a child and keep it running."""
        child = self._children[spec.name] = Child(spec)
        self._tasks.start(self._keep(child), name=f"child-{spec.name}")

    async def stop(self, names: Sequence[str]) -> None:
        """End children: SIGTERM, then, beyond their bound, SIGKILL. Idempotent."""
        children = [self._children[name] for name in names if name in self._children]
        self._stopping.update(child.spec.name for child in children)
        for child in children:
            _signal(child, signal.SIGTERM)
        await asyncio.gather(*(self._await_end(child) for child in children))

    async def aclose(self) -> None:
        """End every child. Idempotent."""
        await self.stop(tuple(self._children))
        await self._tasks.aclose()

    async def _await_end(self, child: Child) -> None:
        try:
            async with asyncio.timeout(self._stop_s + _KILL_GRACE_S):
                await child.over.wait()
        except TimeoutError:
            log.warning("process.killed", process=child.spec.name, after_s=self._stop_s + _KILL_GRACE_S)
            _signal(child, signal.SIGKILL)
            await child.over.wait()

    async def _keep(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        try:
            while child.spec.name not in self._stopping:
                began = loop.time()
                await self._run(child)
                if child.spec.name in self._stopping:
                    return
                failures = 1 if loop.time() - began > self._steady_s else failures + 1
                wait_s = min(_BACKOFF_BASE_S * 2 ** (failures - 1), _BACKOFF_CAP_S)
                log.warning("process.died", process=child.spec.name, exit=child.last_exit, restart_in_s=wait_s)
                await asyncio.sleep(wait_s)
                telemetry.PROCESS_RESTARTS.labels(process=child.spec.name).inc()
        finally:
            child.over.set()

    async def _run(self, child: Child) -> None:
        """Run the child once, to its end."""
        spec = child.spec
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.argv,
                env=dict(spec.environment),
                stdin=asyncio.subprocess.PIPE if spec.reads_stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                limit=_LINE_BYTES,
                start_new_session=True,  # a Ctrl-C in the terminal is the parent's to pass on, in its order
                preexec_fn=None if spec.reads_stdin else _die_with_parent(),
            )
        except OSError as exc:
            log.error("process.not_started", process=spec.name, error=str(exc))
            child.last_exit = None
            return
        child.process, child.starts = process, child.starts + 1
        log.info("process.started", process=spec.name, pid=process.pid)
        if spec.name in self._stopping:  # asked to stop while it was being started
            _signal(child, signal.SIGTERM)
        assert process.stderr is not None
        try:
            await _relay(spec, process.stderr)
            child.last_exit = await process.wait()
        except asyncio.CancelledError:
            _signal(child, signal.SIGKILL)
            await process.wait()
            raise
        finally:
            child.process = None


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None:
        with suppress(ProcessLookupError):
            child.process.send_signal(number)


async def _relay(spec: ChildSpec, stream: asyncio.StreamReader) -> None:
    """Log every line of a child under its name."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # longer than the limit: its beginning is lost
            continue
        if not line:
            return
        _log_line(spec, line.decode(errors="replace").rstrip())


def _log_line(spec: ChildSpec, line: str) -> None:
    """Log a line of ours as what it was; any other as it stands."""
    fields = None
    if line.startswith("{"):
        with suppress(ValueError):
            fields = json.loads(line)
    if not isinstance(fields, dict) or "event" not in fields or "level" not in fields:
        if line:
            getattr(log, spec.output_level)("process.output", process=spec.name, line=line)
        return
    event, level = str(fields.pop("event")), str(fields.pop("level"))
    fields.pop("timestamp", None)
    fields.pop("process", None)
    write = getattr(log, level, log.info)
    write(event, process=spec.name, **{key: value for key, value in fields.items() if key.isidentifier()})


def _die_with_parent() -> Callable[[], None] | None:
    """Return what, run in the child, has the kernel kill it with its parent; None where the kernel cannot."""
    if sys.platform != "linux":
        return None
    set_option = ctypes.CDLL(None).prctl

    def ask_kernel() -> None:
        set_option(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return ask_kernel
