"""Streams between a client and a server of one process: the same handlers and messages as over gRPC, without a socket.

A socket within one process costs what it costs between two: each message passes two threads of gRPC and the kernel, up
to a third of what a request costs. Here a message is handed over by reference, and belongs to its reader from then on.

Laws:
    - each direction holds one message: a writer waits for a reader that is behind, as on a connection that is full;
    - a handler runs in a task and a context of its own, inside the frame of its server, which can end it like any call;
    - a call ends once: with its handler, or with `cancel`; what was written before is still read.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

StreamHandler = Callable[[Any, Any], Awaitable[None]]
"""What serves a method whose responses are a stream: takes the request, or the stream of them, and the context."""


class _Lane:
    """One direction of a call: one writer, one reader, at most one message between them."""

    __slots__ = ("_is_closed", "_message", "_waiter")

    def __init__(self) -> None:
        self._message: Any = None
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None
        """Of the writer while it is full, of the reader while it is empty."""

    async def write(self, message: Any) -> None:
        """Hand `message` over once the one before was taken. Raises: InvalidStateError when the call has ended."""
        while self._message is not None and not self._is_closed:
            await self._changed()
        if self._is_closed:
            raise asyncio.InvalidStateError("the call has ended")
        self._message = message
        self._wake()

    async def read(self) -> Any:
        """Return the next message; EOF after the last."""
        while self._message is None:
            if self._is_closed:
                return grpc.aio.EOF
            await self._changed()
        message, self._message = self._message, None
        self._wake()
        return message

    def close(self) -> None:
        """Let nothing more be written."""
        self._is_closed = True
        self._wake()

    async def _changed(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> "_Lane":
        return self

    async def __anext__(self) -> Any:
        message = await self.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return message


class _Context:
    """What a handler sees of its call; as much of grpc.aio.ServicerContext as streams use."""

    def __init__(self, responses: _Lane) -> None:
        self.write = responses.write
        self.status: tuple[grpc.StatusCode, str, Sequence[tuple[str, str | bytes]]] = (grpc.StatusCode.OK, "", ())

    def peer(self) -> str:
        return "local"

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Leave it: nobody in this process asks for it."""

    def code(self) -> grpc.StatusCode:
        return self.status[0]

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Leave it: nobody in this process asks for it."""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str | bytes]] = ()
    ) -> None:
        self.status = (code, details, trailing_metadata)
        raise grpc.aio.AbortError


class LocalCall:
    """A call as its client sees it; as much of grpc.aio's streaming calls as the mesh uses."""

    def __init__(self, handler: StreamHandler, request: Any = None) -> None:
        """Have `handler` serve `request`; None = what is written."""
        self._requests, self._responses = _Lane(), _Lane()
        self._context = _Context(self._responses)
        self.write = self._requests.write
        # A context of its own: log lines of the handler do not belong to whichever request opened the call.
        self._task = asyncio.get_running_loop().create_task(
            self._serve(handler, self._requests if request is None else request),
            name="local-call",
            context=contextvars.Context(),
        )

    async def read(self) -> Any:
        """Return the next response; EOF after the last. Raises: AioRpcError as the handler ended."""
        message = await self._responses.read()
        if message is grpc.aio.EOF:
            code, details, trailing = self._context.status
            if code is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)
        return message

    def cancel(self) -> None:
        """End the call: its handler is cancelled. Idempotent."""
        self._task.cancel()

    def __aiter__(self) -> "LocalCall":
        return self

    async def __anext__(self) -> Any:
        message = await self.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return message

    async def _serve(self, handler: StreamHandler, request: Any) -> None:
        context = self._context
        try:
            await handler(request, context)
        except grpc.aio.AbortError:
            pass  # the status says it
        except asyncio.CancelledError:
            context.status = (grpc.StatusCode.CANCELLED, "the call was cancelled", ())
            raise
        except Exception as exc:
            context.status = (grpc.StatusCode.UNKNOWN, repr(exc), ())
            raise
        finally:
            self._requests.close()
            self._responses.close()


class LocalChannel:
    """Calls to one server of this process; as much of grpc.aio.Channel as stubs of streams need."""

    def __init__(self, handler_of: Callable[[str], StreamHandler]) -> None:
        """`handler_of` finds the handler of a method's path."""
        self._handler_of = handler_of

    def unary_stream(self, method: str, *_: Any, **__: Any) -> Callable[..., LocalCall]:
        """Return what calls `method`; (de)serialisers have nothing to do."""
        return lambda request, *, wait_for_ready=True: LocalCall(self._handler_of(method), request)

    def stream_stream(self, method: str, *_: Any, **__: Any) -> Callable[..., LocalCall]:
        """Return what calls `method`; (de)serialisers have nothing to do."""
        return lambda: LocalCall(self._handler_of(method))


class LocalServers:
    """The servers of one process by address, for clients of the same process."""

    def __init__(self) -> None:
        """Start with none."""
        self._channels: dict[str, LocalChannel] = {}

    def add(self, address: str, handler_of: Callable[[str], StreamHandler]) -> None:
        """Serve streams to `address` by the handlers that `handler_of` finds, until `remove`."""
        self._channels[address] = LocalChannel(handler_of)

    def remove(self, address: str) -> None:
        """Take no new call; those that run are their server's to end. Idempotent."""
        self._channels.pop(address, None)

    def channel(self, address: str) -> Any:
        """Return a LocalChannel to a server of this process, for the stubs of its streams; None: it is elsewhere."""
        return self._channels.get(address)
