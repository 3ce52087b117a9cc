"""The workers that a router follows: discovery says who is there, each worker itself says how it is.

    unknown -- Put --> followed -- Deleted, graceful --> gone
                       followed -- Deleted otherwise, or missing in a new snapshot --> suspect
                       suspect -- Put --> followed
                       suspect -- its health is not SERVING, or no answer --> gone
                       any -- Put of a higher epoch --> followed anew: nothing of the old incarnation counts

So neither an outage of the store nor a storm of deletions empties the router.
"""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from kvmesh import telemetry
from kvmesh.core.ids import AttemptKey, RouterId, WorkerId, WorkerRank
from kvmesh.core.reservations import Reservation
from kvmesh.core.roster import RosterOutcome, WorkerRecord
from kvmesh.core.routing import RoutingCore
from kvmesh.core.truth_check import TruthRules
from kvmesh.core.worker_views import WorkerChange
from kvmesh.discovery.discovery import Deleted, Discovery, DiscoveryEvent, Put, Snapshot
from kvmesh.services.cache_mirror import RESYNC_S
from kvmesh.services.channels import Channels
from kvmesh.services.index_truth import IndexTruth
from kvmesh.services.local_calls import LocalServers
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.router_subscriptions import WorkerSubscription, min_interval_s
from kvmesh.services.signal import Signal
from kvmesh.services.suspects import Suspects

log = telemetry.logger(__name__)


@dataclass(slots=True, eq=False)
class _Member:
    """One followed incarnation."""

    record: WorkerRecord
    """As discovery has it."""
    is_draining: bool = False
    """As it says itself, which is sooner."""
    subscription: WorkerSubscription | None = None
    streams: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def effective_record(self) -> WorkerRecord:
        return replace(self.record, draining=True) if self.is_draining else self.record

    def is_followed_like(self, record: WorkerRecord) -> bool:
        """Tell whether the streams of this member are those that `record` asks for."""
        mine = self.record
        return (mine.epoch, mine.address, mine.ranks, mine.block_size) == (
            record.epoch, record.address, record.ranks, record.block_size,
        )  # fmt: skip


