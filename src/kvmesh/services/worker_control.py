"""WorkerControl: of one worker, and, at the gateway, forwarded to the worker that is named."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from kvmesh.core.errors import NotKnownError, Reason, RequestCancelledError
from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRecord
from kvmesh.services.channels import Channels
from kvmesh.services.identity import WorkerIdentity
from kvmesh.services.signal import Signal
from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.validation import invalid, seconds

if TYPE_CHECKING:
    from kvmesh.v1.worker_control_pb2_grpc import WorkerControlAsyncStub

_ANSWER_MARGIN_S = 5.0


class Controlled(Protocol):
    """A worker as its control sees it."""

    @property
    def identity(self) -> WorkerIdentity:
        """Who it is."""

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Take nothing new and end what runs within `timeout_s`; return (finished, cancelled)."""

    async def undrain(self) -> bool:
        """Take new work again; return whether it drained. No `drain` runs meanwhile. Idempotent.

        Raises: TryElsewhereError(DRAINING) once it is on its way out.
        """

    async def describe(self) -> worker_control_pb2.GetInfoResponse:
        """Return what the worker is and does."""


class WorkerControl(worker_control_pb2_grpc.WorkerControlServicer):
    """Controls the worker it runs in."""

    def __init__(self, worker: Controlled, *, drain_s: float) -> None:
        """Control `worker`; `drain_s` is the bound of a drain that sets none."""
        self._worker = worker
        self._drain_s = drain_s
        self._drains: set[asyncio.Timeout] = set()
        """Of the drains that run: what ends each when the worker is to take work again."""
        self._drain_ended = Signal()

    async def Drain(
        self,
        request: worker_control_pb2.DrainRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> worker_control_pb2.DrainResponse:
        """See the contract."""
        _check_addressee(request.worker_id, self._worker.identity)
        timeout_s = drain_timeout_s(request, self._drain_s)
        undrained = asyncio.timeout(None)
        try:
            async with undrained:
                self._drains.add(undrained)
                finished, cancelled = await self._worker.drain(timeout_s)
        except TimeoutError:
            if not undrained.expired():
                raise
            raise RequestCancelledError(Reason.CANCELLED, "the worker was told to take new work again") from None
        finally:
            self._drains.discard(undrained)
            self._drain_ended.fire()
        return worker_control_pb2.DrainResponse(finished=finished, cancelled=cancelled)

    async def Undrain(
        self,
        request: worker_control_pb2.UndrainRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> worker_control_pb2.UndrainResponse:
        """See the contract."""
        _check_addressee(request.worker_id, self._worker.identity)
        while self._drains:
            for undrained in self._drains:
                if not undrained.expired():
                    undrained.reschedule(asyncio.get_running_loop().time())
            await self._drain_ended.wait()
        return worker_control_pb2.UndrainResponse(was_draining=await self._worker.undrain())

    async def GetInfo(
        self,
        request: worker_control_pb2.GetInfoRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> worker_control_pb2.GetInfoResponse:
        """See the contract."""
        _check_addressee(request.worker_id, self._worker.identity)
        return await self._worker.describe()


class ForwardedWorkerControl(worker_control_pb2_grpc.WorkerControlServicer):
    """Forwards to the worker that a request names: the gateway's WorkerControl."""

    def __init__(self, *, find: Callable[[WorkerId], WorkerRecord | None], channels: Channels, drain_s: float) -> None:
        """Find workers by `find`."""
        self._find = find
        self._channels = channels
        self._drain_s = drain_s

    async def Drain(
        self,
        request: worker_control_pb2.DrainRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> worker_control_pb2.DrainResponse:
        """See the contract."""
        stub = self._stub_of(request.worker_id)
        timeout_s = drain_timeout_s(request, self._drain_s)
        try:
            return await stub.Drain(request, timeout=timeout_s + _ANSWER_MARGIN_S)
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from exc

    async def Undrain(
        self,
        request: worker_control_pb2.UndrainRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> worker_control_pb2.UndrainResponse:
        """See the contract."""
        stub = self._stub_of(request.worker_id)
        try:
            return await stub.Undrain(request, timeout=_left_s(context, _ANSWER_MARGIN_S))
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from exc

    async def GetInfo(
        self,
        request: worker_control_pb2.GetInfoRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> worker_control_pb2.GetInfoResponse:
        """See the contract."""
        stub = self._stub_of(request.worker_id)
        try:
            return await stub.GetInfo(request, timeout=_left_s(context, _ANSWER_MARGIN_S))
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from exc

    def _stub_of(self, worker_id: str) -> "WorkerControlAsyncStub":
        if not worker_id:
            raise invalid("worker_id", "required here: name the worker as GetTopology does, e.g. NODE1/decode/0")
        record = self._find(WorkerId(worker_id))
        if record is None:
            raise NotKnownError(
                Reason.NOT_FOUND, f"no live worker is called {worker_id!r}: see GetTopology", field="worker_id"
            )
        return worker_control_pb2_grpc.WorkerControlStub(self._channels.get(record.address))


def _check_addressee(worker_id: str, identity: WorkerIdentity) -> None:
    if worker_id and worker_id != identity.worker_id:
        raise NotKnownError(Reason.NOT_FOUND, f"{worker_id} is not served here", field="worker_id")


def _left_s(context: Any, default_s: float) -> float:
    remaining_s: float | None = context.time_remaining()
    return default_s if remaining_s is None else min(remaining_s, default_s)


def drain_timeout_s(request: worker_control_pb2.DrainRequest, default_s: float) -> float:
    """Return the bound of a drain. Raises: FixRequestError(INVALID_FIELD) when it is out of range."""
    return seconds(request.timeout, path="timeout") if request.HasField("timeout") else default_s
