"""Writing the body of a streamed reply from where its parts arise, with no task and no coroutine in between.

ASGI has `send`, a coroutine, for every part; for a stream of tokens that is a third of what a token costs. The server
puts a `BodyWriter` into each request's scope; an app that began a chunked reply by `send` may write parts of it here,
and ends it by `send`. Under another server there is none, and everything goes by `send`.
"""

from typing import Protocol

from kvmesh.gateway.corked_transport import CorkedTransport

BODY_WRITER_KEY = "kvmesh.body_writer"
"""Key in a request's scope."""


class Flow(Protocol):
    """How a server keeps track of one connection's buffer."""

    write_paused: bool
    """What was written waits for the client to read."""


class BodyWriter:
    """The connection of one request."""

    __slots__ = ("_flow", "_transport")

    def __init__(self, transport: CorkedTransport, flow: Flow) -> None:
        """Write to the connection of which `flow` tells whether its client keeps up."""
        self._transport = transport
        self._flow = flow

    @property
    def is_writable(self) -> bool:
        """Tell whether the client is there and takes what it is sent."""
        return not self._flow.write_paused and not self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send some bytes, not empty, as one chunk of the body (RFC 9112, 7.1)."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def flush(self) -> None:
        """Send now what the connection would hold until the end of the loop's turn."""
        self._transport.flush()
