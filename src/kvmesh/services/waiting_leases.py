"""The Lease calls that wait for work."""

import asyncio
from collections.abc import Callable

from kvmesh.core.ids import WorkerId


class WaitingLeases:
    """Wakes waiting calls; nothing is granted to one that only waits, so one that is gone takes no task with it."""

    def __init__(self) -> None:
        """Start with none."""
        self._waiting: dict[asyncio.Future[None], WorkerId] = {}
        """In the order in which they began to wait."""

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, worker_id: WorkerId, *, until: float) -> bool:
        """Wait for `wake`; False when `until`, on the loop's clock, came first."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[woken] = worker_id
        try:
            async with asyncio.timeout_at(until):
                await woken
        except TimeoutError:
            return False
        finally:
            self._waiting.pop(woken, None)
        return True

    def wake(self, preference: Callable[[WorkerId], int] | None = None) -> None:
        """Let every waiting call ask again: the most preferred workers first, among equals who waited longest."""
        waiting = list(self._waiting.items())
        self._waiting.clear()
        if preference is not None:
            waiting.sort(key=lambda entry: -preference(entry[1]))
        for woken, _ in waiting:
            if not woken.done():
                woken.set_result(None)
