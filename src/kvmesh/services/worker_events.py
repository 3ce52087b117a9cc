"""WorkerEvents: what one worker says of its load and its cache to every router that asks.

A watcher has no queue of its own: after each send it looks at what is newest, so a slow one costs nothing and, once it
is behind the ring, gets a snapshot. Between two sends to it batches merge into one message.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from kvmesh.core.ids import Epoch, SequenceHash, WorkerId
from kvmesh.core.kv_events import KvEvent
from kvmesh.core.kv_history import KvBatch, KvHistory, merge
from kvmesh.engines.engine import EngineLoad
from kvmesh.services.signal import Signal
from kvmesh.v1 import worker_events_pb2, worker_events_pb2_grpc
from kvmesh.wire import validation
from kvmesh.wire.worker_events import kv_event_to_proto

if TYPE_CHECKING:
    from kvmesh.v1.worker_events_pb2_grpc import _ServicerContext as Context

DEFAULT_MIN_INTERVAL_S = 0.01
LOAD_HEARTBEAT_S = 1.0
"""A load is sent at least this often, changed or not."""
_MAX_INTERVAL_S = 60.0
_SETTLE_S = 0.001
"""How long KV events wait at first: the token of the step that stored the blocks goes before them."""

KvMessage = worker_events_pb2.WatchKvEventsResponse
LoadMessage = worker_events_pb2.WatchLoadResponse
Cause: TypeAlias = worker_events_pb2.SnapshotCause.ValueType
_FELL_BEHIND = worker_events_pb2.SNAPSHOT_CAUSE_FELL_BEHIND
_BEYOND_NEWEST = worker_events_pb2.SNAPSHOT_CAUSE_BEYOND_NEWEST


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """Load of one data-parallel rank."""

    rank: int = 0
    load: EngineLoad = EngineLoad()
    shares: Sequence[worker_events_pb2.RouterShare] = ()
    """The same load by the router that sent it; router_id "" = unrouted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadView:
    """A worker's load as it is now, for one router."""

    draining: bool = False
    ranks: tuple[RankView, ...] = (RankView(),)
    reservation_ids: Sequence[int] = ()
    """Live reservations of the asking router."""


