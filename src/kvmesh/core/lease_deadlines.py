"""The next moment at which time alone changes something, per task."""

import heapq

from kvmesh.core.ids import AttemptKey


class Deadlines:
    """At most one deadline per key, taken in order of time, ties in the given order.

    A heap with lazy deletion: replaced and discarded entries stay until they surface or outnumber the valid ones two
    to one, so every operation is O(log n) amortised and memory is O(keys).
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, AttemptKey]] = []
        self._valid: dict[AttemptKey, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._valid)

    def get(self, key: AttemptKey) -> float | None:
        """Return the deadline of `key`."""
        entry = self._valid.get(key)
        return None if entry is None else entry[0]

    def set(self, key: AttemptKey, at: float | None, *, order: int) -> None:
        """Replace the deadline of `key`; None discards it. Among equal deadlines the lower `order` comes first."""
        if at is None:
            self._valid.pop(key, None)
            return
        self._valid[key] = (at, order)
        heapq.heappush(self._heap, (at, order, key))
        if len(self._heap) > 2 * len(self._valid) + 64:
            self._heap = [(at, order, key) for key, (at, order) in self._valid.items()]
            heapq.heapify(self._heap)

    def earliest(self) -> float | None:
        """Return the first deadline, None if there is none."""
        while self._heap:
            at, order, key = self._heap[0]
            if self._valid.get(key) == (at, order):
                return at
            heapq.heappop(self._heap)
        return None

    def pop_due(self, now: float) -> tuple[float, AttemptKey] | None:
        """Remove and return the first deadline that is not after `now`."""
        earliest = self.earliest()
        if earliest is None or earliest > now:
            return None
        at, _, key = heapq.heappop(self._heap)
        del self._valid[key]
        return at, key
