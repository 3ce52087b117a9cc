"""What one watch of a namespace knows, and the events that changes of the store become. Pure: no I/O.

Laws:
    - one revision is one update: what a transaction changed of a worker is told as its outcome, never in between;
    - of several incarnations under one worker_id, the highest epoch is the worker;
    - a record marked as stopped is gone from then on; the delete that follows says nothing new.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from kvmesh import telemetry
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord
from kvmesh.discovery.discovery import Deleted, DiscoveryEvent, Put, Snapshot
from kvmesh.discovery.etcd_records import MalformedRecordError, decode
from kvmesh.etcd.v1 import etcd_pb2

log = telemetry.logger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """A key below the namespace as the store had it, whoever put it."""

    key: bytes
    mod_revision: int
    lease_id: int


@dataclass(slots=True)
class _Changes:
    """What one revision did, by worker."""

    before: dict[WorkerId, WorkerRecord | None] = field(default_factory=dict)
    stopped: set[tuple[WorkerId, Epoch]] = field(default_factory=set)


class RecordView:
    """The live records of one namespace."""

    def __init__(self) -> None:
        """Start empty."""
        self._standing: dict[bytes, Standing] = {}
        self._by_key: dict[bytes, WorkerRecord] = {}
        self._by_worker: dict[WorkerId, dict[Epoch, WorkerRecord]] = {}

    def reset(self, kvs: Iterable[etcd_pb2.KeyValue]) -> Snapshot:
        """Forget everything, take in a listing, and return it."""
        self._standing.clear()
        self._by_key.clear()
        self._by_worker.clear()
        for kv in kvs:
            self._put(kv, _Changes())
        live = ((worker_id, self._live(worker_id)) for worker_id in sorted(self._by_worker))
        return Snapshot(tuple(record for _, record in live if record is not None))

    def apply(self, events: Iterable[etcd_pb2.Event]) -> list[DiscoveryEvent]:
        """Take in changes, ordered by revision, and return what they mean."""
        news: list[DiscoveryEvent] = []
        for _, of_revision in groupby(events, key=lambda event: event.kv.mod_revision):
            changes = _Changes()
            for event in of_revision:
                if event.is_delete:
                    self._standing.pop(event.kv.key, None)
                    self._retire(event.kv.key, changes)
                else:
                    self._put(event.kv, changes)
            for worker_id, before in changes.before.items():
                news += self._told(worker_id, before, changes)
        return news

    def witness(self) -> Standing | None:
        """Return a key that a store with this view's history must have had at its revision; None if there is none.

        One under a lease if possible: etcd never gives the same lease id twice, not even from an empty store.
        """
        return max(self._standing.values(), key=lambda standing: standing.lease_id, default=None)

    def _put(self, kv: etcd_pb2.KeyValue, changes: _Changes) -> None:
        self._standing[kv.key] = Standing(kv.key, kv.mod_revision, kv.lease_id)
        try:
            record, is_stopped = decode(kv.value)
        except MalformedRecordError as exc:
            log.warning("discovery.record_malformed", key=kv.key.decode(errors="replace"), error=str(exc))
            return  # what stood there before, if anything, is still the last that its worker said
        if is_stopped:
            changes.stopped.add((record.worker_id, record.epoch))
            self._retire(kv.key, changes)
            return
        changes.before.setdefault(record.worker_id, self._live(record.worker_id))
        self._by_key[kv.key] = record
        self._by_worker.setdefault(record.worker_id, {})[record.epoch] = record

    def _retire(self, key: bytes, changes: _Changes) -> None:
        record = self._by_key.pop(key, None)
        if record is None:
            return
        changes.before.setdefault(record.worker_id, self._live(record.worker_id))
        epochs = self._by_worker[record.worker_id]
        epochs.pop(record.epoch, None)
        if not epochs:
            del self._by_worker[record.worker_id]

    def _live(self, worker_id: WorkerId) -> WorkerRecord | None:
        epochs = self._by_worker.get(worker_id)
        return epochs[max(epochs)] if epochs else None

    def _told(self, worker_id: WorkerId, before: WorkerRecord | None, changes: _Changes) -> Iterable[DiscoveryEvent]:
        live = self._live(worker_id)
        if before is not None and (live is None or live.epoch < before.epoch):
            yield Deleted(worker_id, before.epoch, graceful=(worker_id, before.epoch) in changes.stopped)
        if live is not None and live != before:
            yield Put(live)
