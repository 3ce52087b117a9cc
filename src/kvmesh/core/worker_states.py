"""What a router knows of its workers: who is there, what each has cached, what each carries.

    discovery     -> put_worker, remove_worker
    WatchKvEvents -> apply_kv_*, reset_worker_index, degrade_worker_index
    WatchLoad     -> apply_load

Laws:
    - what is said by or about an incarnation that is not the live one changes nothing, and the answer says so;
    - the end of an incarnation ends its bookings and its part of the index;
    - a worker whose load report is too old counts as saturated; if over half of a role are, the fault is ours, and
      staleness is ignored.
"""

from collections import Counter
from collections.abc import Sequence

from kvmesh.core.candidates import Candidate, RoutingQuery
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.errors import NotKnownError, Reason, TryElsewhereError
from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.core.ids import AttemptKey, Epoch, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.load_report import LoadReport, ReportOutcome, ReportResult
from kvmesh.core.load_table import LoadTable
from kvmesh.core.prefix_index import HeldBlock, IndexStats, PrefixIndex, StoreOutcome
from kvmesh.core.roster import Roster, RosterOutcome, WorkerRecord, WorkerRole
from kvmesh.core.worker_views import Field, PotentialLoad, WorkerChange, WorkerSnapshot

__all__ = ["Field", "PotentialLoad", "WorkerChange", "WorkerSnapshot", "WorkerStates"]


