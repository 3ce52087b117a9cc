"""What surrounds every handler of every server: request id and log context, errors as the catalog has them, metrics.

Streams pay per call, not per message: the handler's generator is drained into `context.write` here, where gRPC would
otherwise do the same. A generator is closed before its call ends, so its `finally` runs at once and not when the
garbage collector comes by.

A call ends in one of five ways, and the client always learns which: the handler returns; it raises (the catalog's
Status); the client goes (nothing to send); it stays but does not read (SLOW_CONSUMER); the server stops (DRAINING).
"""

import asyncio
import inspect
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import structlog
import uuid_utils
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from kvmesh import telemetry
from kvmesh.core.errors import FixRequestError, MeshError, NotServedError, Reason, TryElsewhereError
from kvmesh.core.waits import Waits
from kvmesh.services.stalled_clients import Writes, while_client_reads
from kvmesh.wire import error_catalog
from kvmesh.wire.metadata import REQUEST_ID_KEY

_HELD_STREAM = re.compile(r"kvmesh\.v1\.\w+/(Watch\w*|Attach|Submit)")
"""Methods whose stream may be left unread: they keep what is newest. Every other stream carries one request."""
_FAREWELL_S = 1.0
"""How long a call waits for its status to be sent."""
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = telemetry.logger(__name__)

Handler = Any
"""A grpc.RpcMethodHandler; its attributes are untyped in the stubs."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The one interceptor of a server; it also knows which calls still run, and can end them."""

    def __init__(self, *, endless: Collection[str] = (), client_write_s: float = Waits().client_write_s) -> None:
        """Calls of the `endless` services (full names) last as long as their clients like: nobody waits for them.

        `client_write_s` bounds each write to a client that does not read, where the stream carries one request.
        """
        self._endless = frozenset(endless)
        self._client_write_s = client_write_s
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}
        """By method: the handler and what is served in its place."""
        self._open: dict[asyncio.Task[Any], str] = {}
        """gRPC's task of each call, until the last byte is handed over; to its service."""
        self._waited_for = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended = False

    @property
    def open_calls(self) -> int:
        """Calls that have not ended yet, cleanup included, but for those of endless services."""
        return self._waited_for

    @property
    def ended(self) -> bool:
        """True once `end_calls` was called: a cancelled call owes its client a DRAINING."""
        return self._ended

    async def wait_idle(self) -> None:
        """Wait until `open_calls` is 0."""
        await self._idle.wait()

    async def end_calls(self, *, spared: str, within_s: float) -> int:
        """Cancel every open call and refuse new ones; return how many handlers had not ended `within_s` later.

        Calls of the service `spared` are not cancelled: they are about to end by themselves.
        """
        self._ended = True
        for task, service in self._open.items():
            if service != spared:
                task.cancel()
        if self._open:
            await asyncio.wait(tuple(self._open), timeout=within_s)
        return len(self._open)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the handler of a method inside its frame; of an unknown one, a refusal that nothing counts or logs."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return _UNKNOWN_METHOD
        path = handler_call_details.method
        known = self._wrapped.get(path)
        if known is None or known[0] is not handler:
            known = self._wrapped[path] = handler, self.wrap(handler, path)
        return known[1]

    def wrap(self, handler: Handler, path: str) -> Handler:
        """Return what is served in place of `handler`: the same method inside its frame."""
        call = _Call(self, path.lstrip("/"), handler)
        if handler.response_streaming:
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            parse = call.parsed if handler.request_streaming else None
            return make(call.stream, parse, handler.response_serializer)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(call.gather, call.parsed, None)
        # Bytes in, bytes out: a single message that does not parse fails inside the frame like everything else.
        return grpc.unary_unary_rpc_method_handler(call.unary, None, None)

    def write_bound_s(self, path: str) -> float | None:
        """Return how long one write of this method's stream may wait for its client; None = without bound."""
        return None if self.is_held(path) else self._client_write_s

    def is_held(self, path: str) -> bool:
        """Tell whether this method's stream is of the mesh itself, or endless: nobody's request."""
        return _HELD_STREAM.fullmatch(path) is not None or path.rpartition("/")[0] in self._endless

    def enter(self, service: str) -> None:
        """Take in the call that runs in the current task. Raises: TryElsewhereError(DRAINING) after `end_calls`."""
        if self._ended:
            raise TryElsewhereError(Reason.DRAINING, "")
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = service
        if service not in self._endless:
            self._waited_for += 1
            self._idle.clear()
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[Any]) -> None:
        if self._open.pop(task) in self._endless:
            return
        self._waited_for -= 1
        if self._waited_for == 0:
            self._idle.set()


