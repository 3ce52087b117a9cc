"""One rank's cache, mirrored in the router's index from the messages of WatchKvEvents.

    snapshot part -> [more parts] -> complete -> deltas after it -> ...

Laws:
    - the position moves only with what is wholly in the index, so a stream that breaks anywhere goes on from there;
    - where the index cannot be vouched for (a gap, an event that does not fit, requests that did not find what was
      predicted), the rank is degraded, so routed by load alone, until a whole snapshot has come: not by its first part,
      after which the stream may break. Blocks for which the index has no room are no such case: it then says too
      little, and never too much;
    - the first recovery is at once, the next one not within `resync_s` of it: events churn, and a snapshot is dear. A
      mirror is of one incarnation, so a restarted worker is read at once.
"""

from collections.abc import Callable, Sequence
from typing import cast

from kvmesh import telemetry
from kvmesh.core.errors import MeshError
from kvmesh.core.ids import Epoch, LocalHash, WorkerRank
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent
from kvmesh.core.prefix_records import StoreResult
from kvmesh.core.routing import RoutingCore
from kvmesh.core.truth_check import TruthCheck
from kvmesh.v1 import worker_events_pb2
from kvmesh.wire.worker_events import kv_event_from_proto

log = telemetry.logger(__name__)

RESYNC_S = 30.0
"""A cache whose events do not fit the index is recovered at most this often."""

_Message = worker_events_pb2.WatchKvEventsResponse
_CAUSES = {
    worker_events_pb2.SNAPSHOT_CAUSE_FELL_BEHIND: "fell_behind",
    worker_events_pb2.SNAPSHOT_CAUSE_BEYOND_NEWEST: "beyond_newest",
    worker_events_pb2.SNAPSHOT_CAUSE_OTHER_EPOCH: "other_epoch",
}