class WorkerEvents(worker_events_pb2_grpc.WorkerEventsServicer):
    """The servicer of one worker; `publish_kv` and `load_changed` are called on the event loop."""

    def __init__(
        self,
        *,
        worker_id: WorkerId,
        epoch: Epoch,
        block_size: int,
        load_source: Callable[[str], LoadView],
        ring_size: int = 1024,
        ranks: int = 1,
    ) -> None:
        """Serve `ranks` caches; `load_source` returns the current load as the router of that id is to see it."""
        self._worker_id = worker_id
        self._epoch = epoch
        self._block_size = block_size
        self._load_source = load_source
        self._histories = [KvHistory(ring_size=ring_size) for _ in range(ranks)]
        self._kv_changed = Signal()
        self._kv_settling: asyncio.TimerHandle | None = None
        """When the watchers hear of what was published last."""
        self._load_changed = Signal()
        self._load_sequence = 1
        self._closing = asyncio.Event()

    @property
    def load_sequence(self) -> int:
        """Number of the newest load; a report with a higher one shows everything that was true when this was read."""
        return self._load_sequence

    def cached_blocks(self, rank: int = 0) -> frozenset[SequenceHash]:
        """Return the blocks that a subscriber who missed nothing knows of; O(blocks), for tests and tools."""
        return self._histories[rank].blocks

    def publish_kv(self, events: Sequence[KvEvent], *, rank: int = 0) -> None:
        """Tell the watchers what happened to one rank's cache; O(blocks of the events)."""
        if events:
            self._histories[rank].publish(events, now=asyncio.get_running_loop().time())
            if self._kv_settling is None:
                self._kv_settling = asyncio.get_running_loop().call_later(_SETTLE_S, self._kv_settled)

    def _kv_settled(self) -> None:
        self._kv_settling = None
        self._kv_changed.fire()

    def load_changed(self) -> None:
        """Tell the watchers that the load is another now; O(1)."""
        self._load_sequence += 1
        self._load_changed.fire()

    def close(self) -> None:
        """End every watch, so that the server can stop. Idempotent."""
        self._closing.set()
        if self._kv_settling is not None:
            self._kv_settling.cancel()
        self._kv_changed.fire()
        self._load_changed.fire()

    async def WatchLoad(
        self, request: worker_events_pb2.WatchLoadRequest, context: "Context"
    ) -> AsyncIterator[LoadMessage]:
        """See WorkerEvents.WatchLoad."""
        interval_s = min(_min_interval_s(request), LOAD_HEARTBEAT_S)
        now = asyncio.get_running_loop().time
        while not self._closing.is_set():
            sent_at, sequence = now(), self._load_sequence
            yield self._load_message(request.router_id)
            if sequence == self._load_sequence:
                await self._load_changed.wait(sent_at + LOAD_HEARTBEAT_S)
            if sequence == self._load_sequence:
                self._load_sequence += 1  # a repetition is newer than what it repeats, else it could not freshen it
            await self._pass_until(sent_at + interval_s)

    async def WatchKvEvents(
        self, request: worker_events_pb2.WatchKvEventsRequest, context: "Context"
    ) -> AsyncIterator[KvMessage]:
        """See WorkerEvents.WatchKvEvents."""
        if request.rank >= len(self._histories):
            raise validation.invalid("rank", f"{request.rank} is out of range: 0 to {len(self._histories) - 1}")
        end = _end_of(request)
        interval_s = _min_interval_s(request)
        history = self._histories[request.rank]
        position, cause = self._start_of(request)
        now = asyncio.get_running_loop().time
        while not self._closing.is_set() and (position is None or end is None or position < end):
            batches = history.since(position) if position is not None else None
            if batches == ():
                await self._kv_changed.wait()
                continue
            sent_at = now()
            if batches is None:
                if position is not None:
                    cause = _FELL_BEHIND if position < history.sequence else _BEYOND_NEWEST
                position = history.sequence
                for message in self._snapshot(history, request.rank, cause=cause):
                    yield message
            else:
                for batch in merge(batch for batch in batches if end is None or batch.sequence <= end):
                    yield self._delta(request.rank, batch, after=position, now=now())
                    position = batch.sequence
            await self._pass_until(sent_at + interval_s)

    def _start_of(self, request: worker_events_pb2.WatchKvEventsRequest) -> tuple[int | None, Cause]:
        """Return the position from which deltas are asked for, or None and why there can be none."""
        if not request.HasField("from_sequence"):
            return None, worker_events_pb2.SNAPSHOT_CAUSE_NO_POSITION
        if request.epoch != self._epoch:
            return None, worker_events_pb2.SNAPSHOT_CAUSE_OTHER_EPOCH
        return request.from_sequence, worker_events_pb2.SNAPSHOT_CAUSE_UNSPECIFIED

    def _snapshot(self, history: KvHistory, rank: int, *, cause: Cause) -> Iterable[KvMessage]:
        """Return the parts of a snapshot; the cache is copied now, the parts are made as they are sent."""
        sequence = history.sequence
        parts = history.snapshot()

        def messages() -> Iterable[KvMessage]:
            message: KvMessage | None = None
            for events in parts:
                if message is not None:
                    yield message
                message = self._kv_message(rank, sequence, events)
                message.snapshot = True
                message.snapshot_cause = cause
            if message is not None:
                message.snapshot_complete = True
                yield message

        return messages()

    def _delta(self, rank: int, batch: KvBatch, *, after: int | None, now: float) -> KvMessage:
        message = self._kv_message(rank, batch.sequence, batch.events)
        if after is not None:
            message.after_sequence = after
        message.waited.CopyFrom(validation.duration(max(now - batch.published_at, 0.0)))
        return message

    def _kv_message(self, rank: int, sequence: int, events: Iterable[KvEvent]) -> KvMessage:
        return KvMessage(
            worker_id=self._worker_id,
            epoch=self._epoch,
            rank=rank,
            sequence=sequence,
            events=[kv_event_to_proto(event, block_size=self._block_size) for event in events],
        )

    def _load_message(self, router_id: str) -> LoadMessage:
        view = self._load_source(router_id)
        return LoadMessage(
            worker_id=self._worker_id,
            epoch=self._epoch,
            sequence=self._load_sequence,
            ranks=[_rank_to_proto(rank) for rank in view.ranks],
            reservation_ids=view.reservation_ids,
            draining=view.draining,
        )

    async def _pass_until(self, when: float) -> None:
        """Let the interval between two sends pass, or return at once when closing."""
        if when <= asyncio.get_running_loop().time():
            return
        try:
            async with asyncio.timeout_at(when):
                await self._closing.wait()
        except TimeoutError:
            return


def _min_interval_s(request: worker_events_pb2.WatchLoadRequest | worker_events_pb2.WatchKvEventsRequest) -> float:
    if not request.HasField("min_interval"):
        return DEFAULT_MIN_INTERVAL_S
    return validation.seconds(request.min_interval, path="min_interval", high=_MAX_INTERVAL_S)


def _end_of(request: worker_events_pb2.WatchKvEventsRequest) -> int | None:
    if not request.HasField("to_sequence"):
        return None
    if request.HasField("from_sequence") and request.to_sequence < request.from_sequence:
        raise validation.invalid("to_sequence", f"{request.to_sequence} is before {request.from_sequence}")
    return request.to_sequence


def _rank_to_proto(view: RankView) -> worker_events_pb2.RankLoad:
    load = view.load
    return worker_events_pb2.RankLoad(
        rank=view.rank,
        active_requests=load.active_requests,
        max_requests=load.max_requests,
        active_blocks=load.active_blocks,
        total_blocks=load.total_blocks,
        waiting_requests=load.waiting_requests,
        cache_usage=load.cache_usage,
        prefix_hit_rate=load.prefix_hit_rate,
        shares=view.shares,
    )
