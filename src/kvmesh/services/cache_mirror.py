"""One rank's cache, mirrored in the router's index from the messages of WatchKvEvents.

    snapshot part -> [more parts] -> complete -> deltas after it -> ...

The position moves only with what is wholly in the index, so a stream that breaks anywhere goes on from there.
"""

from kvmesh import telemetry
from kvmesh.core.errors import MeshError
from kvmesh.core.ids import Epoch, WorkerRank
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent
from kvmesh.core.prefix_records import StoreResult
from kvmesh.core.routing import RoutingCore
from kvmesh.v1 import worker_events_pb2
from kvmesh.wire.worker_events import kv_event_from_proto

log = telemetry.logger(__name__)

RESYNC_S = 30.0
"""A cache whose events do not fit the index is asked for as a whole, at most this often."""


class CacheMirror:
    """Applies one rank's events to the index, in order."""

    def __init__(self, core: RoutingCore, worker: WorkerRank, epoch: Epoch, *, block_size: int) -> None:
        """Mirror a rank of which nothing is known yet."""
        self.worker = worker
        self.position: int | None = None
        """Everything up to here is in the index; None: a snapshot is needed."""
        self._core = core
        self._epoch = epoch
        self._block_size = block_size
        self._is_in_snapshot = False
        self._resync_from = float("-inf")

    def apply(self, message: worker_events_pb2.WatchKvEventsResponse, *, now: float) -> bool:
        """Take one message in; False: the stream must be opened anew, from `position`."""
        telemetry.KV_EVENTS.inc()
        if message.snapshot:
            self._enter_snapshot(now=now)
        elif self.position is None or message.sequence <= self.position:
            return False
        fits = [self._apply(event, now=now) for event in message.events]
        if message.snapshot and not message.snapshot_complete:
            return True
        self._is_in_snapshot = False
        self.position = message.sequence
        if all(fits) or now < self._resync_from:
            return True
        log.warning("index.resync", worker_id=self.worker.worker_id, rank=self.worker.rank)
        self._resync_from = now + RESYNC_S
        self.position = None
        return False

    def interrupt(self) -> None:
        """Note that the stream ended: the rest of a snapshot under way will not come."""
        self._is_in_snapshot = False

    def _enter_snapshot(self, *, now: float) -> None:
        """Forget the rank's blocks when the first part comes."""
        if self._is_in_snapshot:
            return
        self._is_in_snapshot = True
        self.position = None
        telemetry.KV_SNAPSHOTS.inc()
        self._core.reset_worker_index(self.worker, self._epoch, now=now)

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
            case BlocksStored(parent, block_hashes):
                outcome = self._core.apply_kv_stored(
                    self.worker, self._epoch, parent=parent, block_hashes=block_hashes, now=now
                )
                if outcome is None or outcome.result is StoreResult.STORED:
                    return True
                _refused(outcome.result.value)
                return outcome.result is not StoreResult.UNKNOWN_PARENT
            case BlocksRemoved(block_hashes):
                self._core.apply_kv_removed(self.worker, self._epoch, block_hashes=block_hashes, now=now)
            case CacheCleared():
                self._core.apply_kv_cleared(self.worker, self._epoch, now=now)
            case None:
                _refused("unknown_kind")
        return True


def _refused(reason: str) -> None:
    telemetry.KV_EVENTS_REFUSED.labels(reason=reason).inc()