class _Call:
    """One method as it is served."""

    def __init__(self, owner: CallInterceptor, path: str, handler: Handler) -> None:
        self._owner = owner
        self._path = path
        self._service, _, self._method = path.rpartition("/")
        self._behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        self._parse = handler.request_deserializer or _as_is
        self._serialize = handler.response_serializer or _as_is
        self._write_bound_s = owner.write_bound_s(path)
        # A stream that a client waits on gets its id ahead; elsewhere it goes with the end, which costs nothing.
        self._id_goes_ahead = handler.response_streaming and not owner.is_held(path)
        self._started = telemetry.RPC_STARTED.labels(self._service, self._method)
        self._duration = telemetry.RPC_DURATION.labels(self._service, self._method)

    async def unary(self, request: bytes, context: Any) -> bytes:
        async with self._frame(context) as inner:
            return self._serialize(await self._behaviour(self.parsed(request), inner))

    async def gather(self, requests: AsyncIterator[Any], context: Any) -> bytes:
        async with self._frame(context) as inner:
            return self._serialize(await self._behaviour(requests, inner))

    async def stream(self, request: Any, context: Any) -> None:
        async with self._frame(context) as inner:
            result = self._behaviour(self.parsed(request) if isinstance(request, bytes) else request, inner)
            if inspect.isawaitable(result):  # it reads and writes the context itself
                await result
                return
            writes, now = Writes(), asyncio.get_running_loop().time
            async with while_client_reads(writes, self._write_bound_s), aclosing(result) as responses:
                async for response in responses:
                    writes.since = now()
                    await inner.write(response)
                    writes.since = None

    def parsed(self, request: bytes) -> Any:
        """Return a message of the client's. Raises: FixRequestError(INVALID_FIELD) if it is none."""
        try:
            return self._parse(request)
        except DecodeError as exc:
            raise FixRequestError(Reason.INVALID_FIELD, f"the request does not parse as {self._path} wants it") from exc

    @asynccontextmanager
    async def _frame(self, context: Any) -> AsyncIterator[Any]:
        """Surround a call."""
        named = _named_request_id(context)
        request_id = named or str(uuid_utils.uuid7())
        structlog.contextvars.bind_contextvars(request_id=request_id, method=self._path, peer=context.peer())
        own = ((REQUEST_ID_KEY, request_id),)
        inner = _Context(context, request_id=None if named else request_id)
        self._started.inc()
        began = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            self._owner.enter(self._service)
            if self._id_goes_ahead:
                inner.begin_metadata(own)
            else:
                context.set_trailing_metadata(own)
            yield inner
            await inner.metadata_sent()
        except asyncio.CancelledError as exc:
            error = self._cause_of_cancel(exc)
            if error is None:
                code = _code_of_departure(context)
                raise
            code = error_catalog.CATALOG[error.reason].code
            await _abort(inner, error, () if self._id_goes_ahead else own)
        except grpc.aio.AbortError:
            code = context.code()
            raise
        except grpc.aio.InternalError:  # a batch failed: the peer is gone
            code = _code_of_departure(context)
            raise
        except Exception as exc:
            error = _mesh_error(exc)
            code = error_catalog.CATALOG[error.reason].code
            await _abort(inner, error, () if self._id_goes_ahead else own)
        finally:
            self._duration.observe(time.perf_counter() - began)
            telemetry.RPC_FINISHED.labels(self._service, self._method, code.name).inc()
            structlog.contextvars.clear_contextvars()

    def _cause_of_cancel(self, exc: asyncio.CancelledError) -> MeshError | None:
        """Return what to tell a client that still waits, or None when it is the client who left.

        gRPC takes every CancelledError for the peer's own and sends nothing. A cancellation that comes from this
        process (the server stops, or a future that the handler awaited was cancelled) would leave the peer waiting.
        """
        task = asyncio.current_task()
        assert task is not None
        if self._owner.ended:
            task.uncancel()
            return TryElsewhereError(Reason.DRAINING, "")
        if task.cancelling() == 0:
            _log.error("rpc.failed", detail="a cancellation from within reached the handler's caller", exc_info=exc)
            return MeshError(Reason.INTERNAL, "")
        return None


