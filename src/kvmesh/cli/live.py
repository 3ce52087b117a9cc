"""The live view of a running mesh."""

import asyncio
import time

from rich.console import Console
from rich.live import Live

from kvmesh.cli.foreground import ForegroundMesh
from kvmesh.cli.view import Doors, TokenRate, mesh_view

_REFRESH_S = 0.5
_LINES_BESIDE_WORKERS = 15
"""Of the screen: addresses, header, the lines below the table, and room for those that wrap."""


async def show_live(mesh: ForegroundMesh, console: Console) -> None:
    """Redraw the view until cancelled; the last one stays on the screen."""
    doors = Doors(mesh.http_address, mesh.grpc_address)
    rate = TokenRate()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            topology = mesh.topology()
            view = mesh_view(
                topology,
                doors,
                tokens_per_s=rate.update(now_s=time.monotonic(), completion_tokens=topology.counters.completion_tokens),
                max_workers=max(console.height - _LINES_BESIDE_WORKERS, 1),
                width=console.width,
            )
            # In a thread: a terminal that takes no output (Ctrl-S) must not stop the mesh.
            await asyncio.to_thread(live.update, view, refresh=True)
            await asyncio.sleep(_REFRESH_S)
