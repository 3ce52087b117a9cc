"""Makes the field of a decision: roster, index and load table, as columns of one moment.

All of it is some tens of array operations, however many ranks there are; what depends on the roster alone is kept from
decision to decision.
"""

from collections.abc import Iterable

import numpy as np

from kvmesh.core.candidate_columns import Column
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.errors import NotKnownError, Reason, TryElsewhereError
from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.core.ids import WorkerRank
from kvmesh.core.index_port import CacheIndex
from kvmesh.core.lineup import BitPositions
from kvmesh.core.live_field import LiveField, ServingLineup
from kvmesh.core.load_table import LoadTable
from kvmesh.core.rank_columns import HEARD_AT
from kvmesh.core.roster import Roster, WorkerRecord, WorkerRole
from kvmesh.core.stage_times import StageTimes


class FieldSource:
    """Reads what `WorkerStates` writes; not thread-safe."""

    def __init__(
        self,
        *,
        roster: Roster,
        loads: LoadTable,
        index: CacheIndex,
        overload: OverloadRules,
        stale_after_s: float,
        stages: StageTimes,
    ) -> None:
        """Share these; a report older than `stale_after_s` is stale."""
        self._roster = roster
        self._loads = loads
        self._index = index
        self._overload = overload
        self._stale_after_s = stale_after_s
        self._stages = stages
        self._degraded: set[WorkerRank] = set()
        self._lineups: dict[tuple[WorkerRole, str | None], ServingLineup] = {}
        self._open_workers: dict[tuple[WorkerRole, str, int], int] = {}
        self._bits: dict[ServingLineup, tuple[int, BitPositions]] = {}
        """By lineup, the version of the index they are of, and where its bits stand."""
        self._rows: dict[ServingLineup, BitPositions] = {}

    @property
    def degraded(self) -> frozenset[WorkerRank]:
        """The ranks whose overlap counts as 0."""
        return frozenset(self._degraded)

    def degrade(self, worker: WorkerRank) -> None:
        """Count a rank's overlap as 0 from now on."""
        self._degraded.add(worker)
        self.forget_lineups()

    def trust(self, workers: Iterable[WorkerRank]) -> None:
        """Count the overlap of ranks again."""
        if not self._degraded.isdisjoint(workers := set(workers)):
            self._degraded -= workers
            self.forget_lineups()

    def forget_lineups(self) -> None:
        """Read the roster anew at the next decision; whoever changes it, or which ranks are followed, calls this."""
        self._lineups.clear()
        self._open_workers.clear()
        self._bits.clear()
        self._rows.clear()

    def is_stale(self, load_age_s: float) -> bool:
        """Tell whether a load report of this age is too old."""
        return load_age_s > self._stale_after_s

    def records_for(self, query: RoutingQuery) -> tuple[WorkerRecord, ...]:
        """Return who serves a query. Raises: NotKnownError(UNKNOWN_MODEL), TryElsewhereError(NO_WORKERS)."""
        records = self._roster.of(query.role, query.model)
        if records:
            return records
        if not self._roster.records(query.role):  # the model is of no matter: it may be a default that nobody asked for
            raise TryElsewhereError(Reason.NO_WORKERS, f"this mesh has no {query.role.value} workers")
        if query.model not in self._roster.models():
            raise NotKnownError(Reason.UNKNOWN_MODEL, f"no worker serves model {query.model!r}", field="query.model")
        raise TryElsewhereError(Reason.NO_WORKERS, f"no {query.role.value} worker of {query.model!r} is alive")

    def count_open_workers(self, role: WorkerRole, model: str, *, block_size: int) -> int:
        """Count the workers of a role that serve a model in blocks of this size and do not drain."""
        count = self._open_workers.get((role, model, block_size))
        if count is None:
            records = self._roster.of(role, model)
            count = sum(not record.draining and record.block_size == block_size for record in records)
            self._open_workers[role, model, block_size] = count
        return count

    def field(self, query: RoutingQuery, *, now: float) -> LiveField:
        """Return everyone who serves a query. Raises: as `records_for`."""
        lineup = self._lineup_of(query)
        overlap_blocks = self._overlaps(query, lineup)
        self._stages.end("match")
        live = lineup.copy_of(self._loads.columns.values)
        new_blocks = self._new_blocks(query, lineup)
        heard_at = live[HEARD_AT]
        stale, stale_count = None, 0
        if self.is_stale(now - float(heard_at[heard_at.argmin()])):
            stale = now - heard_at > self._stale_after_s
            stale_count = int(np.count_nonzero(stale))
        field = LiveField(
            lineup,
            live,
            overlap_blocks=overlap_blocks,
            new_blocks=new_blocks,
            stale=stale,
            is_staleness_ignored=self._is_our_fault(query.role, stale_count, len(lineup), now=now),
            overload=self._overload,
            now=now,
        )
        self._stages.end("load")
        return field

    def _overlaps(self, query: RoutingQuery, lineup: ServingLineup) -> Column:
        """Return the leading blocks that each rank has cached, capped: a prompt's last token is always computed."""
        column = np.zeros(len(lineup))
        for size, flags in lineup.sizes:
            blocks = query.block_hashes.get(size)
            found = self._index.match_masks(blocks) if blocks else ()
            if not found:
                continue
            bits = self._bits_of(lineup)
            most = max_overlap_blocks(query.prompt_tokens, size)
            for mask, depth in found:
                positions = bits.of(mask)
                column[positions if flags is None else positions[flags[positions]]] = min(depth, most)
        if lineup.degraded is not None:
            column[lineup.degraded] = 0
        return column

    def _new_blocks(self, query: RoutingQuery, lineup: ServingLineup) -> Column:
        """Return the prompt's blocks that bookings do not hold already, on each rank."""
        column = np.empty(len(lineup))
        for size, flags in lineup.sizes:
            blocks = query.block_hashes.get(size, ())
            full_blocks = max(query.prompt_tokens // size, len(blocks))
            if flags is None:
                column.fill(full_blocks)
            else:
                column[flags] = full_blocks
            for mask, depth in self._loads.match_active(blocks):
                positions = self._rows_of(lineup).of(mask)
                column[positions if flags is None else positions[flags[positions]]] = full_blocks - depth
        return column

    def _is_our_fault(self, role: WorkerRole, stale_count: int, count: int, *, now: float) -> bool:
        """Tell whether over half of a role is stale, of which `stale_count` of `count` ranks were found to be."""
        everyone = self._lineup(role, None)
        if len(everyone) != count:
            heard_at = self._loads.columns.values[HEARD_AT, everyone.rows]
            stale_count = int(np.count_nonzero(now - heard_at > self._stale_after_s))
        return 2 * stale_count > len(everyone)

    def _lineup_of(self, query: RoutingQuery) -> ServingLineup:
        lineup = self._lineups.get((query.role, query.model))
        if lineup is None:
            self.records_for(query)  # names that nobody serves are refused, not remembered
            lineup = self._lineup(query.role, query.model)
        return lineup

    def _lineup(self, role: WorkerRole, model: str | None) -> ServingLineup:
        lineup = self._lineups.get((role, model))
        if lineup is None:
            records = self._roster.records(role) if model is None else self._roster.of(role, model)
            lineup = ServingLineup(records, row_of=self._loads.columns.row_of, degraded=self._degraded)
            self._lineups[role, model] = lineup
        return lineup

    def _bits_of(self, lineup: ServingLineup) -> BitPositions:
        version, bits = self._bits.get(lineup, (None, None))
        if bits is None or version != self._index.version:
            bits = BitPositions([self._index.bit_of(worker) for worker in lineup.workers])
            self._bits[lineup] = (self._index.version, bits)
        return bits

    def _rows_of(self, lineup: ServingLineup) -> BitPositions:
        rows = self._rows.get(lineup)
        if rows is None:
            rows = self._rows[lineup] = BitPositions(lineup.rows.tolist())
        return rows
