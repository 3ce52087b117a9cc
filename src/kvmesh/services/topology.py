"""The mesh as one frontend sees it: workers as the router knows them, the queue's counts, the processors' totals."""

import asyncio
from collections.abc import Iterable, Sequence

import grpc

from kvmesh.core.latencies import WINDOW_S, quantile
from kvmesh.services.channels import Channels
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.queue_locator import QueueLocator
from kvmesh.services.router_views import RouterView
from kvmesh.services.totals_views import TotalsView
from kvmesh.v1 import frontend_pb2, prefill_queue_pb2, prefill_queue_pb2_grpc, processor_pb2
from kvmesh.wire.validation import duration

_INTERVAL_S = 0.5
_QUEUE_TIMEOUT_S = 1.0


class TopologyView:
    """Answers at once from what it follows; what is asked of others is asked on a timer, or by `refreshed`."""

    def __init__(self, *, router: RouterView, totals: TotalsView, peers: Peers, channels: Channels) -> None:
        """Look at `router` and `totals`; ask the queue that `peers` names from `start` on."""
        self._router = router
        self._totals = totals
        self._queues = QueueLocator(peers=peers, channels=channels)
        self._channels = channels
        self._queue: frontend_pb2.QueueStats | None = None
        self._is_queue_silent = False
        """It was asked and did not answer; False while none is known."""
        self._tasks = OwnedTasks()

    def start(self) -> None:
        """Begin to ask."""
        self._tasks.start(self._follow(), name="topology")

    async def aclose(self) -> None:
        """Ask no more."""
        await self._tasks.aclose()

    def now(self) -> frontend_pb2.Topology:
        """Return the mesh; what others were asked is at most about half a second old."""
        sight = self._router.now()
        counters = self._totals.now()
        counters.reservations = sight.reservations
        return frontend_pb2.Topology(
            workers=sight.workers,
            queue=self._queue,
            counters=counters,
            policy=sight.policy,
            index=sight.index,
            latencies=_latencies(self._totals.latencies()),
            router_silent=sight.is_silent,
            queue_silent=self._is_queue_silent,
        )

    async def refreshed(self) -> frontend_pb2.Topology:
        """Return the mesh as it is now."""
        await self._ask()
        return self.now()

    async def _follow(self) -> None:
        while True:
            await self._ask()
            await asyncio.sleep(_INTERVAL_S)

    async def _ask(self) -> None:
        await asyncio.gather(self._ask_queue(), self._router.refresh(), self._totals.refresh())

    async def _ask_queue(self) -> None:
        address = self._queues.address()
        if address is None:
            self._queue, self._is_queue_silent = None, False
            return
        stub = prefill_queue_pb2_grpc.PrefillQueueStub(self._channels.get(address))
        try:
            answer = await stub.GetStats(prefill_queue_pb2.GetStatsRequest(), timeout=_QUEUE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            self._queue, self._is_queue_silent = None, True
        else:
            self._queue, self._is_queue_silent = answer.stats, False


def _latencies(samples: Sequence[processor_pb2.LatencySamples]) -> frontend_pb2.TopologyLatencies:
    return frontend_pb2.TopologyLatencies(
        window=duration(WINDOW_S),
        time_to_first_token=_quantiles(time_s for one in samples for time_s in one.times_to_first_token_s),
        inter_token_time=_quantiles(time_s for one in samples for time_s in one.inter_token_times_s),
    )


def _quantiles(times_s: Iterable[float]) -> frontend_pb2.LatencyQuantiles:
    ordered = sorted(times_s)
    if not ordered:
        return frontend_pb2.LatencyQuantiles()
    return frontend_pb2.LatencyQuantiles(
        requests=len(ordered),
        p50=duration(quantile(ordered, 0.5)),
        p90=duration(quantile(ordered, 0.9)),
        p99=duration(quantile(ordered, 0.99)),
    )