class _Context:
    """A call's context as its handler sees it; the initial metadata goes out when the call begins."""

    __slots__ = ("_context", "_metadata", "request_id", "write")

    def __init__(self, context: Any, *, request_id: str | None) -> None:
        self._context = context
        self._metadata: asyncio.Task[None] | None = None
        """Sends the initial metadata. gRPC sends it once, and before anything else."""
        self.write: Callable[[Any], Awaitable[None]] = context.write
        self.request_id = request_id
        """UUIDv7 under which the call is logged, and its request may run; None if the client named the call."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def begin_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        """Send the initial metadata; the first write, or the end, waits for it."""
        self._metadata = asyncio.ensure_future(self._context.send_initial_metadata(metadata))
        self._metadata.add_done_callback(_note_failure)
        self.write = self._first_write

    async def metadata_sent(self) -> None:
        """Wait until the initial metadata is sent, if any is."""
        if self._metadata is not None:
            await asyncio.shield(self._metadata)
            self._metadata = None

    async def abort(self, *status: Any) -> None:
        """End the call with a status."""
        await self.metadata_sent()
        await self._context.abort(*status)

    async def _first_write(self, message: Any) -> None:
        await self.metadata_sent()
        self.write = self._context.write
        await self._context.write(message)

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Grant what was done already; gRPC refuses to send more of it."""
        await self.metadata_sent()
        if initial_metadata:
            await self._context.send_initial_metadata(initial_metadata)


def _note_failure(sending: asyncio.Task[None]) -> None:
    """Whoever writes next meets the same failure; with nothing more to write, nobody misses what was not sent."""
    if not sending.cancelled():
        sending.exception()


async def _abort(context: Any, error: MeshError, metadata: tuple[tuple[str, str], ...] = ()) -> None:
    """End the call. The status waits in gRPC behind what the client has not read yet; the handler does not."""
    status = rpc_status.to_status(error_catalog.to_status(error))
    try:
        async with asyncio.timeout(_FAREWELL_S):
            await context.abort(status.code, status.details, (*status.trailing_metadata, *metadata))
    except (TimeoutError, grpc.aio.InternalError) as exc:  # nothing is read, or the client has gone meanwhile
        raise asyncio.CancelledError from exc  # the end that gRPC takes quietly


async def _refuse_unknown_method(_requests: AsyncIterator[Any], context: Any) -> None:
    """Refuse as every other call is refused, where gRPC itself would send a code without a reason."""
    await _abort(
        context, NotServedError(Reason.UNIMPLEMENTED, "There is no such method: reflection lists those there are.")
    )


_UNKNOWN_METHOD: Handler = grpc.stream_stream_rpc_method_handler(_refuse_unknown_method)
"""Whatever the method's form, its client accepts an end without any message. Names come from strangers, so none becomes
a metric's label."""


def _code_of_departure(context: Any) -> grpc.StatusCode:
    """A client leaves because it wants to, or because its deadline passed."""
    is_late = context.time_remaining() == 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED


def _as_is(message: bytes) -> bytes:
    return message


def _named_request_id(context: Any) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SANE_REQUEST_ID.fullmatch(value):
            return value
    return None


def _mesh_error(exc: Exception) -> MeshError:
    error = error_catalog.foreseen_error(exc)
    if error is None:
        _log.error("rpc.failed", exc_info=exc)
        return MeshError(Reason.INTERNAL, "")
    _log.info("rpc.refused", reason=error.reason.value, detail=error.message)
    return error
