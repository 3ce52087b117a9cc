"""What one turn of the loop writes to a connection leaves it together: one system call, and one wake-up of the client.

A streamed reply writes its head and its first tokens at once, its last tokens and its end as well. The event loop would
send each of these by itself, and a write costs more than what is written.
"""

import asyncio
from typing import Any


class CorkedTransport:
    """A transport whose writes wait for the end of the loop's turn; everything else is the transport's own."""

    __slots__ = ("_call_soon", "_parts", "_transport")

    def __init__(self, transport: asyncio.Transport, *, loop: asyncio.AbstractEventLoop) -> None:
        """Write to `transport`, whose connection `loop` serves."""
        self._transport = transport
        self._call_soon = loop.call_soon
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data` after what was written before, within this turn."""
        if not self._parts:
            self._call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(b"".join(parts))