class RouterWorkers:
    """Follows one namespace into the router's mind: decode and prefill workers, never the queue."""

    def __init__(
        self,
        core: RoutingCore,
        *,
        discovery: Discovery,
        namespace: str,
        router_id: RouterId,
        truth: TruthRules | None = None,
        resync_s: float = RESYNC_S,
        follows_caches: bool = True,
        local: LocalServers | None = None,
    ) -> None:
        """Follow from `start` on; a cache that proves wrong by the rules of `truth` is read anew, but not too often.

        `follows_caches` False: the index takes no events, so only the loads are asked for. `local` knows the workers of
        this process.
        """
        self.roster_changed = Signal()
        """Somebody came, went, or changed its record."""
        self.news = Signal()
        """The same, or a worker said something."""
        self._core = core
        self._discovery = discovery
        self._namespace = namespace
        self._router_id = router_id
        self._truth = IndexTruth(core, truth, event_interval_s=self._interval_s, on_drift=self._drifted)
        self._resync_s = resync_s
        self._follows_caches = follows_caches
        self._members: dict[WorkerId, _Member] = {}
        self._channels = Channels()
        self._local = local or LocalServers()
        self._tasks = OwnedTasks()
        self._suspects = Suspects(on_gone=self._lost)

    def start(self) -> None:
        """Begin to follow."""
        self._tasks.start(self._follow(), name="router-workers")

    async def aclose(self) -> None:
        """Stop following; what is known stays."""
        self._truth.close()
        await self._tasks.aclose()
        await self._suspects.aclose()
        await self._channels.aclose()

    def predicted(self, reservation: Reservation) -> None:
        """Remember what a booked request was told of its worker's cache. Idempotent; O(1)."""
        if self._follows_caches:
            self._truth.predicted(reservation)

    def found(self, key: AttemptKey, cached_tokens: int | None) -> None:
        """Compare what a request was told with the prompt tokens that its worker had cached; None: it never said."""
        self._truth.found(key, cached_tokens)

    def _drifted(self, worker: WorkerRank) -> None:
        member = self._members.get(worker.worker_id)
        if member is not None and member.subscription is not None:
            member.subscription.drifted(worker.rank)
            self.news.fire()

    def _interval_s(self) -> float:
        return min_interval_s(len(self._members))

    async def _follow(self) -> None:
        async with aclosing(self._discovery.watch(self._namespace)) as events:
            async for event in events:
                self._apply(event)
                self._roster_changed()

    def _apply(self, event: DiscoveryEvent) -> None:
        match event:
            case Snapshot(records):
                for record in records:
                    self._put(record)
                for worker_id in self._members.keys() - {record.worker_id for record in records}:
                    self._suspects.suspect(self._members[worker_id].record)
            case Put(record):
                self._put(record)
            case Deleted(worker_id, epoch, graceful):
                member = self._members.get(worker_id)
                if member is None or member.record.epoch != epoch:
                    return
                if graceful:
                    self._remove(member)
                else:
                    self._suspects.suspect(member.record)

    def _put(self, record: WorkerRecord) -> None:
        if not record.role.is_worker:
            return
        member = self._members.get(record.worker_id)
        if member is not None and member.record.epoch > record.epoch:
            log.info("worker.stale_epoch", worker_id=record.worker_id, epoch=record.epoch)
            return
        if member is not None and not member.is_followed_like(record):
            self._unfollow(member)
            member = None
        if member is None:
            member = self._members[record.worker_id] = _Member(record)
            self._subscribe(member)
        member.record = record
        self._suspects.trust(member.record.worker_id)
        self._put_in_core(member)

    def _put_in_core(self, member: _Member) -> None:
        now = asyncio.get_running_loop().time()
        change = self._core.put_worker(member.effective_record, now=now)
        if change.outcome is not RosterOutcome.UPDATED:
            record = member.record
            log.info("worker.followed", worker_id=record.worker_id, epoch=record.epoch, outcome=change.outcome.value)
        _log_fault(change)

    def _remove(self, member: _Member) -> None:
        record = member.record
        del self._members[record.worker_id]
        self._unfollow(member)
        now = asyncio.get_running_loop().time()
        _log_fault(self._core.remove_worker(record.worker_id, record.epoch, now=now))
        log.info("worker.removed", worker_id=record.worker_id, epoch=record.epoch)
        self._roster_changed()

    def _subscribe(self, member: _Member) -> None:
        record = member.record

        def note_draining(is_draining: bool) -> None:
            if member.is_draining != is_draining:
                member.is_draining = is_draining
                self._put_in_core(member)
                self._roster_changed()

        subscription = WorkerSubscription(
            record,
            core=self._core,
            channel=self._local.channel(record.address) or self._channels.get(record.address),
            router_id=self._router_id,
            interval_s=self._interval_s,
            on_draining=note_draining,
            on_news=self.news.fire,
            truth=self._truth.check,
            resync_s=self._resync_s,
            follows_cache=self._follows_caches,
        )
        member.subscription = subscription
        name = f"follow-{record.worker_id}"
        member.streams = [self._tasks.start(stream, name=name) for stream in subscription.streams()]

    def _unfollow(self, member: _Member) -> None:
        """End what runs for a member. Its channel goes last: a call sees the end of its channel as a cancellation."""
        for stream in member.streams:
            stream.cancel()
        self._truth.check.forget_worker(member.record.worker_id)
        self._suspects.trust(member.record.worker_id)
        self._tasks.start(self._drop_channel(member), name=f"unfollow-{member.record.worker_id}")

    async def _drop_channel(self, member: _Member) -> None:
        await asyncio.wait(member.streams)
        address = member.record.address
        if all(other.record.address != address for other in self._members.values()):
            await self._channels.drop(address)

    def _lost(self, record: WorkerRecord) -> None:
        member = self._members.get(record.worker_id)
        if member is not None and member.record.epoch == record.epoch:
            self._remove(member)

    def _roster_changed(self) -> None:
        self.roster_changed.fire()
        self.news.fire()


def _log_fault(change: WorkerChange) -> None:
    if change.policy_fault:
        log.warning("policy.failed", fault=change.policy_fault)
