"""The ranks among which one decision chooses, in worker order: what of them changes only with the roster.

A position is a rank's place in that order; every column of a decision is indexed by it.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvmesh.core.ids import WorkerId, WorkerRank

Positions = NDArray[np.intp]
Flags = NDArray[np.bool_]

_MAX_REMEMBERED = 512
"""Masks, and labels, whose positions are remembered: both come from outside."""


class Lineup:
    """Who they are and which labels they have. Nothing of it changes."""

    def __init__(self, workers: Sequence[WorkerRank], labels: Sequence[Mapping[str, str]]) -> None:
        """Take ranks, ordered, and the labels of each."""
        self.workers = tuple(workers)
        self.labels = tuple(labels)
        self._positions = {worker: position for position, worker in enumerate(self.workers)}
        self._of_worker: dict[WorkerId, list[int]] = {}
        for position, worker in enumerate(self.workers):
            self._of_worker.setdefault(worker.worker_id, []).append(position)
        self._labelled: dict[tuple[str, str], Flags] = {}

    def __len__(self) -> int:
        return len(self.workers)

    def position_of(self, worker: WorkerRank) -> int | None:
        """Return where a rank stands, None if it is not among them."""
        return self._positions.get(worker)

    def flags_of(self, worker_ids: Iterable[WorkerId]) -> Flags:
        """Return True at every rank of these workers."""
        flags = np.zeros(len(self), np.bool_)
        for worker_id in worker_ids:
            flags[self._of_worker.get(worker_id, [])] = True
        return flags

    def flags_of_label(self, key: str, value: str) -> Flags:
        """Return True at every rank that has this label; not to be written to."""
        flags = self._labelled.get((key, value))
        if flags is None:
            flags = np.array([labels.get(key) == value for labels in self.labels], np.bool_)
            if len(self._labelled) >= _MAX_REMEMBERED:
                self._labelled.clear()
            self._labelled[key, value] = flags
        return flags


class BitPositions:
    """Which positions the bits of a mask stand for."""

    def __init__(self, bit_numbers: Sequence[int | None]) -> None:
        """Take the bit of every position, each once; None = it has none."""
        numbers = [-1 if number is None else number for number in bit_numbers]
        self._position_of_bit = np.full(max(numbers, default=-1) + 1, -1, np.intp)
        for position, number in enumerate(numbers):
            if number >= 0:
                self._position_of_bit[number] = position
        self._bytes = (len(self._position_of_bit) + 7) // 8
        self._mask = (1 << len(self._position_of_bit)) - 1
        self._remembered: dict[int, Positions] = {}

    def of(self, mask: int) -> Positions:
        """Return the positions of the bits set, leaving out bits of nobody here; not to be written to."""
        positions = self._remembered.get(mask)
        if positions is None:
            content = np.frombuffer((mask & self._mask).to_bytes(self._bytes, "little"), np.uint8)
            bits = np.unpackbits(content, count=len(self._position_of_bit), bitorder="little").nonzero()[0]
            positions = self._position_of_bit[bits]
            positions = positions[positions >= 0]
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[mask] = positions
        return positions
