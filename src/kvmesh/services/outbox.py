"""What one server stream has still to send: written by whoever has news, read by the stream's own handler."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

from kvmesh.core.errors import BackOffError, MeshError, Reason

_Message = TypeVar("_Message")


class Outbox(Generic[_Message]):
    """Messages in order, then the end of the stream. Writing never waits; one reader iterates over it.

    A reader that is `limit` messages behind is stuck: its stream ends with SLOW_CONSUMER instead of growing for ever.
    """

    def __init__(self, *, limit: int = 1024) -> None:
        """Start empty and open."""
        self._limit = limit
        self._messages: deque[_Message] = deque()
        self._has_ended = False
        self._error: MeshError | None = None
        self._changed = asyncio.Event()

    def put(self, message: _Message) -> None:
        """Send `message`; nothing happens once the end is decided."""
        if self._has_ended:
            return
        if len(self._messages) >= self._limit:
            self.end(BackOffError(Reason.SLOW_CONSUMER, f"{self._limit} messages wait to be read"))
            return
        self._messages.append(message)
        self._changed.set()

    def end(self, error: MeshError | None = None) -> None:
        """End the stream after what was put before: well, or with `error`. The first end stands."""
        if self._has_ended:
            return
        self._has_ended, self._error = True, error
        self._changed.set()

    def __aiter__(self) -> "Outbox[_Message]":
        return self

    async def __anext__(self) -> _Message:
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._has_ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._messages.popleft()
