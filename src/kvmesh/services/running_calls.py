"""The calls that run through a part of a process, for a drain that lets them end."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from kvmesh import telemetry
from kvmesh.core.errors import Reason, TryElsewhereError


class RunningCalls:
    """Counts calls, until it drains: from then on it takes none."""

    def __init__(self) -> None:
        self._count = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block as a call. Raises: TryElsewhereError(DRAINING) once it drains."""
        if self._is_draining:
            raise TryElsewhereError(Reason.DRAINING, "this door takes no new calls")
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait for what runs, `timeout_s` at most."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            telemetry.WAIT_ENDED.labels(wait="drain_s").inc()