class CacheMirror:
    """Applies one rank's events to the index, in order."""

    def __init__(
        self,
        core: RoutingCore,
        worker: WorkerRank,
        epoch: Epoch,
        *,
        block_size: int,
        truth: TruthCheck | None = None,
        resync_s: float = RESYNC_S,
    ) -> None:
        """Mirror a rank of which nothing is known yet; `truth` hears of removals and of every new beginning."""
        self.worker = worker
        self.position: int | None = None
        """Everything up to here is in the index; None: a snapshot is needed."""
        self.open_from = float("-inf")
        """The stream is not to be opened before this."""
        self.on_drift: Callable[[], None] | None = None
        """Ends the open stream; set by whoever reads it."""
        self._core = core
        self._epoch = epoch
        self._block_size = block_size
        self._truth = truth if truth is not None else TruthCheck()
        self._resync_s = resync_s
        self._next_recovery = float("-inf")
        self._is_in_snapshot = False
        self._is_degraded = False

    def apply(self, message: _Message, *, now: float) -> bool:
        """Take one message in; False: the stream must be opened anew, from `position`, not before `open_from`."""
        telemetry.KV_EVENTS.inc()
        if message.HasField("waited"):
            telemetry.KV_EVENT_LAG.observe(message.waited.ToTimedelta().total_seconds())
        if message.snapshot:
            return self._apply_snapshot(message, now=now)
        if self.position is None or message.sequence <= self.position:
            return False
        if message.HasField("after_sequence") and message.after_sequence != self.position:
            self._recover("missed", now=now)
            return False
        return self._apply_events(message, now=now)

    def interrupt(self) -> None:
        """Note that the stream ended: the rest of a snapshot under way will not come."""
        self._is_in_snapshot = False

    def drifted(self, *, now: float) -> None:
        """Hear that the index is wrong about this rank: read the cache anew, unless that is under way."""
        if self._is_degraded or self._is_in_snapshot:
            return
        self._recover("drift", now=now)
        if self.on_drift is not None:
            self.on_drift()

    def close(self) -> None:
        """Stop counting as degraded: nobody reads this rank any more. Idempotent."""
        self._set_degraded(False)

    def _apply_snapshot(self, message: _Message, *, now: float) -> bool:
        """Replace what is known of the rank: the first part empties the index, the last one sets the position."""
        if not self._is_in_snapshot:
            if self.position is not None and not self._recover(_cause_of(message), now=now):
                return False
            self._is_in_snapshot = True
            self.position = None
            telemetry.KV_SNAPSHOTS.inc()
            self._core.reset_worker_index(self.worker, self._epoch, now=now)
            self._truth.reset(self.worker)
            self._degrade()
        return self._apply_events(message, now=now)

    def _apply_events(self, message: _Message, *, now: float) -> bool:
        fits = [self._apply(event, now=now) for event in message.events]
        if not all(fits):
            self._recover("unknown_parent", now=now)
            return False
        if not message.snapshot or message.snapshot_complete:
            self._is_in_snapshot = False
            self.position = message.sequence
        if message.snapshot_complete:
            self._core.trust_worker_index(self.worker, self._epoch)
            self._set_degraded(False)
        return True

    def _recover(self, cause: str, *, now: float) -> bool:
        """Ask for a snapshot; until it comes the rank is degraded. False: not now, the last one is not long ago."""
        telemetry.INDEX_GAPS.labels(cause=cause).inc()
        self.position = None
        self._is_in_snapshot = False
        self._degrade()
        self.open_from = max(now, self._next_recovery)
        self._next_recovery = self.open_from + self._resync_s
        wait_s = self.open_from - now
        log.warning(
            "index.degraded",
            worker_id=self.worker.worker_id,
            rank=self.worker.rank,
            cause=cause,
            wait_s=round(wait_s, 3),
        )
        return wait_s <= 0

    def _degrade(self) -> None:
        self._core.degrade_worker_index(self.worker, self._epoch)
        self._set_degraded(True)

    def _set_degraded(self, is_degraded: bool) -> None:
        if is_degraded is not self._is_degraded:
            self._is_degraded = is_degraded
            telemetry.INDEX_DEGRADED.inc(1 if is_degraded else -1)

    def _apply(self, proto: worker_events_pb2.KvEvent, *, now: float) -> bool:
        """Take one change in; False if the index lacks what it builds on, which a snapshot would bring."""
        try:
            event = kv_event_from_proto(proto, block_size=self._block_size)
        except MeshError:
            _refused("invalid")
            return True
        return self._apply_known(event, now=now)

    def _apply_known(self, event: KvEvent | None, *, now: float) -> bool:
        match event:
            case BlocksStored():
                return self._store(event, now=now)
            case BlocksRemoved(block_hashes):
                self._core.apply_kv_removed(self.worker, self._epoch, block_hashes=block_hashes, now=now)
                self._truth.removed(self.worker, block_hashes)
            case CacheCleared():
                self._core.apply_kv_cleared(self.worker, self._epoch, now=now)
                self._truth.removed(self.worker, None)
            case None:
                _refused("unknown_kind")
        return True

    def _store(self, event: BlocksStored, *, now: float) -> bool:
        local_hashes = cast("Sequence[LocalHash]", event.local_hashes)
        outcome = self._core.apply_kv_stored(
            self.worker,
            self._epoch,
            parent=event.parent,
            block_hashes=event.block_hashes,
            local_hashes=local_hashes or None,
            now=now,
        )
        if outcome is None or outcome.result is StoreResult.STORED:
            return True
        _refused(outcome.result.value)
        return outcome.result is not StoreResult.UNKNOWN_PARENT


def _cause_of(message: _Message) -> str:
    """Return why a worker could not go on from the position that it was asked for."""
    return _CAUSES.get(message.snapshot_cause, "unspecified")


def _refused(reason: str) -> None:
    telemetry.KV_EVENTS_REFUSED.labels(reason=reason).inc()
