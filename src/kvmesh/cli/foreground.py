"""A mesh in the foreground: until a signal, shown on the terminal or told by log lines."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TextIO, cast

from kvmesh import telemetry
from kvmesh.cli import STARTED_S
from kvmesh.cli.options import CommandFailed
from kvmesh.cli.streams import LossyStream
from kvmesh.runtime.settings import LogSettings
from kvmesh.services.channels import PortTakenError
from kvmesh.v1 import frontend_pb2

_QUIT_AT_ONCE = 130
_SHOW_CURSOR = b"\x1b[?25h"
_log = telemetry.logger(__name__)


class ForegroundMesh(Protocol):
    """A mesh as its foreground sees it."""

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP door, once started."""

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC door, once started."""

    async def start(self) -> None:
        """Serve."""

    def topology(self) -> frontend_pb2.Topology:
        """Return the mesh now."""

    async def stop(self) -> None:
        """End gracefully, in bounded time; also after a start that failed or was cancelled."""


Show = Callable[[ForegroundMesh], Awaitable[None]]
"""Shows a started mesh until it is cancelled."""


def set_up_output(settings: LogSettings, *, level_is_chosen: bool) -> Show:
    """Configure logging and return how to show the mesh: live where stdout is a terminal, else by log lines.

    Under the live view, log lines are printed above it, and only warnings unless the user chose a level.
    """
    if not sys.stdout.isatty():
        telemetry.configure_logging(level=settings.level, log_format=settings.format, stream=_lossy(sys.stderr))
        return show_by_log

    from rich.file_proxy import FileProxy

    from kvmesh.cli.console import output_console
    from kvmesh.cli.live import show_live

    console = output_console()
    stream = cast(TextIO, FileProxy(console, sys.stderr)) if sys.stderr.isatty() else _lossy(sys.stderr)
    level = settings.level if level_is_chosen else "warning"
    telemetry.configure_logging(level=level, log_format=settings.format, stream=stream)
    return lambda mesh: show_live(mesh, console)


async def serve(mesh: ForegroundMesh, show: Show) -> None:
    """Run the mesh until SIGINT or SIGTERM, then stop it; a second signal ends the process at once with 130.

    Raises: CommandFailed when an address cannot be listened on, else whatever `mesh.start` raises, after what it had
    started is stopped.
    """
    try:
        async with _until_signalled():
            await _start(mesh)
            await show(mesh)
    finally:
        await mesh.stop()


async def _start(mesh: ForegroundMesh) -> None:
    try:
        await mesh.start()
    except PortTakenError:
        raise  # says what to do
    except OSError as exc:
        raise CommandFailed(f"{exc.strerror or exc}: check --http-host and --grpc-host") from exc


async def show_by_log(mesh: ForegroundMesh) -> None:
    """Log where the mesh is reached, once."""
    _log.info(
        "mesh.ready",
        http=f"http://{mesh.http_address}",
        grpc=mesh.grpc_address,
        workers=len(mesh.topology().workers),
        ready_s=round(time.monotonic() - STARTED_S, 3),
    )
    await asyncio.get_running_loop().create_future()


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


def _lossy(stream: TextIO) -> TextIO:
    return cast(TextIO, LossyStream(stream))


def _quit() -> None:
    """End now: no handler of Python runs any more, so the cursor that a live view hid is shown by hand."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), _SHOW_CURSOR)
    os._exit(_QUIT_AT_ONCE)
