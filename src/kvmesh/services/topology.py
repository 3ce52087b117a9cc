"""The mesh as one frontend sees it: what the router knows of the workers, the queue's counts, its own totals."""

import asyncio
from collections.abc import Callable

import grpc

from kvmesh.core.worker_views import WorkerSnapshot
from kvmesh.services.channels import Channels
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.request_totals import RequestTotals
from kvmesh.v1 import frontend_pb2, prefill_queue_pb2, prefill_queue_pb2_grpc

_QUEUE_INTERVAL_S = 0.5
_QUEUE_TIMEOUT_S = 1.0


class TopologyView:
    """Answers at once from what it follows; only the queue is asked, on a timer of its own or by `refresh`."""

    def __init__(
        self,
        *,
        router: LocalRouter,
        peers: Peers,
        channels: Channels,
        totals: Callable[[], RequestTotals],
    ) -> None:
        """Look at `router` and `peers`; ask the queue from `start` on."""
        self._router = router
        self._peers = peers
        self._channels = channels
        self._totals = totals
        self._queue: frontend_pb2.QueueStats | None = None
        self._tasks = OwnedTasks()

    def start(self) -> None:
        """Begin to ask the queue."""
        self._tasks.start(self._follow_queue(), name="topology-queue")

    async def aclose(self) -> None:
        """Ask no more."""
        await self._tasks.aclose()

    def now(self) -> frontend_pb2.Topology:
        """Return the mesh; the queue's counts are at most half a second old."""
        workers = self._router.workers()
        return frontend_pb2.Topology(
            workers=[_worker(snapshot) for snapshot in workers],
            queue=self._queue,
            counters=self._totals().to_proto(reservations=sum(worker.reservations for worker in workers)),
            policy=self._router.policy_name,
        )

    async def refreshed(self) -> frontend_pb2.Topology:
        """Return the mesh with the queue's counts as they are now."""
        await self._ask_queue()
        return self.now()

    async def _follow_queue(self) -> None:
        while True:
            await self._ask_queue()
            await asyncio.sleep(_QUEUE_INTERVAL_S)

    async def _ask_queue(self) -> None:
        address = self._peers.queue_address()
        if address is None:
            self._queue = None
            return
        stub = prefill_queue_pb2_grpc.PrefillQueueStub(self._channels.get(address))
        try:
            answer = await stub.GetStats(prefill_queue_pb2.GetStatsRequest(), timeout=_QUEUE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            self._queue = None  # shown as what it is: unknown
        else:
            self._queue = answer.stats


def _worker(snapshot: WorkerSnapshot) -> frontend_pb2.TopologyWorker:
    record, report = snapshot.record, snapshot.report
    worker = frontend_pb2.TopologyWorker(
        id=record.worker_id,
        node=record.worker_id.split("/", 1)[0],
        role=record.role.value,
        epoch=record.epoch,
        state=_state(snapshot),
        total_blocks=record.total_blocks,
        address=record.address,
    )
    if report is not None:
        worker.active_requests = report.active_requests
        worker.active_blocks = report.active_blocks
        worker.waiting_requests = report.waiting_requests
        worker.prefix_hit_rate = report.prefix_hit_rate
    return worker


def _state(snapshot: WorkerSnapshot) -> frontend_pb2.WorkerState.ValueType:
    if snapshot.record.draining:
        return frontend_pb2.WORKER_STATE_DRAINING
    return frontend_pb2.WORKER_STATE_SUSPECT if snapshot.is_stale else frontend_pb2.WORKER_STATE_READY
