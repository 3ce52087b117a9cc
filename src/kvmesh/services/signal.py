"""Changes that are waited for."""

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


class Flag:
    """Raised by whoever has news, lowered by the ONE task that waits for them: a lean Event, for news per token."""

    __slots__ = ("_is_raised", "_waiter")

    def __init__(self) -> None:
        self._is_raised = False
        self._waiter: asyncio.Future[None] | None = None

    def fire(self) -> None:
        """Raise it and wake who waits. Idempotent."""
        self._is_raised = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return once it is raised, and lower it."""
        if not self._is_raised:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_raised = False
