"""The router of another process, and what a processor does while it does not answer.

Bookings are asked for one by one, since each waits for its answer; progress and releases go out in the background, in
order and in lists. A router that is not reached within `waits.router_s` is done without: workers are then taken round
robin from discovery, unbooked, and counted; routing is tried again with the next request.
"""

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc

from kvmesh import telemetry
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.errors import MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey, Epoch, RouterId, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.services.channels import Channels
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.routing_port import UNROUTED, Booking
from kvmesh.v1 import router_pb2, router_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.routing import Progress, progress_to_proto, query_to_proto

if TYPE_CHECKING:
    from kvmesh.v1.router_pb2_grpc import RouterAsyncStub

log = telemetry.logger(__name__)

_REPORT_TIMEOUT_S = 2.0


class RemoteRouter:
    """Books with the router that discovery names."""

    def __init__(self, *, peers: Peers, channels: Channels, waits: Waits) -> None:
        """Find the router by `peers`."""
        self._peers = peers
        self._channels = channels
        self._waits = waits
        self._turn = itertools.count()
        self._tasks = OwnedTasks()

    async def aclose(self) -> None:
        """Stop reporting; bookings that were not released end by their workers' reports."""
        await self._tasks.aclose()

    async def reserve(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float, explain: bool) -> Booking:
        """See `RoutingPort.reserve`."""
        stub = await self._reach()
        if stub is None:
            return await self._unbooked(key, query, wait_s=wait_s)
        request = router_pb2.ReserveRequest(
            request_id=key.request_id, attempt=key.attempt, query=query_to_proto(query), explain=explain
        )
        try:
            answer = await stub.Reserve(request, timeout=wait_s + self._waits.connect_s)
        except grpc.aio.AioRpcError as exc:
            error = from_rpc_error(exc)
            if _is_routers_own(error):
                raise error from exc
            log.warning("router.lost", error=f"{exc.code().name}: {exc.details()}")
            return await self._unbooked(key, query, wait_s=wait_s)
        return Booking(
            key=key,
            worker_id=WorkerId(answer.worker.worker_id),
            epoch=Epoch(answer.worker.epoch),
            overlap_blocks=answer.worker.overlap_blocks,
            router_id=RouterId(answer.router_id),
            reservation_id=answer.reservation_id,
            explanation=answer.explanation if explain else None,
        )

    def report_progress(self, progress: Sequence[Progress]) -> None:
        """See `RoutingPort.report_progress`."""
        request = router_pb2.ReportProgressRequest(progress=[progress_to_proto(line) for line in progress])
        self._tasks.start(self._report(request), name="router-progress")

    def release(self, booking: Booking) -> None:
        """See `RoutingPort.release`."""
        if booking.router_id != UNROUTED:
            key = router_pb2.ReservationKey(request_id=booking.key.request_id, attempt=booking.key.attempt)
            self._tasks.start(self._release(router_pb2.RouterReleaseRequest(key=key)), name="router-release")

    async def _reach(self) -> "RouterAsyncStub | None":
        """Return the router once it is connected; None when that takes too long."""
        address = self._peers.router_address()
        if address is None:
            return None
        channel = self._channels.get(address)
        try:
            async with asyncio.timeout(self._waits.router_s):
                await channel.channel_ready()
        except TimeoutError:
            telemetry.WAIT_ENDED.labels(wait="router_s").inc()
            return None
        return router_pb2_grpc.RouterStub(channel)

    async def _unbooked(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float) -> Booking:
        record = await self._next_worker(query, wait_s=wait_s)
        telemetry.UNBOOKED_PICKS.inc()
        return Booking(
            key=key,
            worker_id=record.worker_id,
            epoch=record.epoch,
            overlap_blocks=0,
            router_id=UNROUTED,
            reservation_id=0,
        )

    async def _next_worker(self, query: RoutingQuery, *, wait_s: float) -> WorkerRecord:
        """Return the next of those that the hints allow, waiting for one to come."""
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    eligible = [record for record in self._workers(query) if _is_eligible(record, query)]
                    if eligible:
                        return eligible[next(self._turn) % len(eligible)]
                    await self._peers.changed()
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="route_s").inc()
            raise OutOfTimeError(
                Reason.NO_WORKERS, "the router does not answer and discovery names no eligible worker"
            ) from exc

    def _workers(self, query: RoutingQuery) -> Sequence[WorkerRecord]:
        return self._peers.roster.of(WorkerRole.DECODE, query.model)

    async def _report(self, request: router_pb2.ReportProgressRequest) -> None:
        stub = await self._reach()
        if stub is not None:
            with suppress(grpc.aio.AioRpcError):  # the next report, or a worker's own, brings the router up to date
                await stub.ReportProgress(request, timeout=_REPORT_TIMEOUT_S)

    async def _release(self, request: router_pb2.RouterReleaseRequest) -> None:
        stub = await self._reach()
        if stub is None:
            return
        try:
            await stub.Release(request, timeout=_REPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            log.info("booking.not_released", request_id=request.key.request_id, error=exc.code().name)


def _is_routers_own(error: MeshError) -> bool:
    """Tell whether a router said this, and not the wire to it."""
    is_wire = isinstance(error, TryElsewhereError) and error.reason in (Reason.WORKER_LOST, Reason.DRAINING)
    return not is_wire and not isinstance(error, OutOfTimeError)


def _is_eligible(record: WorkerRecord, query: RoutingQuery) -> bool:
    hints = query.hints
    if hints.pinned_worker is not None and record.worker_id != hints.pinned_worker:
        return False
    return (
        not record.draining
        and record.worker_id not in hints.excluded_workers
        and (not hints.allowed_workers or record.worker_id in hints.allowed_workers)
        and all(record.labels.get(name) == value for name, value in hints.required_labels.items())
    )
