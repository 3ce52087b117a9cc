"""A change that many may wait for."""

import asyncio


class Signal:
    """Wakes whoever waits at this moment; who comes later waits for the next change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Wake all who wait; O(waiters)."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self, until: float | None = None) -> None:
        """Return at the next `fire`, or at `until` on the loop's clock."""
        try:
            async with asyncio.timeout_at(until):
                await self._event.wait()
        except TimeoutError:
            return
