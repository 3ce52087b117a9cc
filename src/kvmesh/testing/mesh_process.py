"""`kvmesh` as its users run it: commands as child processes, and a mesh whose ports and log a test can read."""

import json
import os
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc

PROGRAM = str(Path(sysconfig.get_path("scripts")) / "kvmesh")
"""The installed command."""
WAIT_S = 40.0
"""How long anything a process should do may take on a busy machine."""


def clean_environment(**changes: str) -> dict[str, str]:
    """Return this process's environment without what configures kvmesh or gRPC's log, but with `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVMESH_", "GRPC_VERBOSITY"))}
    return kept | changes


def run_kvmesh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command of kvmesh to its end."""
    return subprocess.run(
        [PROGRAM, *arguments],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


class LoggingProcess:
    """A command of kvmesh that runs until it is stopped; ready when the `with` block begins, killed at its end."""

    def __init__(self, *arguments: str, ready_event: str, redirections: str = ">/dev/null") -> None:
        """`ready_event` is logged when it is ready; `redirections` are the shell's, e.g. `>&-` to close its stdout."""
        self._arguments = (*arguments, "--log-format", "json")
        self._ready_event = ready_event
        self._redirections = redirections
        self._changed = threading.Condition()  # its lock is reentrant: a predicate may look at the log
        self._lines: list[str] = []
        self._has_ended = False
        self._ready: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            ["sh", "-c", f'exec "$0" "$@" {self._redirections}', PROGRAM, *self._arguments],
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, name="log-reader", daemon=True)
        self._reader.start()
        try:
            self._ready = self.wait_logged(self._ready_event)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kill()

    @property
    def grpc_address(self) -> str:
        """HOST:PORT."""
        return str(self._ready["grpc"])

    @property
    def log(self) -> list[dict[str, Any]]:
        """The log lines up to now."""
        with self._changed:
            return [line for text in self._lines if (line := _parse(text)) is not None]

    @property
    def stray_lines(self) -> list[str]:
        """What stands on stderr beside log lines."""
        with self._changed:
            return [text for text in self._lines if _parse(text) is None]

    def logged(self, event: str, **keys: object) -> list[dict[str, Any]]:
        """Return the lines of this event that have these keys."""
        return [line for line in self.log if line["event"] == event and keys.items() <= line.items()]

    def wait_logged(self, event: str, *, times: int = 1, **keys: object) -> dict[str, Any]:
        """Return the line in which this event with these keys is logged for the `times`th time.

        Raises: AssertionError if it does not come.
        """
        self._wait(lambda: len(self.logged(event, **keys)) >= times or self._has_ended)
        found = self.logged(event, **keys)
        assert len(found) >= times, f"{event} {keys}: {len(found)} of {times} in the log:\n" + "\n".join(self._lines)
        return found[times - 1]

    def send_signal(self, number: signal.Signals) -> None:
        """Send one signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Return the exit code once the process has ended and its log is read. Raises: subprocess.TimeoutExpired."""
        code = self._process.wait(WAIT_S)
        self._wait(lambda: self._has_ended)
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and return the exit code."""
        self.send_signal(number)
        return self.wait()

    def _wait(self, is_over: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(is_over, WAIT_S)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for text in self._process.stderr:
            with self._changed:
                self._lines.append(text.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert self._process.stderr is not None
        self._process.stderr.close()


class MeshProcess(LoggingProcess):
    """`kvmesh up` on free ports."""

    def __init__(self, *flags: str, redirections: str = ">/dev/null") -> None:
        """Take flags of `kvmesh up`."""
        ports = ("--http-port", "0", "--grpc-port", "0")
        super().__init__("up", *ports, *flags, ready_event="mesh.ready", redirections=redirections)

    @property
    def http_url(self) -> str:
        """http://HOST:PORT."""
        return str(self._ready["http"])

    def topology(self) -> frontend_pb2.Topology:
        """Return what the mesh says of itself, once its door is there. Raises: grpc.RpcError."""
        with grpc.insecure_channel(self.grpc_address) as channel:
            ask = frontend_pb2_grpc.FrontendStub(channel).GetTopology
            return ask(frontend_pb2.GetTopologyRequest(), timeout=WAIT_S, wait_for_ready=True).topology


class RoleProcess(LoggingProcess):
    """`kvmesh serve ROLE` on free ports, ready once it listens and is found."""

    def __init__(self, role: str, *flags: str) -> None:
        """Take flags of `kvmesh serve`; a frontend's HTTP port must be among them."""
        super().__init__("serve", role, "--port", "0", *flags, ready_event="role.started")

    @property
    def http_url(self) -> str:
        """http://HOST:PORT of a frontend."""
        return str(self._ready["http"])

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid


def _parse(text: str) -> dict[str, Any] | None:
    """Return the log line, or None if the text is none."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "event" in line else None
