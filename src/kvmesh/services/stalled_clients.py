"""The bound on a write to a client that does not read: the same on gRPC and HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvmesh import telemetry
from kvmesh.core.errors import BackOffError, Reason


@dataclass(slots=True)
class Writes:
    """The writes of one reply, one at a time."""

    since: float | None = None
    """When the write that is going on began, on the loop's clock; None between two."""


@asynccontextmanager
async def while_client_reads(writes: Writes, client_write_s: float | None) -> AsyncIterator[None]:
    """Cancel the block when one write has waited `client_write_s` or more, and raise SLOW_CONSUMER in its place.

    None = no bound. One timer per reply looks twice in that time: a timeout around each write would double what a
    token costs.
    """
    if client_write_s is None:
        yield
        return
    loop = asyncio.get_running_loop()
    cut = asyncio.timeout(None)
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal timer
        now = loop.time()
        if writes.since is not None and now - writes.since >= client_write_s:
            cut.reschedule(now)
        else:
            timer = loop.call_later(client_write_s / 2, look)

    timer = loop.call_later(client_write_s / 2, look)
    try:
        async with cut:
            yield
    except TimeoutError as exc:
        if not cut.expired():
            raise
        telemetry.WAIT_ENDED.labels(wait="client_write_s").inc()
        raise BackOffError(Reason.SLOW_CONSUMER, f"nothing was read for {client_write_s:g} s") from exc
    finally:
        timer.cancel()
