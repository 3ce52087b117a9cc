"""A router's subscriptions to one worker: its load, and what each of its ranks has cached.

A stream that breaks is opened again where it ended, for as long as its worker is followed. It never stands in the way
of routing: meanwhile the router goes by what it knows, and a load that is not repeated becomes stale by itself. The
watches have no deadline; the keepalive of their channel ends them when the worker is gone without a word.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import grpc

from kvmesh import telemetry
from kvmesh.core.ids import RouterId, WorkerRank
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore
from kvmesh.core.truth_check import TruthCheck
from kvmesh.services.cache_mirror import RESYNC_S, CacheMirror
from kvmesh.v1 import worker_events_pb2, worker_events_pb2_grpc
from kvmesh.wire.validation import duration
from kvmesh.wire.worker_events import load_reports_from_proto

log = telemetry.logger(__name__)

_MIN_INTERVAL_S = 0.01
_INTERVAL_PER_WORKER_S = 0.0002
_LOAD_INTERVALS = 5
"""Loads may come so much more rarely than KV events: between two of them the router knows what it booked itself."""
_RETRY_S = (0.1, 2.0)


def min_interval_s(worker_count: int) -> float:
    """Return how often one worker may send: from 50 workers on, all together send 5,000 messages a second."""
    return max(_MIN_INTERVAL_S, worker_count * _INTERVAL_PER_WORKER_S)


class WorkerSubscription:
    """Takes in what one incarnation of a worker says; its owner runs `streams` while it follows the worker."""

    def __init__(
        self,
        record: WorkerRecord,
        *,
        core: RoutingCore,
        channel: grpc.aio.Channel,
        router_id: RouterId,
        interval_s: Callable[[], float],
        on_draining: Callable[[bool], None],
        on_news: Callable[[], None],
        truth: TruthCheck | None = None,
        resync_s: float = RESYNC_S,
        follows_cache: bool = True,
    ) -> None:
        """Feed `core`; `on_draining` hears with every load whether the worker drains, `on_news` of every message.

        `truth` hears what becomes of predictions; a cache is recovered at most every `resync_s`, if it is followed.
        """
        self._record = record
        self._mirrors = [
            CacheMirror(core, worker, record.epoch, block_size=record.block_size, truth=truth, resync_s=resync_s)
            for worker in (record.worker_ranks if follows_cache else ())
        ]
        self._core = core
        self._stub = worker_events_pb2_grpc.WorkerEventsStub(channel)
        self._router_id = router_id
        self._interval_s = interval_s
        self._on_draining = on_draining
        self._on_news = on_news

    def streams(self) -> list[Coroutine[Any, Any, None]]:
        """Return the work of every stream; each runs until it is cancelled."""
        return [
            self._keep_open("load", self._watch_load),
            *(self._mirror_cache(mirror) for mirror in self._mirrors),
        ]

    def drifted(self, rank: int) -> None:
        """Read one rank's cache anew: what the index says of it has proved wrong."""
        self._mirrors[rank].drifted(now=asyncio.get_running_loop().time())

    async def _keep_open(self, stream: str, watch: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        shortest_s, longest_s = _RETRY_S
        delay_s = shortest_s
        while True:
            opened_at = loop.time()
            why = "ended"
            try:
                await watch()
            except grpc.aio.AioRpcError as exc:
                why = exc.code().name
            log.info("subscription.broken", worker_id=self._record.worker_id, stream=stream, why=why)
            if loop.time() - opened_at > longest_s:
                delay_s = shortest_s
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # jitter of a retry, no secret
            delay_s = min(delay_s * 2, longest_s)

    async def _watch_load(self) -> None:
        request = worker_events_pb2.WatchLoadRequest(
            router_id=self._router_id, min_interval=duration(_LOAD_INTERVALS * self._interval_s())
        )
        call = self._stub.WatchLoad(request, wait_for_ready=True)
        try:
            async for message in call:
                if not self._is_of_the_followed(message):
                    return
                now = asyncio.get_running_loop().time()
                for rank, report in load_reports_from_proto(message, received_at=now).items():
                    self._core.apply_load(WorkerRank(self._record.worker_id, rank), report, now=now)
                self._on_draining(message.draining)
                self._on_news()
        finally:
            call.cancel()

    async def _mirror_cache(self, mirror: CacheMirror) -> None:
        try:
            await self._keep_open("kv_events", partial(self._watch_kv_events, mirror))
        finally:
            mirror.close()

    async def _watch_kv_events(self, mirror: CacheMirror) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(mirror.open_from - loop.time())  # a bound on how often, see the mirror
        request = worker_events_pb2.WatchKvEventsRequest(
            epoch=self._record.epoch, rank=mirror.worker.rank, min_interval=duration(self._interval_s())
        )
        if mirror.position is not None:
            request.from_sequence = mirror.position
        call = self._stub.WatchKvEvents(request, wait_for_ready=True)
        try:
            async with asyncio.timeout(None) as reading:
                mirror.on_drift = lambda: reading.reschedule(loop.time())
                async for message in call:
                    is_good = self._is_of_the_followed(message) and mirror.apply(message, now=loop.time())
                    self._on_news()
                    if not is_good:
                        return
        except TimeoutError:
            return  # the mirror wants it read anew
        finally:
            mirror.on_drift = None
            mirror.interrupt()
            call.cancel()

    def _is_of_the_followed(
        self, message: worker_events_pb2.WatchLoadResponse | worker_events_pb2.WatchKvEventsResponse
    ) -> bool:
        """False: another incarnation has this address now, and discovery will say so."""
        return message.worker_id == self._record.worker_id and message.epoch == self._record.epoch
