"""What a frontend shows of the workers: from the router of its process, or asked of another's."""

from dataclasses import dataclass
from typing import Protocol

import grpc

from kvmesh.core.roster import WorkerRecord
from kvmesh.core.worker_views import WorkerSnapshot
from kvmesh.services.channels import Channels
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.peers import Peers
from kvmesh.v1 import frontend_pb2, router_pb2, router_pb2_grpc

_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class RouterSight:
    """A router's knowledge at one moment."""

    workers: tuple[frontend_pb2.TopologyWorker, ...] = ()
    """By worker_id."""
    reservations: int = 0
    """Its own bookings."""
    policy: str = ""
    """How it chooses; "" while that is not known."""
    index: str = ""
    """What it knows caches by; "" while that is not known."""
    is_silent: bool = False
    """It was asked, and no router answered."""


class RouterView(Protocol):
    """Looks at a router."""

    def now(self) -> RouterSight:
        """Return what is known without asking."""

    async def refresh(self) -> None:
        """Ask where asking is needed, in bounded time; a router that does not answer leaves what discovery says."""


class LocalRouterView:
    """The router of this process."""

    def __init__(self, router: LocalRouter) -> None:
        """Look at `router`."""
        self._router = router

    def now(self) -> RouterSight:
        """See `RouterView.now`."""
        workers = self._router.workers()
        return RouterSight(
            workers=tuple(_from_snapshot(snapshot) for snapshot in workers),
            reservations=sum(worker.reservations for worker in workers),
            policy=self._router.policy_name,
            index=self._router.index_mode.value,
        )

    async def refresh(self) -> None:
        """Nothing to ask."""


class RemoteRouterView:
    """The router that discovery names, and what discovery itself says while that does not answer."""

    def __init__(self, *, peers: Peers, channels: Channels) -> None:
        """Find workers and router by `peers`."""
        self._peers = peers
        self._channels = channels
        self._answer: router_pb2.ListWorkersResponse | None = None
        self._is_silent = False
        """Unlike a missing answer, False before the first question."""

    def now(self) -> RouterSight:
        """See `RouterView.now`: as old as the last refresh."""
        answer = self._answer or router_pb2.ListWorkersResponse()
        lines = {(line.worker_id, line.epoch): line for line in answer.workers}
        records = [record for record in self._peers.roster.records() if record.role.is_worker]
        return RouterSight(
            workers=tuple(_from_line(record, lines.get((record.worker_id, record.epoch))) for record in records),
            reservations=sum(line.reservations for line in answer.workers),
            policy=answer.policy,
            index=answer.index,
            is_silent=self._is_silent,
        )

    async def refresh(self) -> None:
        """See `RouterView.refresh`."""
        address = self._peers.router_address()
        self._answer = None if address is None else await self._ask(address)
        self._is_silent = self._answer is None

    async def _ask(self, address: str) -> router_pb2.ListWorkersResponse | None:
        stub = router_pb2_grpc.RouterStub(self._channels.get(address))
        try:
            return await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None


def _from_record(record: WorkerRecord) -> frontend_pb2.TopologyWorker:
    return frontend_pb2.TopologyWorker(
        id=record.worker_id,
        node=record.worker_id.split("/", 1)[0],
        role=record.role.value,
        epoch=record.epoch,
        total_blocks=record.total_blocks,
        address=record.address,
    )


def _from_snapshot(snapshot: WorkerSnapshot) -> frontend_pb2.TopologyWorker:
    report = snapshot.report
    worker = _from_record(snapshot.record)
    worker.state = _state(draining=snapshot.record.draining, stale=snapshot.is_stale)
    if report is not None:
        worker.active_requests = report.active_requests
        worker.active_blocks = report.active_blocks
        worker.waiting_requests = report.waiting_requests
        worker.prefix_hit_rate = report.prefix_hit_rate
    worker.active_prefill_tokens = snapshot.load.prefill_tokens
    worker.indexed_blocks = snapshot.indexed_blocks
    worker.index_degraded = snapshot.is_index_degraded
    worker.reservations = snapshot.reservations
    return worker


def _from_line(record: WorkerRecord, line: router_pb2.RouterWorker | None) -> frontend_pb2.TopologyWorker:
    worker = _from_record(record)
    if line is None:  # shown as what it is: unknown, but for what the worker says of itself in discovery
        worker.state = frontend_pb2.WORKER_STATE_DRAINING if record.draining else frontend_pb2.WORKER_STATE_UNSPECIFIED
        worker.load_unknown = True
        return worker
    worker.state = _state(draining=record.draining, stale=line.stale)
    worker.active_requests = line.active_requests
    worker.active_blocks = line.active_blocks
    worker.waiting_requests = line.waiting_requests
    worker.prefix_hit_rate = line.prefix_hit_rate
    worker.active_prefill_tokens = line.active_prefill_tokens
    worker.indexed_blocks = line.indexed_blocks
    worker.index_degraded = line.index_degraded
    worker.reservations = line.reservations
    return worker


def _state(*, draining: bool, stale: bool) -> frontend_pb2.WorkerState.ValueType:
    if draining:
        return frontend_pb2.WORKER_STATE_DRAINING
    return frontend_pb2.WORKER_STATE_SUSPECT if stale else frontend_pb2.WORKER_STATE_READY