class WorkerStates:
    """Roster, index and load table in one; not thread-safe. `now` is in seconds and never goes back."""

    def __init__(
        self, *, loads: LoadTable, index: PrefixIndex, overload: OverloadRules, stale_after_s: float = 3.0
    ) -> None:
        """Start with no workers; `loads` and `index` are this object's from now on."""
        self._loads = loads
        self._index = index
        self._overload = overload
        self._stale_after_s = stale_after_s
        self._roster = Roster()
        self._index_changed_at: dict[WorkerRank, float] = {}
        self._indexed_blocks: Counter[WorkerRank] = Counter()
        self._degraded: set[WorkerRank] = set()

    @property
    def router_id(self) -> RouterId:
        """Under which workers report the load that this router sent them."""
        return self._loads.router_id

    def put_worker(self, record: WorkerRecord, *, now: float) -> WorkerChange:
        """Take a worker's record in; a higher epoch voids what is known of the one before, a lower one is ignored."""
        outcome = self._roster.put(record)
        if outcome is RosterOutcome.STALE_EPOCH:
            return WorkerChange(outcome)
        released = self._forget(record.worker_id, now=now) if outcome is RosterOutcome.RESTARTED else ()
        for worker in record.worker_ranks:
            self._loads.put_worker(worker, record.epoch, now=now)
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
        now: float,
    ) -> StoreOutcome | None:
        """Record stored blocks; None if the event is ignored, not being of the live incarnation."""
        if not self._note_kv_event(worker, epoch, now=now):
            return None
        outcome = self._index.store(worker, parent=parent, block_hashes=block_hashes)
        self._indexed_blocks[worker] += outcome.stored
        return outcome

    def apply_kv_removed(
        self, worker: WorkerRank, epoch: Epoch, *, block_hashes: Sequence[SequenceHash], now: float
    ) -> bool:
        """Record removed blocks; False if the event is ignored, not being of the live incarnation."""
        if not self._note_kv_event(worker, epoch, now=now):
            return False
        self._indexed_blocks[worker] -= self._index.remove(worker, block_hashes)
        return True

    def apply_kv_cleared(self, worker: WorkerRank, epoch: Epoch, *, now: float) -> bool:
        """Record that a cache is empty; False if the event is ignored, not being of the live incarnation."""
        if not self._note_kv_event(worker, epoch, now=now):
            return False
        self._index.clear(worker)
        del self._indexed_blocks[worker]
        return True

    def reset_worker_index(self, worker: WorkerRank, epoch: Epoch, *, now: float) -> bool:
        """Empty a rank's part of the index before a snapshot, no longer degraded; False if it is not live."""
        if not self.apply_kv_cleared(worker, epoch, now=now):
            return False
        self._degraded.discard(worker)
        return True

    def degrade_worker_index(self, worker: WorkerRank, epoch: Epoch) -> bool:
        """Count a rank's overlap as 0 until its index is reset: it missed events. False if it is not live."""
        if not self._roster.is_live(worker, epoch):
            return False
        self._degraded.add(worker)
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
        return frozenset(record.block_size for record in self._roster.of(role, model))

    def dump_index(self, worker_id: WorkerId | None = None) -> tuple[HeldBlock, ...]:
        """Return every (rank, block) pair, parents first, or those of one worker. O(pairs)."""
        return tuple(held for held in self._index.dump() if worker_id is None or held.worker.worker_id == worker_id)

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
        for record in self._records_for(query):
            size = record.block_size
            if size not in matches:
                matches[size] = self._index.match(query.block_hashes.get(size, ()))
            match = matches[size]
            for worker in record.worker_ranks:
                found[worker] = 0 if worker in self._degraded else match.get(worker, 0)
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
            for candidate in self.field(query, now=now).candidates
        )

    def workers(self, *, now: float) -> tuple[WorkerSnapshot, ...]:
        """Return what is known of every rank that requests are routed to, by worker."""
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
                is_stale=self._is_stale(load_age_s),
                is_index_degraded=worker in self._degraded,
            )
            for record in self._roster.records()
            if record.role is not WorkerRole.QUEUE
            for worker in record.worker_ranks
        )

    def field(self, query: RoutingQuery, *, now: float) -> Field:
        """Return everyone who serves the query as a candidate. Raises: as `overlaps`. O(workers of the role)."""
        records = self._records_for(query)
        overlaps = self.overlaps(query)
        ages_s = {
            worker: self._loads.age_s(worker, now=now)
            for record in self._roster.records(query.role)
            for worker in record.worker_ranks
        }
        is_ignored = 2 * sum(map(self._is_stale, ages_s.values())) > len(ages_s)
        candidates = tuple(
            self._candidate(
                worker,
                record,
                query=query,
                overlap_blocks=min(overlaps[worker], max_overlap_blocks(query.prompt_tokens, record.block_size)),
                load_age_s=ages_s[worker],
                is_staleness_ignored=is_ignored,
                now=now,
            )
            for record in records
            for worker in record.worker_ranks
        )
        return Field(candidates, is_ignored)

    def _candidate(
        self,
        worker: WorkerRank,
        record: WorkerRecord,
        *,
        query: RoutingQuery,
        overlap_blocks: int,
        load_age_s: float,
        is_staleness_ignored: bool,
        now: float,
    ) -> Candidate:
        load = self._loads.estimate(worker)
        report = self._loads.report(worker)
        is_stale = self._is_stale(load_age_s)
        waiting = report.waiting_requests if report is not None else 0
        total_blocks = record.total_blocks or (report.total_blocks if report is not None else 0)
        max_requests = record.max_requests or (report.max_requests if report is not None else 0)
        block_hashes = query.block_hashes.get(record.block_size, ())
        full_blocks = max(query.prompt_tokens // record.block_size, len(block_hashes))
        new_blocks = full_blocks - self._loads.active_prefix_blocks(worker, block_hashes)
        overload = self._overload.broken_by(
            decode_blocks=load.decode_blocks + new_blocks,
            total_blocks=total_blocks,
            prefill_tokens=load.prefill_tokens,
            requests=load.active_requests,
            slots=max_requests,
            waiting=waiting,
        )
        return Candidate(
            worker=worker,
            epoch=record.epoch,
            block_size=record.block_size,
            overlap_blocks=overlap_blocks,
            active_prefill_tokens=load.prefill_tokens,
            active_blocks=load.decode_blocks,
            new_blocks=new_blocks,
            active_requests=load.active_requests,
            waiting_requests=waiting,
            total_blocks=total_blocks,
            max_requests=max_requests,
            labels=record.labels,
            load_age_s=load_age_s,
            is_reported=report is not None,
            index_age_s=self._index_age_s(worker, now=now),
            is_draining=record.draining,
            is_stale=is_stale,
            is_index_degraded=worker in self._degraded,
            overload=overload,
            is_saturated=bool(overload) or (is_stale and not is_staleness_ignored),
        )

    def _records_for(self, query: RoutingQuery) -> tuple[WorkerRecord, ...]:
        records = self._roster.of(query.role, query.model)
        if records:
            return records
        if self._roster.records(query.role) and query.model not in self._roster.models():
            raise NotKnownError(Reason.UNKNOWN_MODEL, f"no worker serves model {query.model!r}", field="model")
        raise TryElsewhereError(Reason.NO_WORKERS, f"no {query.role.value} worker of {query.model!r} is alive")

    def _is_stale(self, load_age_s: float) -> bool:
        return load_age_s > self._stale_after_s

    def _index_age_s(self, worker: WorkerRank, *, now: float) -> float | None:
        changed_at = self._index_changed_at.get(worker)
        return None if changed_at is None else now - changed_at

    def _note_kv_event(self, worker: WorkerRank, epoch: Epoch, *, now: float) -> bool:
        if not self._roster.is_live(worker, epoch):
            return False
        self._index_changed_at[worker] = now
        return True

    def _forget(self, worker_id: WorkerId, *, now: float) -> tuple[AttemptKey, ...]:
        self._index.remove_worker(worker_id)
        for worker in [known for known in self._index_changed_at if known.worker_id == worker_id]:
            del self._index_changed_at[worker]
            del self._indexed_blocks[worker]
        self._degraded = {worker for worker in self._degraded if worker.worker_id != worker_id}
        return self._loads.remove_worker(worker_id, now=now)
