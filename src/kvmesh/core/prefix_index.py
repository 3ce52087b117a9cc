"""Which worker rank holds which prefix.

Laws:
    - A key is a sequence hash, so it stands for a block and all before it and has one parent for ever.
    - Closed prefix: a rank that holds a key here holds its parent here. What a rank holds below a block it lost is kept
      aside, per rank and bounded, and re-attached when that block returns.
    - So the ranks that hold key i of a sequence only shrink as i grows, and `match` bisects; it never walks.

A rank is one bit. Forgetting a rank retires its bit at once; a sweep over the runs of keys (`core/block_runs.py`), a
few per later call that changes the index, wipes retired bits, and a bit is given out again only after a whole sweep, so
that no rank inherits anything.

At `max_pairs` (pairs attached, aside, and retired but not yet swept) a store first finishes the sweep; if it still
does not fit it is refused whole, counted, and its rank listed in `stats.incomplete` until it is cleared or removed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvmesh.core.block_runs import Run, RunTree
from kvmesh.core.ids import SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_records import HeldBlock, IndexStats, StoreOutcome, StoreResult

__all__ = ["HeldBlock", "IndexStats", "PrefixIndex", "StoreOutcome", "StoreResult"]

_SWEEP_RUNS = 16
"""Runs wiped per change."""
_DECODED_MASKS = 4096


@dataclass(slots=True, eq=False)
class _Member:
    """What is known of one rank besides its bit in the runs."""

    worker: WorkerRank
    bit: int = 0
    """One bit, or 0 before it stores anything."""
    pairs: int = 0
    aside: dict[SequenceHash, SequenceHash] = field(default_factory=dict)
    """Kept aside: block -> parent. Neither is attached."""
    below: dict[SequenceHash, set[SequenceHash]] = field(default_factory=dict)
    """The same, parent -> blocks."""

    def put_aside(self, block: SequenceHash, parent: SequenceHash) -> None:
        self.aside[block] = parent
        self.below.setdefault(parent, set()).add(block)

    def take_aside(self, block: SequenceHash) -> bool:
        parent = self.aside.pop(block, None)
        if parent is None:
            return False
        self.below[parent].discard(block)
        if not self.below[parent]:
            del self.below[parent]
        return True


class PrefixIndex:
    """Leading blocks per worker rank, by bisection; see the module for laws and bounds. Not thread-safe."""

    def __init__(self, *, max_pairs: int | None = None, max_aside_per_worker: int = 16_384) -> None:
        """Bound memory to `max_pairs` (rank, block) pairs, and to so many orphan pairs of one rank; None: no bound."""
        self._max_pairs = max_pairs
        self._max_aside = max_aside_per_worker
        self._tree = RunTree()
        self._members: dict[WorkerRank, _Member] = {}
        self._aside_pairs = 0
        self._incomplete: set[WorkerRank] = set()
        self._owners: list[WorkerRank | None] = []
        """By bit number."""
        self._free_bits: list[int] = []
        """Bit numbers to give out again."""
        self._alive = 0
        self._retired = 0
        """Bits that wait for the next sweep."""
        self._decoded: dict[int, tuple[WorkerRank, ...]] = {}
        self._rejected = dict.fromkeys(StoreResult, 0)
        self._dropped_aside = 0

    def match(self, block_hashes: Sequence[SequenceHash]) -> dict[WorkerRank, int]:
        """Return the leading blocks that each rank holds, ranks with none left out.

        `block_hashes` must be one chained sequence. O(d log n) for n blocks and d distinct depths.
        """
        depths: dict[WorkerRank, int] = {}
        find = self._tree.runs.get
        first = find(block_hashes[0]) if block_hashes else None
        if first is None:
            return depths
        # In a span `holders` hold block `low` and, of them, `keepers` hold block `high`; nobody holds block n.
        spans = [(0, first.mask & self._alive, len(block_hashes), 0)]
        while spans:
            low, holders, high, keepers = spans.pop()
            while holders != keepers:
                if high - low == 1:
                    depths.update(dict.fromkeys(self._ranks_of(holders & ~keepers), high))
                    break
                middle = (low + high) >> 1
                run = find(block_hashes[middle])
                mask = run.mask & holders if run is not None else 0
                if mask != keepers:
                    spans.append((middle, mask, high, keepers))
                high, keepers = middle, mask
        return depths

    def depth(self, worker: WorkerRank, block_hashes: Sequence[SequenceHash]) -> int:
        """Count the leading blocks of one chained sequence that `worker` holds; O(log n)."""
        member = self._members.get(worker)
        low, high = 0, len(block_hashes) if member else 0
        while low < high:
            middle = (low + high) >> 1
            if self._is_attached(member, block_hashes[middle]):
                low = middle + 1
            else:
                high = middle
        return low

    def blocks_of(self, worker: WorkerRank) -> frozenset[SequenceHash]:
        """Return every block `worker` holds, aside ones too, to compare with its own table; O(keys)."""
        member = self._members.get(worker)
        if member is None:
            return frozenset()
        return frozenset(key for run in self._tree.order if run.mask & member.bit for key in run.keys) | set(
            member.aside
        )

    def dump(self) -> Iterator[HeldBlock]:
        """Yield all attached pairs, parents first, in an order that depends on the content alone.

        The index must not change until this is consumed. Orphans are left out: no store could replay them.
        """
        stack = [self._tree.root]
        while stack:
            run = stack.pop()
            holders = sorted(self._ranks_of(run.mask & self._alive)) if run.keys else []
            parent = run.parent_key
            for key in run.keys:
                for worker in holders:
                    yield HeldBlock(worker, parent, key)
                parent = key
            stack += sorted(run.children or (), key=_first_key, reverse=True)

    @property
    def stats(self) -> IndexStats:
        """Return the current figures; O(workers)."""
        pairs = sum(member.pairs for member in self._members.values())
        return IndexStats(
            keys=len(self._tree.runs),
            pairs=pairs,
            aside_pairs=self._aside_pairs,
            unswept_pairs=self._tree.pairs - pairs,
            workers=sum(1 for member in self._members.values() if member.pairs or member.aside),
            incomplete=frozenset(self._incomplete),
            rejected_unknown_parent=self._rejected[StoreResult.UNKNOWN_PARENT],
            rejected_conflicting_parent=self._rejected[StoreResult.CONFLICTING_PARENT],
            rejected_full=self._rejected[StoreResult.FULL],
            dropped_aside=self._dropped_aside,
        )

    def store(
        self, worker: WorkerRank, *, parent: SequenceHash | None, block_hashes: Sequence[SequenceHash]
    ) -> StoreOutcome:
        """Record that `worker` holds `block_hashes`, each below its predecessor, the first below `parent`.

        Idempotent. Below a parent kept aside they go aside too. O(blocks), amortised.
        """
        self._sweep(_SWEEP_RUNS)
        outcome = self._try_store(worker, parent, block_hashes)
        forgotten_in_the_way = outcome.result in (StoreResult.CONFLICTING_PARENT, StoreResult.FULL)
        if forgotten_in_the_way and (self._retired or self._tree.wiping):
            while self._retired or self._tree.wiping:
                self._sweep(len(self._tree.order))
            outcome = self._try_store(worker, parent, block_hashes)
        if outcome.result is not StoreResult.STORED:
            self._rejected[outcome.result] += 1
        if outcome.result is StoreResult.FULL:
            self._incomplete.add(worker)
        return outcome

    def remove(self, worker: WorkerRank, block_hashes: Sequence[SequenceHash]) -> int:
        """Forget blocks of `worker`, in any order, and count those it held; what it holds below them goes aside.

        If there is no room aside for all of that, all of that is dropped and counted. O(blocks) when leaf first.
        """
        self._sweep(_SWEEP_RUNS)
        member = self._members.get(worker)
        if member is None:
            return 0
        removed = 0
        lost: dict[SequenceHash, SequenceHash | None] = {}
        unwanted = dict.fromkeys(block_hashes)
        for block in unwanted:
            if self._is_attached(member, block):
                lost |= self._tree.release(block, member.bit)
            elif member.take_aside(block):
                self._aside_pairs -= 1
            elif block not in lost:
                continue
            removed += 1
        member.pairs -= len(lost)
        self._keep_aside(
            member, {block: above for block, above in lost.items() if block not in unwanted and above is not None}
        )
        return removed

    def clear(self, worker: WorkerRank) -> None:
        """Forget every block of one rank, e.g. because its cache was cleared; see `remove_rank`."""
        self.remove_rank(worker)

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Forget all ranks of a worker."""
        for worker in self._members.keys() | self._incomplete:
            if worker.worker_id == worker_id:
                self.remove_rank(worker)

    def remove_rank(self, worker: WorkerRank) -> None:
        """Forget one rank of a worker. O(1) but for its orphans; a sweep returns the memory."""
        self._sweep(_SWEEP_RUNS)
        self._incomplete.discard(worker)
        member = self._members.pop(worker, None)
        if member is None:
            return
        self._aside_pairs -= len(member.aside)
        number = member.bit.bit_length() - 1
        self._owners[number] = None
        self._alive &= ~member.bit
        self._decoded.clear()
        if member.pairs:
            self._retired |= member.bit
        else:
            self._free_bits.append(number)

    def check_integrity(self) -> None:
        """Assert the laws of this module and of its runs; O(keys x ranks), for tests."""
        self._tree.check_integrity()
        wiped_or_waiting = self._retired | self._tree.wiping
        assert not self._alive & wiped_or_waiting
        for run in self._tree.order:
            assert not run.mask & ~(self._alive | wiped_or_waiting)
            assert run.parent is not None
            assert not run.mask & self._alive & ~run.parent.mask
        for worker, member in self._members.items():
            assert member.worker == worker
            assert member.bit.bit_count() == 1
            assert member.bit & self._alive
            assert self._owners[member.bit.bit_length() - 1] == worker
            assert member.pairs == sum(len(run.keys) for run in self._tree.order if run.mask & member.bit)
            assert len(member.aside) <= self._max_aside
            assert {(block, above) for above, blocks in member.below.items() for block in blocks} == set(
                member.aside.items()
            )
            assert not any(self._is_attached(member, key) for pair in member.aside.items() for key in pair)
        assert len(self._members) == self._alive.bit_count()
        assert self._aside_pairs == sum(len(member.aside) for member in self._members.values())
        assert self._max_pairs is None or self._tree.pairs + self._aside_pairs <= self._max_pairs
        assert all(not (self._alive | wiped_or_waiting) >> number & 1 for number in self._free_bits)

    def _try_store(
        self, worker: WorkerRank, parent: SequenceHash | None, blocks: Sequence[SequenceHash]
    ) -> StoreOutcome:
        member = self._members.get(worker)
        if member is not None and parent is not None and parent in member.aside:
            return self._try_store_aside(member, parent, blocks)
        if parent is not None and not self._is_attached(member, parent):
            return StoreOutcome(StoreResult.UNKNOWN_PARENT)
        path = self._tree.follow(parent, blocks)
        if path is None:
            return StoreOutcome(StoreResult.CONFLICTING_PARENT)
        held = path.held(member.bit if member else 0)
        fresh = blocks[held:]
        returning = 0
        if member is not None and member.aside:
            for above, block in zip([blocks[held - 1] if held else parent, *fresh], fresh, strict=False):
                if member.aside.get(block, above) != above:
                    return StoreOutcome(StoreResult.CONFLICTING_PARENT)
                returning += block in member.aside
        stored = len(fresh) - returning
        if not self._has_room(stored):
            return StoreOutcome(StoreResult.FULL)
        if fresh:
            member = member or self._join(worker)
            self._tree.hold(path, member.bit)
            member.pairs += len(fresh)
            self._reattach(member, fresh)
        return StoreOutcome(StoreResult.STORED, stored, len(blocks) - stored)

    def _try_store_aside(self, member: _Member, parent: SequenceHash, blocks: Sequence[SequenceHash]) -> StoreOutcome:
        fresh: dict[SequenceHash, SequenceHash] = {}
        for above, block in zip([parent, *blocks], blocks, strict=False):
            known = block in member.aside or block in fresh
            known_above = member.aside.get(block, fresh.get(block))
            if not known and block in self._tree.runs:
                known, known_above = True, self._tree.parent_of(block)
            if known and known_above != above:
                return StoreOutcome(StoreResult.CONFLICTING_PARENT)
            if block not in member.aside:
                fresh[block] = above
        if len(member.aside) + len(fresh) > self._max_aside or not self._has_room(len(fresh)):
            return StoreOutcome(StoreResult.FULL)
        self._keep_aside(member, fresh)
        return StoreOutcome(StoreResult.STORED, len(fresh), len(blocks) - len(fresh))

    def _keep_aside(self, member: _Member, orphans: dict[SequenceHash, SequenceHash]) -> None:
        if len(member.aside) + len(orphans) > self._max_aside:
            self._dropped_aside += len(orphans)
            self._incomplete.add(member.worker)
            return
        self._aside_pairs += len(orphans)
        for block, above in orphans.items():
            member.put_aside(block, above)

    def _reattach(self, member: _Member, returned: Sequence[SequenceHash]) -> None:
        """Attach what was kept aside below blocks that are attached again, and below those, and so on."""
        if not member.aside:
            return
        self._aside_pairs -= sum(member.take_aside(block) for block in returned)
        above_orphans = list(returned)
        while above_orphans:
            above = above_orphans.pop()
            for block in sorted(member.below.get(above, ())):
                member.take_aside(block)
                self._aside_pairs -= 1
                path = self._tree.follow(above, [block])
                if path is None:
                    self._dropped_aside += 1
                    self._incomplete.add(member.worker)
                    continue
                self._tree.hold(path, member.bit)
                member.pairs += 1
                above_orphans.append(block)

    def _join(self, worker: WorkerRank) -> _Member:
        """Give a rank a bit that no run has."""
        if not self._free_bits:
            self._free_bits.append(len(self._owners))
            self._owners.append(None)
        number = self._free_bits.pop()
        self._owners[number] = worker
        self._alive |= 1 << number
        member = self._members[worker] = _Member(worker, 1 << number)
        return member

    def _sweep(self, run_count: int) -> None:
        """Wipe retired bits from some runs, and free the bits when a sweep is whole."""
        if not self._tree.wiping:
            if not self._retired:
                return
            self._tree.begin_wipe(self._retired)
            self._retired = 0
        self._free_bits += _bit_numbers(self._tree.wipe(run_count))

    def _has_room(self, pairs: int) -> bool:
        if self._max_pairs is None or not pairs:
            return True
        return self._tree.pairs + self._aside_pairs + pairs <= self._max_pairs

    def _is_attached(self, member: _Member | None, block: SequenceHash) -> bool:
        run = self._tree.runs.get(block)
        return member is not None and run is not None and bool(run.mask & member.bit)

    def _ranks_of(self, mask: int) -> tuple[WorkerRank, ...]:
        ranks = self._decoded.get(mask)
        if ranks is None:
            owners = (self._owners[number] for number in _bit_numbers(mask))
            ranks = tuple(owner for owner in owners if owner is not None)
            if len(self._decoded) >= _DECODED_MASKS:
                self._decoded.clear()
            self._decoded[mask] = ranks
        return ranks


def _bit_numbers(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _first_key(run: Run) -> SequenceHash:
    return run.keys[0]
