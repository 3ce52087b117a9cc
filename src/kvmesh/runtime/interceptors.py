"""What surrounds every handler of every server: request id and log context, errors as the catalog has them, metrics.

Streams pay per call, not per message: the handler's generator is drained into `context.write` here, where gRPC would
otherwise do the same. A generator is closed before its call ends, so its `finally` runs at once and not when the
garbage collector comes by.
"""

import asyncio
import inspect
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import structlog
import uuid_utils
from grpc_status import rpc_status

from kvmesh import telemetry
from kvmesh.core.errors import MeshError, NotServedError, Reason
from kvmesh.wire import error_catalog

REQUEST_ID_KEY = "x-request-id"
"""Metadata key of the id that a call's log lines carry; it names log lines and is no key of anything."""

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = telemetry.logger(__name__)

Handler = Any
"""A grpc.RpcMethodHandler; its attributes are untyped in the stubs."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The one interceptor of a server; it also knows which calls still run."""

    def __init__(self) -> None:
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}
        """By method: the handler and what is served in its place."""
        self._open_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open_calls(self) -> int:
        """Calls whose handler has not returned yet, cleanup included."""
        return self._open_calls

    async def wait_idle(self) -> None:
        """Wait until no handler runs."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the handler of a method inside its frame; None where the method is unknown."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        path = handler_call_details.method
        known = self._wrapped.get(path)
        if known is None or known[0] is not handler:
            known = self._wrapped[path] = handler, self._wrap(handler, path)
        return known[1]

    def _wrap(self, handler: Handler, path: str) -> Handler:
        call = _Call(self, path.lstrip("/"), handler)
        if handler.response_streaming:
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(call.stream, handler.request_deserializer, handler.response_serializer)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(call.gather, handler.request_deserializer, None)
        # Bytes in, bytes out: a message that does not parse fails inside the frame like everything else.
        return grpc.unary_unary_rpc_method_handler(call.unary, None, None)

    def entered(self) -> None:
        """Count a call in."""
        self._open_calls += 1
        self._idle.clear()

    def left(self) -> None:
        """Count a call out."""
        self._open_calls -= 1
        if self._open_calls == 0:
            self._idle.set()


class _Call:
    """One method as it is served."""

    def __init__(self, owner: CallInterceptor, path: str, handler: Handler) -> None:
        self._owner = owner
        self._path = path
        self._service, _, self._method = path.rpartition("/")
        self._behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        self._parse = handler.request_deserializer
        self._serialize = handler.response_serializer
        self._started = telemetry.RPC_STARTED.labels(self._service, self._method)
        self._duration = telemetry.RPC_DURATION.labels(self._service, self._method)

    async def unary(self, request: bytes, context: Any) -> bytes:
        async with self._frame(context):
            return self._serialize(await self._behaviour(self._parse(request), context))  # type: ignore[no-any-return]

    async def gather(self, requests: AsyncIterator[Any], context: Any) -> bytes:
        async with self._frame(context):
            return self._serialize(await self._behaviour(requests, context))  # type: ignore[no-any-return]

    async def stream(self, request: Any, context: Any) -> None:
        async with self._frame(context):
            result = self._behaviour(request, context)
            if inspect.isawaitable(result):  # it reads and writes the context itself
                await result
                return
            async with aclosing(result) as responses:
                async for response in responses:
                    await context.write(response)

    @asynccontextmanager
    async def _frame(self, context: Any) -> AsyncIterator[None]:
        request_id = _request_id(context)
        structlog.contextvars.bind_contextvars(request_id=request_id, method=self._path, peer=context.peer())
        self._owner.entered()
        self._started.inc()
        began = time.perf_counter()
        code = "OK"
        try:
            await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
            yield
        except asyncio.CancelledError as exc:
            code = await _end_cancelled(context, exc)
            raise
        except grpc.aio.AbortError:
            code = context.code().name
            raise
        except grpc.aio.InternalError:  # a batch failed: the peer is gone
            code = grpc.StatusCode.CANCELLED.name
            _log.debug("rpc.cancelled")
            raise
        except Exception as exc:
            error = _mesh_error(exc)
            code = error_catalog.CATALOG[error.reason].code.name
            await context.abort_with_status(rpc_status.to_status(error_catalog.to_status(error)))
        finally:
            self._duration.observe(time.perf_counter() - began)
            telemetry.RPC_FINISHED.labels(self._service, self._method, code).inc()
            self._owner.left()
            structlog.contextvars.clear_contextvars()


def _request_id(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SANE_REQUEST_ID.fullmatch(value):
            return value
    return str(uuid_utils.uuid7())


async def _end_cancelled(context: Any, exc: asyncio.CancelledError) -> str:
    """Send a status where the peer still waits for one, and return the code to count.

    gRPC takes every CancelledError for the peer's own and sends nothing. A cancellation that comes from this process
    (a task of ours was cancelled, or a future that the handler awaited) would leave the peer waiting for its deadline.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling() == 0:
        error = _mesh_error(RuntimeError("a cancellation from within reached the handler's caller"), cause=exc)
        await context.abort_with_status(rpc_status.to_status(error_catalog.to_status(error)))
    return ""


def _mesh_error(exc: Exception) -> MeshError:
    """Return the error of ours that a handler's exception amounts to; what we did not foresee is logged with its trace."""
    leaf = _leaf(exc)
    if isinstance(leaf, NotImplementedError):
        leaf = NotServedError(Reason.UNIMPLEMENTED, "")
    if isinstance(leaf, MeshError) and leaf.reason is not Reason.INTERNAL:
        _log.info("rpc.refused", reason=leaf.reason.value, detail=leaf.message)
        return leaf
    _log.error("rpc.failed", exc_info=exc)
    return MeshError(Reason.INTERNAL, "")


def _leaf(exc: Exception) -> Exception:
    """Look into the group a TaskGroup raises: a foreseen error speaks for it only if nothing unforeseen is there."""
    if not isinstance(exc, ExceptionGroup):
        return exc
    leaves = [_leaf(inner) for inner in exc.exceptions]
    return next((leaf for leaf in leaves if not isinstance(leaf, MeshError)), leaves[0])
