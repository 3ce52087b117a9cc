"""A mesh in the foreground: until a signal, shown on the terminal or told by log lines."""

import asyncio
import atexit
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TextIO, TypeVar, cast

from kvmesh import telemetry
from kvmesh.cli import STARTED_S
from kvmesh.cli.log_stream import QueuedStream, queued_stderr
from kvmesh.cli.options import CommandFailed
from kvmesh.runtime.heap import keep_freed_memory, settle_heap
from kvmesh.runtime.settings import LogSettings
from kvmesh.services.channels import PortTakenError
from kvmesh.v1 import frontend_pb2

_QUIT_AT_ONCE = 130
_LOG_END_S = 1.0
"""How long the end of the process waits for the reader of its log."""
_SHOW_CURSOR = b"\x1b[?25h"
_ADDRESS_ERRORS = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EACCES, errno.EINVAL})
"""What listening on an address fails with."""
_log = telemetry.logger(__name__)


class Startable(Protocol):
    """What runs in the foreground."""

    async def start(self) -> None:
        """Serve."""

    async def stop(self) -> None:
        """End gracefully, in bounded time; also after a start that failed or was cancelled."""


class ForegroundRole(Startable, Protocol):
    """One role as its foreground sees it."""

    @property
    def name(self) -> str:
        """Its id, as in logs."""

    @property
    def addresses(self) -> dict[str, str]:
        """Where it is reached, once started, by protocol."""

    async def wait_ready(self) -> None:
        """Wait until it can do its work."""


class ForegroundMesh(Startable, Protocol):
    """A mesh as its foreground sees it."""

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP door, once started."""

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC door, once started."""

    def topology(self) -> frontend_pb2.Topology:
        """Return the mesh now."""


_Running = TypeVar("_Running", bound=Startable)
Show = Callable[[ForegroundMesh], Awaitable[None]]
"""Shows a started mesh until it is cancelled."""


def set_up_output(settings: LogSettings, *, level_is_chosen: bool) -> Show:
    """Configure logging and return how to show the mesh: live where stdout is a terminal, else by log lines.

    Under the live view, log lines are printed above it, and only warnings unless the user chose a level.
    """
    if not sys.stdout.isatty():
        set_up_log(settings)
        return show_by_log

    from rich.file_proxy import FileProxy

    from kvmesh.cli.console import output_console
    from kvmesh.cli.live import show_live

    console = output_console()
    above_view = FileProxy(console, sys.stderr)
    stream = QueuedStream(above_view.write, is_terminal=True) if sys.stderr.isatty() else queued_stderr()
    _log_to(stream, level=settings.level if level_is_chosen else "warning", log_format=settings.format)
    return lambda mesh: show_live(mesh, console)


async def serve(mesh: _Running, show: Callable[[_Running], Awaitable[None]]) -> None:
    """Run a mesh or a role until SIGINT or SIGTERM, then stop it; a second signal ends the process at once with 130.

    Raises: CommandFailed when an address cannot be listened on, else whatever `mesh.start` raises, after what it had
    started is stopped.
    """
    keep_freed_memory()
    try:
        async with _until_signalled():
            await _start(mesh)
            settle_heap()
            await show(mesh)
    finally:
        await mesh.stop()


async def _start(mesh: Startable) -> None:
    try:
        await mesh.start()
    except PortTakenError:
        raise  # says what to do
    except OSError as exc:
        raise CommandFailed(_os_error_text(exc)) from exc


def _os_error_text(error: OSError) -> str:
    """Say what failed, and where it may be an address, which flags to look at; what is about a file names it."""
    text = error.strerror or str(error)
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {text}"
    is_address = error.errno in _ADDRESS_ERRORS or (error.errno or 0) < 0  # those of getaddrinfo
    return f"{text}: check --http-host, --grpc-host or --host" if is_address else text


async def show_by_log(mesh: ForegroundMesh) -> None:
    """Log where the mesh is reached, once."""
    _log.info(
        "mesh.ready",
        http=f"http://{mesh.http_address}",
        dashboard=f"http://{mesh.http_address}/",
        grpc=mesh.grpc_address,
        workers=len(mesh.topology().workers),
        ready_s=round(time.monotonic() - STARTED_S, 3),
    )
    await asyncio.get_running_loop().create_future()


async def show_role(role: ForegroundRole) -> None:
    """Log where the role is reached, and once it can do its work."""
    _log.info("role.started", name=role.name, **role.addresses)
    await role.wait_ready()
    _log.info("role.ready", name=role.name, ready_s=round(time.monotonic() - STARTED_S, 3))
    await asyncio.get_running_loop().create_future()


def set_up_log(settings: LogSettings) -> None:
    """Write log lines to stderr, dropping what its reader does not take."""
    _log_to(queued_stderr(), level=settings.level, log_format=settings.format)


def stop_at_end_of_input() -> None:
    """Have this process stop, as at SIGTERM, when its stdin ends: whoever holds the other end is gone then."""
    loop = asyncio.get_running_loop()
    descriptor = sys.stdin.fileno()

    def on_input() -> None:
        if not os.read(descriptor, 4096):
            loop.remove_reader(descriptor)
            signal.raise_signal(signal.SIGTERM)

    loop.add_reader(descriptor, on_input)


@asynccontextmanager
async def _until_signalled() -> AsyncIterator[None]:
    """Run the body until it ends or the first signal, which cancels it; any later signal quits the process.

    The handlers stay, because what follows the body is the graceful stop, which a second signal must be able to end.
    """
    task = asyncio.current_task()
    assert task is not None
    is_running, is_signalled = True, False

    def on_signal() -> None:
        nonlocal is_signalled
        if is_signalled or not is_running:
            _quit()
        is_signalled = True
        _log.info("mesh.stopping")
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    except asyncio.CancelledError:
        if not is_signalled or task.uncancel() > 0:  # somebody else's cancellation goes on
            raise
    finally:
        is_running = False


def _log_to(stream: QueuedStream, *, level: str, log_format: str) -> None:
    """Send our lines there, and the warnings of libraries, which Python would write to stderr itself."""
    telemetry.configure_logging(level=level, log_format=log_format, stream=cast(TextIO, stream))
    logging.basicConfig(stream=stream, level=logging.WARNING, format="%(message)s")
    atexit.register(stream.finish, _LOG_END_S)


def _quit() -> None:
    """End now: no handler of Python runs any more, so the cursor that a live view hid is shown by hand."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), _SHOW_CURSOR)
    os._exit(_QUIT_AT_ONCE)
