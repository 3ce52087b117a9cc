"""A service of another process, served here by passing every call on: how operators reach all of a mesh by one door.

For the questions of people. What carries load (tasks, leases, bookings, tokens) goes to the service itself.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status

from kvmesh import telemetry
from kvmesh.core.errors import MeshError, NotServedError, Reason, TryElsewhereError
from kvmesh.services.channels import Channels
from kvmesh.services.running_calls import RunningCalls
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.metadata import REQUEST_ID_KEY

_QUESTION_S = 5.0
"""Bound of a question whose client set none; what is watched has no end."""
_LONGEST_S = 86_400.0
"""gRPC takes a deadline of centuries for one that has passed."""
_C = grpc.StatusCode
_CODES_OF_GRPC_ITSELF = frozenset(
    {
        _C.CANCELLED, _C.DEADLINE_EXCEEDED, _C.INTERNAL, _C.RESOURCE_EXHAUSTED, _C.UNAVAILABLE, _C.UNIMPLEMENTED,
        _C.UNKNOWN,
    }
)  # fmt: skip


class ForwardedService:
    """Has a method per RPC of a service, as its generated servicer would; calls with a client's stream are refused."""

    def __init__(
        self,
        service: ServiceDescriptor,
        *,
        address: Callable[[], str | None],
        channels: Channels,
        request_s: float | None = None,
        calls: RunningCalls | None = None,
    ) -> None:
        """Pass calls on to where `address` says the service is now; None = nowhere. They are counted in `calls`.

        `request_s` bounds a call whose client set no deadline, streams included. None: the service answers questions,
        at once or not at all, and streams what is watched.
        """
        self._service = service
        self._address = address
        self._channels = channels
        self._request_s = request_s
        self._calls = calls or RunningCalls()
        for method in service.methods:
            setattr(self, method.name, self._handler(method))

    def _handler(self, method: MethodDescriptor) -> Callable[..., Any]:
        if method.client_streaming:
            return self._refuse
        path = f"/{self._service.full_name}/{method.name}"
        answer_type = GetMessageClass(method.output_type)

        async def forward(request: Any, context: Any) -> Any:
            timeout_s = _timeout_s(context, self._request_s or _QUESTION_S)
            with self._calls.running():
                call = self._channel().unary_unary(path, type(request).SerializeToString, answer_type.FromString)
                try:
                    return await call(request, timeout=timeout_s, metadata=_metadata(context))
                except grpc.aio.AioRpcError as exc:
                    self._count_bound(exc, context)
                    await _end_as_told(exc, context)
                    raise self._error_of(exc, context) from exc

        async def forward_stream(request: Any, context: Any) -> AsyncIterator[Any]:
            timeout_s = _timeout_s(context, self._request_s)
            with self._calls.running():
                open_call = self._channel().unary_stream(path, type(request).SerializeToString, answer_type.FromString)
                call = open_call(request, timeout=timeout_s, metadata=_metadata(context))
                try:
                    async for answer in call:
                        yield answer
                except grpc.aio.AioRpcError as exc:
                    self._count_bound(exc, context)
                    await _end_as_told(exc, context)
                    raise from_rpc_error(exc) from exc
                finally:
                    with suppress(grpc.RpcError):
                        call.cancel()

        return forward_stream if method.server_streaming else forward

    def _channel(self) -> grpc.aio.Channel:
        address = self._address()
        if address is None:
            raise TryElsewhereError(Reason.WORKER_LOST, f"nobody serves {self._service.full_name} at the moment")
        return self._channels.get(address)

    def _count_bound(self, exc: grpc.aio.AioRpcError, context: Any) -> None:
        is_deadline = exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if is_deadline and self._request_s is not None and context.time_remaining() is None:
            telemetry.WAIT_ENDED.labels(wait="request_s").inc()

    def _error_of(self, exc: grpc.aio.AioRpcError, context: Any) -> MeshError:
        """Return how gRPC failed; a question without a deadline that is not answered soon found nobody."""
        is_deadline = exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if is_deadline and self._request_s is None and context.time_remaining() is None:
            return TryElsewhereError(Reason.WORKER_LOST, exc.details() or "no answer")
        return from_rpc_error(exc)

    async def _refuse(self, request: Any, context: Any) -> Any:
        raise NotServedError(Reason.UNIMPLEMENTED, "call the service itself: this door passes single requests on")


def _timeout_s(context: Any, default_s: float | None) -> float | None:
    remaining_s: float | None = context.time_remaining()
    return default_s if remaining_s is None else min(remaining_s, _LONGEST_S)


def _metadata(context: Any) -> tuple[tuple[str, str | bytes], ...]:
    """Return the caller's metadata, without what each connection says for itself, and with the id that the call got."""
    request_id: str | None = getattr(context, "request_id", None)  # None where the caller's own is kept
    left_out = {"user-agent"} if request_id is None else {"user-agent", REQUEST_ID_KEY}
    passed_on = tuple(
        (key, value)
        for key, value in context.invocation_metadata() or ()
        if key not in left_out and not key.startswith("grpc-")
    )
    return passed_on if request_id is None else (*passed_on, (REQUEST_ID_KEY, request_id))


async def _end_as_told(exc: grpc.aio.AioRpcError, context: Any) -> None:
    """End the call with the service's own status, details and all; return where it is gRPC that failed, on the way."""
    try:
        status = rpc_status.from_call(exc)
    except (ValueError, DecodeError):  # details that contradict their call, or are none
        status = None
    if status is not None:
        await context.abort_with_status(rpc_status.to_status(status))
    if exc.code() not in _CODES_OF_GRPC_ITSELF:
        await context.abort(exc.code(), exc.details() or "")
