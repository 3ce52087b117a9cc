"""A field made from what the router counts: the columns of one moment, and on demand every fact about a candidate."""

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from kvmesh.core.candidate_columns import Column, Field
from kvmesh.core.candidates import Candidate
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.ids import WorkerRank
from kvmesh.core.lineup import Flags, Lineup
from kvmesh.core.rank_columns import (
    BLOCKS,
    HEARD_AT,
    INDEX_CHANGED_AT,
    IS_REPORTED,
    MAX_REQUESTS,
    PREFILL_TOKENS,
    REQUESTS,
    TOTAL_BLOCKS,
    WAITING,
)
from kvmesh.core.roster import WorkerRecord


class ServingLineup(Lineup):
    """The ranks that serve a role and model, with what their records say."""

    def __init__(
        self,
        records: Sequence[WorkerRecord],
        *,
        row_of: Callable[[WorkerRank], int | None],
        degraded: Collection[WorkerRank],
    ) -> None:
        """Take records, ordered; `row_of` says where a rank's live figures are, which every rank must have."""
        self.records = tuple(record for record in records for _ in record.worker_ranks)
        super().__init__(
            [worker for record in records for worker in record.worker_ranks], [record.labels for record in self.records]
        )
        self.block_size = np.array([record.block_size for record in self.records], np.float64)
        self.total_blocks = np.array([record.total_blocks for record in self.records], np.float64)
        self.max_requests = np.array([record.max_requests for record in self.records], np.float64)
        self.draining = _flags_or_none([record.draining for record in self.records])
        self.degraded = _flags_or_none([worker in degraded for worker in self.workers])
        sizes = sorted({record.block_size for record in records})
        self.sizes: tuple[tuple[int, Flags | None], ...] = tuple(
            (size, self.block_size == size if len(sizes) > 1 else None) for size in sizes
        )
        """Every block size, and whose it is; None = everybody's."""
        rows = [row_of(worker) for worker in self.workers]
        assert None not in rows, "a rank that is not followed"
        self.rows = np.array(rows, np.intp)
        first = int(self.rows[0]) if rows else 0
        is_contiguous = np.array_equal(self.rows, np.arange(first, first + len(rows)))
        self._row_slice = slice(first, first + len(rows)) if is_contiguous else None

    def copy_of(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the live figures of these ranks as they are now, shape (columns, ranks)."""
        if self._row_slice is not None:
            return values[:, self._row_slice].copy()
        return values.take(self.rows, axis=1)


class LiveField(Field):
    """Everyone who serves one query, now."""

    def __init__(
        self,
        lineup: ServingLineup,
        live: NDArray[np.float64],
        *,
        overlap_blocks: Column,
        new_blocks: Column,
        stale: Flags | None,
        is_staleness_ignored: bool,
        overload: OverloadRules,
        now: float,
    ) -> None:
        """Take a copy of the live figures, and what was found for the query; `stale` None = nobody is."""
        self.lineup: ServingLineup = lineup
        self.is_staleness_ignored = is_staleness_ignored
        self.draining = lineup.draining
        self.block_size = lineup.block_size
        self.overlap_blocks = overlap_blocks
        self.new_blocks = new_blocks
        self.active_requests = live[REQUESTS]
        self.active_prefill_tokens = live[PREFILL_TOKENS]
        self.active_blocks = live[BLOCKS]
        self.waiting_requests = live[WAITING]
        self._live = live
        self._stale = stale
        self._overload = overload
        self._now = now

    @property
    def total_blocks(self) -> Column:
        """What the record says, or else the last report; 0 = not said."""
        return np.where(self.lineup.total_blocks > 0, self.lineup.total_blocks, self._live[TOTAL_BLOCKS])

    @property
    def max_requests(self) -> Column:
        """What the record says, or else the last report; 0 = not said."""
        return np.where(self.lineup.max_requests > 0, self.lineup.max_requests, self._live[MAX_REQUESTS])

    @property
    def saturated(self) -> Flags | None:
        """Who is overloaded, or stale while staleness counts."""
        overloaded = self._overload.flags_of(self)
        stale = None if self.is_staleness_ignored else self._stale
        return overloaded if stale is None else stale if overloaded is None else overloaded | stale

    def candidate(self, position: int) -> Candidate:
        """Return one of them as an object."""
        record = self.lineup.records[position]
        prefill_tokens, blocks = int(self.active_prefill_tokens[position]), int(self.active_blocks[position])
        requests, waiting = int(self.active_requests[position]), int(self.waiting_requests[position])
        new_blocks = int(self.new_blocks[position])
        total_blocks = record.total_blocks or int(self._live[TOTAL_BLOCKS, position])
        max_requests = record.max_requests or int(self._live[MAX_REQUESTS, position])
        is_stale = self._stale is not None and bool(self._stale[position])
        index_age_s = self._now - float(self._live[INDEX_CHANGED_AT, position])
        overload = self._overload.broken_by(
            decode_blocks=blocks + new_blocks,
            total_blocks=total_blocks,
            prefill_tokens=prefill_tokens,
            requests=requests,
            slots=max_requests,
            waiting=waiting,
        )
        return Candidate(
            worker=self.lineup.workers[position],
            epoch=record.epoch,
            block_size=record.block_size,
            overlap_blocks=int(self.overlap_blocks[position]),
            active_prefill_tokens=prefill_tokens,
            active_blocks=blocks,
            new_blocks=new_blocks,
            active_requests=requests,
            waiting_requests=waiting,
            total_blocks=total_blocks,
            max_requests=max_requests,
            labels=record.labels,
            load_age_s=self._now - float(self._live[HEARD_AT, position]),
            is_reported=bool(self._live[IS_REPORTED, position]),
            index_age_s=None if math.isnan(index_age_s) else index_age_s,
            is_draining=record.draining,
            is_stale=is_stale,
            is_index_degraded=self.lineup.degraded is not None and bool(self.lineup.degraded[position]),
            overload=overload,
            is_saturated=bool(overload) or (is_stale and not self.is_staleness_ignored),
        )


def _flags_or_none(values: Sequence[bool]) -> Flags | None:
    return np.array(values, np.bool_) if any(values) else None
