"""One timer for the next of many deadlines."""

import asyncio
import contextvars
from collections.abc import Callable


class DeadlineTimer:
    """Runs a callback when the deadline that was set last has come."""

    def __init__(self, on_due: Callable[[], None]) -> None:
        """Nothing is due yet."""
        self._on_due = on_due
        self._handle: asyncio.TimerHandle | None = None
        self._due: float | None = None

    def set(self, due: float | None) -> None:
        """Have the callback run at `due` on the loop's clock, and at no other time; None = not at all."""
        if due == self._due:
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle, self._due = None, due
        if due is not None:
            loop = asyncio.get_running_loop()
            # A context of its own: the log lines of a deadline do not belong to the call that happened to set it.
            self._handle = loop.call_at(due, self._fire, context=contextvars.Context())

    def _fire(self) -> None:
        self._handle = self._due = None
        self._on_due()
