"""What one turn of the loop writes to a connection leaves it together: one system call, and one wake-up of the client.

A streamed reply writes its head and its first tokens at once, its last tokens and its end as well. The event loop would
send each of these by itself, and a write costs more than what is written.
"""

import asyncio
from typing import Any

_MAX_BYTES = 16 * 1024
"""What waits at most: a writer that never gives the loop a turn must still learn that its client does not read."""


class CorkedTransport:
    """A transport whose writes wait for the end of the loop's turn; everything else is the transport's own."""

    __slots__ = ("_bytes", "_call_soon", "_parts", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport, *, loop: asyncio.AbstractEventLoop) -> None:
        """Write to `transport`, whose connection `loop` serves."""
        self._transport = transport
        self.is_closing = transport.is_closing
        self._call_soon = loop.call_soon
        self._parts: list[bytes] = []
        self._bytes = 0
        """Length of all parts."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data` after what was written before: at the end of this turn, or now if it is much."""
        if not self._parts:
            self._call_soon(self.flush)
        self._parts.append(data)
        self._bytes += len(data)
        if self._bytes > _MAX_BYTES:
            self.flush()

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        """Send now what waits."""
        parts, self._parts, self._bytes = self._parts, [], 0
        if parts:
            self._transport.write(b"".join(parts))
