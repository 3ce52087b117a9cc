"""What a router knows of its workers: who is there, what each has cached, what each carries.

    discovery     -> put_worker, remove_worker
    WatchKvEvents -> apply_kv_*, reset_worker_index, degrade_worker_index, trust_worker_index
    WatchLoad     -> apply_load

Laws:
    - what is said by or about an incarnation that is not the live one changes nothing, and the answer says so;
    - the end of an incarnation ends its bookings and its part of the index;
    - a worker whose load report is too old counts as saturated; if over half of a role are, the fault is ours, and
      staleness is ignored.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from kvmesh.core.candidate_columns import CandidateColumns
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.field_source import FieldSource
from kvmesh.core.ids import AttemptKey, Epoch, LocalHash, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.index_port import CacheIndex
from kvmesh.core.load_report import LoadReport, ReportOutcome, ReportResult
from kvmesh.core.load_table import LoadTable
from kvmesh.core.prefix_index import HeldBlock, IndexStats, PrefixIndex, StoreOutcome
from kvmesh.core.rank_columns import INDEX_CHANGED_AT
from kvmesh.core.roster import Roster, RosterOutcome, WorkerRecord, WorkerRole
from kvmesh.core.stage_times import StageTimes
from kvmesh.core.worker_views import PotentialLoad, WorkerChange, WorkerSnapshot

__all__ = ["PotentialLoad", "WorkerChange", "WorkerSnapshot", "WorkerStates"]

_INDEX_ROOM = 2
"""Pools of a rank that an index of events has room for: events are late, and some caches have lower tiers."""


class WorkerStates:
    """Roster, index and load table in one; not thread-safe. `now` is in seconds and never goes back."""

    def __init__(
        self,
        *,
        loads: LoadTable,
        index: CacheIndex,
        overload: OverloadRules,
        stale_after_s: float = 3.0,
        stages: StageTimes | None = None,
    ) -> None:
        """Start with no workers; `loads` and `index` are this object's from now on.

        Only a `PrefixIndex` takes events; with any other they are ignored.
        """
        self._loads = loads
        self._index = index
        self._event_index = index if isinstance(index, PrefixIndex) else None
        self._index_room = 1 if self._event_index is None else _INDEX_ROOM
        self._roster = Roster()
        self._fields = FieldSource(
            roster=self._roster,
            loads=loads,
            index=index,
            overload=overload,
            stale_after_s=stale_after_s,
            stages=stages or StageTimes(None, None),
        )
        self._indexed_blocks: Counter[WorkerRank] = Counter()

    @property
    def router_id(self) -> RouterId:
        """Under which workers report the load that this router sent them."""
        return self._loads.router_id

    def put_worker(self, record: WorkerRecord, *, now: float) -> WorkerChange:
        """Take a worker's record in; a higher epoch voids what is known of the one before, a lower one is ignored."""
        is_known = self._roster.get(record.worker_id) == record
        outcome = self._roster.put(record)
        if outcome is RosterOutcome.STALE_EPOCH:
            return WorkerChange(outcome)
        released = self._forget(record.worker_id, now=now) if outcome is RosterOutcome.RESTARTED else ()
        for worker in record.worker_ranks:
            self._loads.put_worker(worker, record.epoch, now=now)
            self._index.limit(worker, record.total_blocks * self._index_room or None)
        if not is_known:
            self._fields.forget_lineups()
        return WorkerChange(outcome, released)

    def remove_worker(self, worker_id: WorkerId, epoch: Epoch, *, now: float) -> WorkerChange:
        """Forget a worker; an epoch that is not the live one changes nothing."""
        outcome = self._roster.remove(worker_id, epoch)
        if outcome is RosterOutcome.STALE_EPOCH:
            return WorkerChange(outcome)
        return WorkerChange(outcome, self._forget(worker_id, now=now))

    def apply_kv_stored(
        self,
        worker: WorkerRank,
        epoch: Epoch,
        *,
        parent: SequenceHash | None,
        block_hashes: Sequence[SequenceHash],
        local_hashes: Sequence[LocalHash] | None = None,
        now: float,
    ) -> StoreOutcome | None:
        """Record stored blocks; None if the event is ignored, not being of the live incarnation."""
        index = self._note_kv_event(worker, epoch, now=now)
        if index is None:
            return None
        outcome = index.store(worker, parent=parent, block_hashes=block_hashes, local_hashes=local_hashes)
        self._indexed_blocks[worker] += outcome.stored
        return outcome

    def apply_kv_removed(
        self, worker: WorkerRank, epoch: Epoch, *, block_hashes: Sequence[SequenceHash], now: float
    ) -> bool:
        """Record removed blocks; False if the event is ignored, not being of the live incarnation."""
        index = self._note_kv_event(worker, epoch, now=now)
        if index is None:
            return False
        self._indexed_blocks[worker] -= index.remove(worker, block_hashes)
        return True

    def apply_kv_cleared(self, worker: WorkerRank, epoch: Epoch, *, now: float) -> bool:
        """Record that a cache is empty; False if the event is ignored, not being of the live incarnation."""
        index = self._note_kv_event(worker, epoch, now=now)
        if index is None:
            return False
        index.clear(worker)
        del self._indexed_blocks[worker]
        return True

    def reset_worker_index(self, worker: WorkerRank, epoch: Epoch, *, now: float) -> bool:
        """Empty a rank's part of the index before a snapshot, no longer degraded; False if it is not live."""
        return self.apply_kv_cleared(worker, epoch, now=now) and self.trust_worker_index(worker, epoch)

    def trust_worker_index(self, worker: WorkerRank, epoch: Epoch) -> bool:
        """Count a rank's overlap again: its snapshot is whole. False if it is not live."""
        if not self._roster.is_live(worker, epoch):
            return False
        self._fields.trust([worker])
        return True

    def degrade_worker_index(self, worker: WorkerRank, epoch: Epoch) -> bool:
        """Count a rank's overlap as 0 until its index is reset or trusted: it is incomplete. False if not live."""
        if not self._roster.is_live(worker, epoch):
            return False
        self._fields.degrade(worker)
        return True

    def apply_load(self, worker: WorkerRank, report: LoadReport, *, now: float) -> ReportResult:
        """Take a load report in; the bookings that it ends are returned."""
        if not self._roster.is_live(worker, report.epoch):
            is_known = self._roster.get(worker.worker_id) is not None
            return ReportResult(ReportOutcome.STALE_EPOCH if is_known else ReportOutcome.UNKNOWN_WORKER)
        return self._loads.apply_report(worker, report, now=now)

    def record(self, worker_id: WorkerId) -> WorkerRecord | None:
        """Return what the live incarnation of a worker says of itself, or None."""
        return self._roster.get(worker_id)

    def models(self) -> frozenset[str]:
        """Return every model that any worker serves."""
        return self._roster.models()

    def block_sizes(self, model: str, *, role: WorkerRole = WorkerRole.DECODE) -> frozenset[int]:
        """Return the block sizes for which a query for this model and role needs hashes."""
        return self._roster.block_sizes(role, model)

    def dump_index(self, worker_id: WorkerId | None = None) -> Iterator[HeldBlock]:
        """Return every (rank, block) pair that events have told of by now, parents first, or those of one worker.

        What is consumed later is still of now; see `PrefixIndex.dump`.
        """
        held = self._event_index.dump() if self._event_index is not None else iter(())
        return held if worker_id is None else (one for one in held if one.worker.worker_id == worker_id)

    @property
    def index_stats(self) -> IndexStats:
        """Return the figures of the index; O(workers)."""
        return self._index.stats

    def overlaps(self, query: RoutingQuery) -> dict[WorkerRank, int]:
        """Return the leading blocks that every rank that serves the query holds, 0 where the index is degraded.

        They are not capped: where they count as overlap, at least one token of the prompt is computed all the same.
        Raises: NotKnownError(UNKNOWN_MODEL), TryElsewhereError(NO_WORKERS).
        """
        found: dict[WorkerRank, int] = {}
        matches: dict[int, dict[WorkerRank, int]] = {}
        degraded = self._fields.degraded
        for record in self._fields.records_for(query):
            size = record.block_size
            if size not in matches:
                matches[size] = self._index.match(query.block_hashes.get(size, ()))
            match = matches[size]
            for worker in record.worker_ranks:
                found[worker] = 0 if worker in degraded else match.get(worker, 0)
        return found

    def potential_loads(self, query: RoutingQuery, *, now: float) -> tuple[PotentialLoad, ...]:
        """Return what every rank that serves the query would carry with it. Raises: as `overlaps`."""
        return tuple(
            PotentialLoad(
                candidate.worker,
                candidate.active_prefill_tokens + candidate.uncached_tokens(query.prompt_tokens),
                candidate.decode_blocks,
                candidate.active_requests,
            )
            for candidate in CandidateColumns(self._fields.field(query, now=now))
        )

    def workers(self, *, now: float) -> tuple[WorkerSnapshot, ...]:
        """Return what is known of every rank that requests are routed to, by worker."""
        degraded = self._fields.degraded
        return tuple(
            WorkerSnapshot(
                worker=worker,
                record=record,
                load=self._loads.estimate(worker),
                reservations=self._loads.booking_count(worker),
                report=self._loads.report(worker),
                load_age_s=(load_age_s := self._loads.age_s(worker, now=now)),
                index_age_s=self._index_age_s(worker, now=now),
                indexed_blocks=self._indexed_blocks[worker],
                is_stale=self._fields.is_stale(load_age_s),
                is_index_degraded=worker in degraded,
            )
            for record in self._roster.records()
            if record.role is not WorkerRole.QUEUE
            for worker in record.worker_ranks
        )

    def _index_age_s(self, worker: WorkerRank, *, now: float) -> float | None:
        age_s = now - float(self._loads.columns.values[INDEX_CHANGED_AT, self._row_of(worker)])
        return None if math.isnan(age_s) else age_s

    def _note_kv_event(self, worker: WorkerRank, epoch: Epoch, *, now: float) -> PrefixIndex | None:
        """Return the index if it takes this event."""
        if self._event_index is None or not self._roster.is_live(worker, epoch):
            return None
        self._loads.columns.values[INDEX_CHANGED_AT, self._row_of(worker)] = now
        return self._event_index

    def _row_of(self, worker: WorkerRank) -> int:
        row = self._loads.columns.row_of(worker)
        assert row is not None, f"{worker} is in the roster and not followed"
        return row

    def _forget(self, worker_id: WorkerId, *, now: float) -> tuple[AttemptKey, ...]:
        self._index.remove_worker(worker_id)
        for worker in [known for known in self._indexed_blocks if known.worker_id == worker_id]:
            del self._indexed_blocks[worker]
        self._fields.trust([worker for worker in self._fields.degraded if worker.worker_id == worker_id])
        released = self._loads.remove_worker(worker_id, now=now)
        self._fields.forget_lineups()
        return released
