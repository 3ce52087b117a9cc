"""What routers count of every rank they follow, as columns of numbers: one row per rank.

A row is a rank's from `add` to `remove` and then another's, so whoever keeps numbers of rows asks again after either.
A change is one number written; a decision reads whole columns, copied, and keeps the copy to explain itself.
"""

import numpy as np
from numpy.typing import NDArray

from kvmesh.core.ids import WorkerRank

(
    REQUESTS,
    PREFILL_TOKENS,
    BLOCKS,
    WAITING,
    TOTAL_BLOCKS,
    MAX_REQUESTS,
    HEARD_AT,
    IS_REPORTED,
    INDEX_CHANGED_AT,
) = range(9)
"""Columns. The first three are estimates of the load; the next three are the last report's, 0 = not said; HEARD_AT is
when that came or, before the first, since when the rank is followed; INDEX_CHANGED_AT is nan before a KV event."""

_COLUMNS = 9
_FIRST_CAPACITY = 16


class RankColumns:
    """Rows by rank, in one array of float64, in which every count is exact. Not thread-safe."""

    def __init__(self) -> None:
        """Start with no ranks."""
        self.values: NDArray[np.float64] = np.zeros((_COLUMNS, _FIRST_CAPACITY))
        """Shape (columns, at least the rows given out); another array once there are more ranks."""
        self._rows: dict[WorkerRank, int] = {}
        self._free: list[int] = []

    def add(self, worker: WorkerRank, *, now: float) -> int:
        """Give a rank a row in which nothing is known, its old one if it has one, and return its number."""
        row = self._rows.get(worker)
        if row is None:
            row = self._rows[worker] = self._free.pop() if self._free else len(self._rows)
            if row >= self.values.shape[1]:
                self.values = np.concatenate((self.values, np.zeros_like(self.values)), axis=1)
        self.values[:, row] = 0
        self.values[HEARD_AT, row] = now
        self.values[INDEX_CHANGED_AT, row] = np.nan
        return row

    def remove(self, worker: WorkerRank) -> None:
        """Take a rank's row away."""
        self._free.append(self._rows.pop(worker))

    def row_of(self, worker: WorkerRank) -> int | None:
        """Return the row of a rank, None if it has none."""
        return self._rows.get(worker)
