"""Which blocks the bookings hold on which row, for all rows at once.

Bookings share prefixes, so blocks are kept in runs: pieces of chains that the same bookings hold. A booking holds whole
runs; one that leaves a run in the middle cuts it in two, and a run that nobody holds is gone. So a booking costs what
is new in it, and little for what it shares.

Laws:
    - every key is in one run, and `_runs` says in which;
    - a block held by several bookings of one row is counted once; how many more hold it is kept apart;
    - reading takes what a row holds to be closed under prefix, as it is where every booking holds a chain from block 0,
      and finds where it ends by bisection. Counting is exact for any keys that a booking names once each.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import repeat


class _Run:
    __slots__ = ("again", "keys", "mask")

    def __init__(self, keys: list[int], mask: int, again: dict[int, int]) -> None:
        self.keys = keys
        self.mask = mask
        """The rows that hold it, one bit each."""
        self.again = again
        """By row: how many more bookings hold it there than one; never 0."""


class ActiveBlocks:
    """Counts bookings by block and row; not thread-safe."""

    def __init__(self) -> None:
        """Start with nothing held."""
        self._runs: dict[int, _Run] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, row: int, keys: list[int]) -> int:
        """Hold blocks once more on a row; count those that were not held there. O(blocks not held anywhere, runs)."""
        bit = 1 << row
        fresh_count = at = 0
        while at < len(keys):
            run = self._run_along(keys, at) or self._new_run(keys, at)
            if run.mask & bit:
                run.again[row] = run.again.get(row, 0) + 1
            else:
                run.mask |= bit
                fresh_count += len(run.keys)
            at += len(run.keys)
        return fresh_count

    def remove(self, row: int, keys: list[int]) -> int:
        """Let go blocks added to a row; count those no longer held there. O(blocks then held nowhere, runs)."""
        bit = 1 << row
        gone_count = at = 0
        while at < len(keys):
            run = self._runs.get(keys[at])
            if run is None:  # a booking named it twice
                at += 1
                continue
            at += len(run.keys)
            more = run.again.pop(row, 0)
            if more > 1:
                run.again[row] = more - 1
            elif not more and run.mask & bit:
                run.mask ^= bit
                gone_count += len(run.keys)
                if not run.mask:
                    for key in run.keys:
                        self._runs.pop(key, None)
        return gone_count

    def depth(self, row: int, chain: Sequence[int]) -> int:
        """Count the leading blocks of a chain that are held on a row. O(log blocks)."""
        bit = 1 << row

        def is_absent(key: int) -> bool:
            run = self._runs.get(key)
            return run is None or not run.mask & bit

        return bisect_left(chain, True, lo=1, key=is_absent) if len(chain) and not is_absent(chain[0]) else 0

    def match_masks(self, chain: Sequence[int]) -> list[tuple[int, int]]:
        """Return (rows as bits, depth): the rows that hold exactly so many leading blocks, each row once, none at 0.

        O(d log n) for n blocks and d distinct depths.
        """
        find = self._runs.get
        first = find(chain[0]) if len(chain) else None
        if first is None:
            return []
        depths = []
        # In a span `holders` hold block `low` and, of them, `keepers` hold block `high`; nobody holds block n.
        spans = [(0, first.mask, len(chain), 0)]
        while spans:
            low, holders, high, keepers = spans.pop()
            while holders != keepers:
                if high - low == 1:
                    depths.append((holders & ~keepers, high))
                    break
                middle = (low + high) >> 1
                run = find(chain[middle])
                mask = 0 if run is None else run.mask & holders
                if mask != keepers:
                    spans.append((middle, mask, high, keepers))
                high, keepers = middle, mask
        return depths

    def check_integrity(self) -> None:
        """Assert the laws of this module; O(keys), for tests."""
        assert all(key in run.keys for key, run in self._runs.items())
        assert len(self._runs) == sum(len(run.keys) for run in set(self._runs.values()))
        for run in set(self._runs.values()):
            assert run.mask
            assert all(count > 0 and run.mask >> row & 1 for row, count in run.again.items())

    def _run_along(self, keys: list[int], at: int) -> _Run | None:
        """Return the run that begins with the key at `at`, cut so that it has only what follows there."""
        run = self._runs.get(keys[at])
        if run is None:
            return None
        if run.keys[0] != keys[at]:  # no chain: it begins within
            run = self._cut(run, run.keys.index(keys[at]))
        along = keys[at : at + len(run.keys)]
        if along != run.keys:
            pairs = enumerate(zip(along, run.keys, strict=False))
            self._cut(run, next((index for index, (one, other) in pairs if one != other), len(along)))
        return run

    def _new_run(self, keys: list[int], at: int) -> _Run:
        """Make a run, held by nobody yet, of the keys from `at` to the next that is in one."""
        fresh = keys[at:]
        if not self._runs.keys().isdisjoint(fresh):  # no chain
            fresh = fresh[: next(index for index, key in enumerate(fresh) if key in self._runs)]
        run = _Run(fresh, 0, {})
        self._runs.update(zip(fresh, repeat(run)))
        return run

    def _cut(self, run: _Run, at: int) -> _Run:
        """Leave a run its first keys and return one of the others, held by the same."""
        rest = _Run(run.keys[at:], run.mask, dict(run.again))
        del run.keys[at:]
        self._runs.update(zip(rest.keys, repeat(rest)))
        return rest
