"""Reading a request's body and writing its reply over bare ASGI, within the request's bounds."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager, suppress

import orjson
from starlette.types import Receive, Scope, Send

from kvmesh.core.errors import OutOfTimeError, Reason, TryElsewhereError
from kvmesh.gateway.body_writer import BodyWriter
from kvmesh.gateway.failures import Failure, Headers, body_too_long, failure_of
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.stalled_clients import Writes, while_client_reads
from kvmesh.wire.validation import invalid

JSON = b"application/json"
BODY_WAIT_S = 30.0
"""Longest time a body may take to arrive."""
_FAREWELL_S = 1.0
_GRPC_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class ClientGoneError(Exception):
    """The client went away before its request had arrived whole: nobody is left to answer."""


def header(scope: Scope, name: bytes) -> str | None:
    """Return the first header of this lower-case name."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def timeout_of(scope: Scope) -> float | None:
    """Return the seconds of `Grpc-Timeout`, in gRPC's own form: 200m is 200 ms. Raises: FixRequestError."""
    text = header(scope, b"grpc-timeout")
    if text is None:
        return None
    found = _GRPC_TIMEOUT.fullmatch(text.strip())
    if found is None:
        raise invalid("grpc-timeout", "up to 8 digits and one of H M S m u n, as in 200m for 200 ms")
    return int(found[1]) * _UNIT_S[found[2]]


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int) -> bytes:
    """Return the request's body. Raises: HttpRefusalError (413), OutOfTimeError, ClientGoneError."""
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > max_bytes:
        raise body_too_long(max_bytes)
    body = bytearray()
    more = True
    async with deadline(BODY_WAIT_S):
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            if len(body) > max_bytes:
                raise body_too_long(max_bytes)
            more = message.get("more_body", False)
    return bytes(body)


@asynccontextmanager
async def deadline(timeout_s: float | None) -> AsyncIterator[None]:
    """Cancel the block when the time is up and raise OutOfTimeError(DEADLINE) in its place; None = no bound."""
    cut = asyncio.timeout(timeout_s)
    try:
        async with cut:
            yield
    except TimeoutError as exc:
        if not cut.expired():
            raise
        raise OutOfTimeError(Reason.DEADLINE, "") from exc


@asynccontextmanager
async def until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client goes away, and leave it quietly. The body must have been read."""
    tasks = OwnedTasks()
    try:
        async with asyncio.timeout(None) as cut:
            tasks.start(_cut_at_disconnect(receive, cut), name="http.disconnect")
            try:
                yield
            finally:
                await tasks.aclose()
    except TimeoutError:
        if not cut.expired():
            raise


async def _cut_at_disconnect(receive: Receive, cut: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    cut.reschedule(asyncio.get_running_loop().time())


async def send_bytes(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    content_type: bytes = JSON,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Answer with one whole body."""
    length = str(len(body)).encode("ascii")
    own = [(b"content-type", content_type), (b"content-length", length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: object) -> None:
    """Answer 200 with JSON."""
    await send_bytes(send, orjson.dumps(value))


class StreamedReply:
    """A reply whose status is decided by its first bytes: until then the request may still fail with another."""

    def __init__(
        self,
        send: Send,
        *,
        content_type: bytes,
        last: bytes = b"",
        body_writer: BodyWriter | None = None,
        headers: Callable[[], Headers] = list,
    ) -> None:
        """Nothing is sent before the first write; `last` ends a good stream, `headers` are asked for at its start."""
        self._send = send
        self._content_type = content_type
        self._now = asyncio.get_running_loop().time
        self._body_writer = body_writer
        self.at_once: BodyWriter | None = None
        """Where more of the body may be written without waiting; None until the first `write` is through."""
        self._headers = headers
        self.last = last
        self.is_started = False
        self.writes = Writes()

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send some bytes in one write; waits while the client does not read."""
        self.writes.since = self._now()
        is_first, self.is_started = not self.is_started, True
        if is_first:
            await self._start()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        if is_first and more and self._body_writer is not None:
            self._body_writer.flush()  # the first token waits for nothing
        self.writes.since = None
        self.at_once = self._body_writer if more else None

    async def end(self, data: bytes = b"") -> None:
        """Send the last bytes."""
        await self.write(data, more=False)

    async def say_farewell(self, data: bytes) -> None:
        """Send the last bytes of a failed stream; a client that does not read them is left without."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self.end(data)

    async def _start(self) -> None:
        # No proxy may hold a stream back until it is whole: the last header says so to the one that does by default.
        headers = [
            (b"content-type", self._content_type),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *self._headers(),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})


async def stream(
    reply: StreamedReply,
    chunks: AsyncGenerator[bytes, None],
    *,
    receive: Receive,
    timeout_s: float | None,
    client_write_s: float,
    tell: Callable[[Failure], bytes],
) -> None:
    """Send `chunks`, then the reply's `last`; a failure after the first is told in the stream, one before it is raised.

    `chunks` is closed before this returns, whoever ends it: the client, the deadline or the server's stop.
    """
    try:
        async with until_disconnect(receive):
            try:
                async with deadline(timeout_s), while_client_reads(reply.writes, client_write_s):
                    async with aclosing(chunks):
                        async for chunk in chunks:
                            await reply.write(chunk)
                    await reply.end(reply.last)
            except Exception as exc:
                if not reply.is_started:
                    raise
                await reply.say_farewell(tell(failure_of(exc)))
    except asyncio.CancelledError:
        if reply.is_started:  # the server stops
            await reply.say_farewell(tell(failure_of(draining())))
        raise


def draining() -> TryElsewhereError:
    """Return the error of a request that the server's stop ended."""
    return TryElsewhereError(Reason.DRAINING, "")
