"""Which worker rank holds which prefix.

Laws:
    - A block's sequence hash, that of core/hashing.py, stands for it and all before it, and has one parent for ever.
    - Closed prefix: a rank that holds a block here holds its parent here. What a rank holds below a block it lost is
      kept aside, per rank and bounded, and re-attached when that block returns.
    - So the ranks that hold block i of a sequence only shrink as i grows, and `match` bisects; it never walks.

A rank is one bit. Forgetting a rank retires its bit at once; a sweep over the runs of blocks (`core/block_runs.py`), a
few per later call that changes the index, wipes retired bits, and a bit is given out again only after a whole sweep, so
that no rank inherits anything.

At `max_pairs` (pairs attached, aside, and retired but not yet swept) a store first finishes the sweep; if it still
does not fit it is refused whole, counted, and its rank listed in `stats.incomplete` until it is cleared or removed. The
same goes for a rank at its own limit (`limit`): one that stores far more than its worker said it has room for has lost
removals on the way. Nothing expires by age: what a worker says it holds is true until it says otherwise or is gone.
What was only routed to it is another index, `core/approximate_index.py`, and that one expires.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

from kvmesh.core.block_run import Run
from kvmesh.core.block_runs import RunTree
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_match import match_masks
from kvmesh.core.prefix_records import HeldBlock, IndexStats, StoreOutcome, StoreResult
from kvmesh.core.rank_bits import RankBits
from kvmesh.core.rank_blocks import Orphan, RankBlocks, orphans_of

__all__ = ["HeldBlock", "IndexStats", "PrefixIndex", "StoreOutcome", "StoreResult"]

_SWEEP_RUNS = 16
"""Runs wiped per change."""


class PrefixIndex:
    """Leading blocks per worker rank, by bisection; see the module for laws and bounds. Not thread-safe."""

    def __init__(self, *, max_pairs: int | None = None, max_aside_per_worker: int = 16_384) -> None:
        """Bound memory to `max_pairs` (rank, block) pairs, and to so many orphan pairs of one rank; None: no bound."""
        self._max_pairs = max_pairs
        self._max_aside = max_aside_per_worker
        self._tree = RunTree()
        self._members: dict[WorkerRank, RankBlocks] = {}
        self._aside_pairs = 0
        self._limits: dict[WorkerRank, int] = {}
        self._incomplete: set[WorkerRank] = set()
        self._bits = RankBits()
        self._rejected = dict.fromkeys(StoreResult, 0)
        self._dropped_aside = 0

    def match(self, block_hashes: Sequence[SequenceHash]) -> dict[WorkerRank, int]:
        """Return the leading blocks that each rank holds, ranks with none left out; see `match_masks`."""
        depths: dict[WorkerRank, int] = {}
        for mask, depth in self.match_masks(block_hashes):
            depths.update(dict.fromkeys(self._bits.ranks_of(mask), depth))
        return depths

    def match_masks(self, block_hashes: Sequence[SequenceHash]) -> list[tuple[int, int]]:
        """Return (bits of the ranks that hold exactly so many leading blocks, how many), no rank twice, no depth 0.

        `block_hashes` must be one chained sequence; `PromptBlocks` with local hashes need not be chained for it as long
        as every store brought local hashes too. O(d log n) for n blocks, see `core/prefix_match.py`.
        """
        return match_masks(self._tree, self._bits.alive, block_hashes)

    @property
    def version(self) -> int:
        """A number that changes whenever a rank gets or loses its bit."""
        return self._bits.version

    def bit_of(self, worker: WorkerRank) -> int | None:
        """Return the number of a rank's bit in `match_masks`, or None while it has none: then it holds nothing."""
        member = self._members.get(worker)
        return member.bit.bit_length() - 1 if member is not None else None

    def depth(self, worker: WorkerRank, block_hashes: Sequence[SequenceHash]) -> int:
        """Count the leading blocks of one chained sequence that `worker` holds; O(log n) like `match_masks`."""
        member = self._members.get(worker)
        found = match_masks(self._tree, member.bit, block_hashes) if member is not None else ()
        return found[0][1] if found else 0

    def blocks_of(self, worker: WorkerRank) -> frozenset[SequenceHash]:
        """Return every block `worker` holds, aside ones too, to compare with its own table; O(blocks)."""
        member = self._members.get(worker)
        if member is None:
            return frozenset()
        runs = (run for run in self._tree.order if run.mask & member.bit)
        return frozenset(SequenceHash(block) for run in runs for block in run.hashes) | member.aside.keys()

    def dump(self) -> Iterator[HeldBlock]:
        """Return all attached pairs, parents first, in an order that depends on the content alone.

        They are those of now, whatever happens to the index before they are consumed: its runs are copied here,
        O(blocks) of plain memory, and made into pairs as they are asked for. Orphans are left out: no store could
        replay them.
        """
        copies: list[tuple[Run, list[WorkerRank]]] = []
        stack = [self._tree.root]
        while stack:
            run = stack.pop()
            if run.hashes and (holders := sorted(self._bits.ranks_of(run.mask & self._bits.alive))):
                copies.append((run.copy(), holders))
            stack += sorted(run.children(), key=_first_block, reverse=True)
        return _pairs(copies)

    def restore(self, dump: Iterable[HeldBlock]) -> int:
        """Store every pair of a dump, and count those that could be: all of them into an index without bounds."""
        restored = 0
        for held in dump:
            local = None if held.local_hash is None else (held.local_hash,)
            outcome = self.store(held.worker, parent=held.parent, block_hashes=(held.block_hash,), local_hashes=local)
            restored += outcome.result is StoreResult.STORED
        return restored

    def limit(self, worker: WorkerRank, max_blocks: int | None) -> None:
        """Bound the blocks of one rank, attached and aside; None: no bound but `max_pairs`. What it has, it keeps.

        Give it room beyond what its worker advertises, for events on their way and for caches of lower tiers.
        """
        if max_blocks is None:
            self._limits.pop(worker, None)
        else:
            self._limits[worker] = max_blocks

    @property
    def stats(self) -> IndexStats:
        """Return the current figures; O(workers)."""
        pairs = sum(member.pairs for member in self._members.values())
        return IndexStats(
            keys=len(self._tree.by_hash),
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
        self,
        worker: WorkerRank,
        *,
        parent: SequenceHash | None,
        block_hashes: Sequence[SequenceHash],
        local_hashes: Sequence[int] | None = None,
    ) -> StoreOutcome:
        """Record that `worker` holds `block_hashes`, each below its predecessor, the first below `parent`.

        Idempotent. Below a parent kept aside they go aside too. O(blocks), amortised. Blocks that come without
        `local_hashes` (None or empty), and those below them, are found by sequence hash alone; as long as one of them
        is here, every query goes by sequence hashes, which have to be chained for it.

        Raises: FixRequestError(INVALID_FIELD) `local_hashes` if they are not one per block.
        """
        if local_hashes and len(local_hashes) != len(block_hashes):
            raise FixRequestError(
                Reason.INVALID_FIELD, f"{len(local_hashes)} for {len(block_hashes)} blocks", field="local_hashes"
            )
        self._sweep(_SWEEP_RUNS)
        outcome = self._try_store(worker, parent, block_hashes, local_hashes)
        forgotten_in_the_way = outcome.result in (StoreResult.CONFLICTING_PARENT, StoreResult.FULL)
        if forgotten_in_the_way and (self._bits.waiting or self._tree.wiping):
            while self._bits.waiting or self._tree.wiping:
                self._sweep(len(self._tree.order))
            outcome = self._try_store(worker, parent, block_hashes, local_hashes)
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
        unwanted = dict.fromkeys(block_hashes)
        gone: set[SequenceHash] = set()
        orphans: dict[SequenceHash, Orphan] = {}
        removed = 0
        for block in unwanted:
            if block in gone:
                continue
            if self._tree.holds(block, member.bit):
                for lost in self._tree.release(block, member.bit, unwanted=unwanted):
                    member.pairs -= len(lost.hashes)
                    gone.update(lost.hashes)
                    if lost.local_hashes:
                        orphans |= orphans_of(lost, unwanted)
            elif member.take(block) is not None:
                self._aside_pairs -= 1
                removed += 1
        self._keep_aside(member, orphans)
        return removed + len(gone) - len(orphans)

    def clear(self, worker: WorkerRank) -> None:
        """Forget every block of one rank, e.g. because its cache was cleared; its limit stays. See `remove_rank`."""
        self._sweep(_SWEEP_RUNS)
        self._incomplete.discard(worker)
        member = self._members.pop(worker, None)
        if member is None:
            return
        self._aside_pairs -= len(member.aside)
        self._bits.retire(member.bit, is_marked=member.pairs > 0)

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Forget all ranks of a worker."""
        for worker in self._members.keys() | self._incomplete | self._limits.keys():
            if worker.worker_id == worker_id:
                self.remove_rank(worker)

    def remove_rank(self, worker: WorkerRank) -> None:
        """Forget one rank of a worker. O(1) but for its orphans; a sweep returns the memory."""
        self.clear(worker)
        self._limits.pop(worker, None)

    def check_integrity(self) -> None:
        """Assert the laws of this module and of its parts; O(blocks x ranks), for tests."""
        self._tree.check_integrity()
        self._bits.check_integrity()
        assert not self._bits.alive & self._tree.wiping
        for run in self._tree.order:
            assert not run.mask & ~(self._bits.alive | self._bits.waiting | self._tree.wiping)
            assert run.parent is not None
            assert not run.mask & self._bits.alive & ~run.parent.mask
        for worker, member in self._members.items():
            assert self._bits.ranks_of(member.bit) == (worker,) == (member.worker,)
            assert member.pairs == sum(len(run.hashes) for run in self._tree.order if run.mask & member.bit)
            assert len(member.aside) <= self._max_aside
            member.check_integrity()
            assert not any(self._tree.holds(block, member.bit) for block in [*member.aside, *member.below])
        assert len(self._members) == self._bits.alive.bit_count()
        assert self._aside_pairs == sum(len(member.aside) for member in self._members.values())
        assert self._max_pairs is None or self._tree.pairs + self._aside_pairs <= self._max_pairs

    def _try_store(
        self,
        worker: WorkerRank,
        parent: SequenceHash | None,
        blocks: Sequence[SequenceHash],
        local_hashes: Sequence[int] | None,
    ) -> StoreOutcome:
        member = self._members.get(worker)
        if parent is not None:
            if member is None:
                return StoreOutcome(StoreResult.UNKNOWN_PARENT)
            if self._try_extend(member, parent, blocks, local_hashes):
                return StoreOutcome(StoreResult.STORED, len(blocks))
            if parent in member.aside:
                return self._try_store_aside(member, parent, blocks, local_hashes)
            if not self._tree.holds(parent, member.bit):
                return StoreOutcome(StoreResult.UNKNOWN_PARENT)
        return self._try_attach(worker, parent, blocks, local_hashes)

    def _try_extend(
        self,
        member: RankBlocks,
        parent: SequenceHash,
        blocks: Sequence[SequenceHash],
        local_hashes: Sequence[int] | None,
    ) -> bool:
        """Store new blocks at the end of what the rank holds alone, if it is that simple."""
        if member.aside or not self._has_room(member.worker, member, len(blocks)):
            return False
        if not self._tree.extend(parent, blocks, member.bit, local_hashes):
            return False
        member.pairs += len(blocks)
        return True

    def _try_attach(
        self,
        worker: WorkerRank,
        parent: SequenceHash | None,
        blocks: Sequence[SequenceHash],
        local_hashes: Sequence[int] | None,
    ) -> StoreOutcome:
        member = self._members.get(worker)
        path = self._tree.follow(parent, blocks)
        if path is None:
            return StoreOutcome(StoreResult.CONFLICTING_PARENT)
        held = path.held(member.bit if member else 0)
        fresh = blocks[held:]
        returning = member.returning(blocks[held - 1] if held else parent, fresh) if member is not None else 0
        if returning is None:
            return StoreOutcome(StoreResult.CONFLICTING_PARENT)
        stored = len(fresh) - returning
        if not self._has_room(worker, member, stored):
            return StoreOutcome(StoreResult.FULL)
        if fresh:
            if member is None:
                member = self._members[worker] = RankBlocks(worker, self._bits.join(worker))
            self._tree.hold(path, member.bit, local_hashes)
            member.pairs += len(fresh)
            self._reattach(member, fresh)
        return StoreOutcome(StoreResult.STORED, stored, len(blocks) - stored)

    def _try_store_aside(
        self,
        member: RankBlocks,
        parent: SequenceHash,
        blocks: Sequence[SequenceHash],
        local_hashes: Sequence[int] | None,
    ) -> StoreOutcome:
        fresh: dict[SequenceHash, Orphan] = {}
        above = parent
        for block, local_hash in zip(blocks, local_hashes or repeat(None), strict=False):
            orphan = member.aside.get(block) or fresh.get(block)
            if orphan is not None:
                is_known_elsewhere = orphan.parent != above
            else:
                is_known_elsewhere = self._tree.has_elsewhere(block, above)
            if is_known_elsewhere:
                return StoreOutcome(StoreResult.CONFLICTING_PARENT)
            if block not in member.aside:
                fresh[block] = Orphan(above, local_hash)
            above = block
        has_room_aside = len(member.aside) + len(fresh) <= self._max_aside
        if not has_room_aside or not self._has_room(member.worker, member, len(fresh)):
            return StoreOutcome(StoreResult.FULL)
        self._keep_aside(member, fresh)
        return StoreOutcome(StoreResult.STORED, len(fresh), len(blocks) - len(fresh))

    def _keep_aside(self, member: RankBlocks, orphans: dict[SequenceHash, Orphan]) -> None:
        if len(member.aside) + len(orphans) > self._max_aside:
            self._dropped_aside += len(orphans)
            self._incomplete.add(member.worker)
            return
        self._aside_pairs += len(orphans)
        member.put_aside(orphans)

    def _reattach(self, member: RankBlocks, returned: Sequence[SequenceHash]) -> None:
        """Attach what was kept aside below blocks that are attached again, and below those, and so on."""
        if not member.aside:
            return
        self._aside_pairs -= sum(member.take(block) is not None for block in returned)
        above_orphans = list(returned)
        while above_orphans:
            above = above_orphans.pop()
            for block in sorted(member.below.get(above, ())):
                orphan = member.take(block)
                assert orphan is not None
                self._aside_pairs -= 1
                path = self._tree.follow(above, [block])
                if path is None:
                    self._dropped_aside += 1
                    self._incomplete.add(member.worker)
                    continue
                self._tree.hold(path, member.bit, None if orphan.local_hash is None else [orphan.local_hash])
                member.pairs += 1
                above_orphans.append(block)

    def _sweep(self, run_count: int) -> None:
        """Wipe retired bits from some runs, and free the bits when a sweep is whole."""
        if not self._tree.wiping:
            if not self._bits.waiting:
                return
            self._tree.begin_wipe(self._bits.begin_wipe())
        self._bits.free(self._tree.wipe(run_count))

    def _has_room(self, worker: WorkerRank, member: RankBlocks | None, pairs: int) -> bool:
        if not pairs:
            return True
        if self._limits:
            held = member.pairs + len(member.aside) if member is not None else 0
            if held + pairs > self._limits.get(worker, held + pairs):
                return False
        return self._max_pairs is None or self._tree.pairs + self._aside_pairs + pairs <= self._max_pairs


def _first_block(run: Run) -> int:
    return run.hashes[0]


def _pairs(runs: Iterable[tuple[Run, list[WorkerRank]]]) -> Iterator[HeldBlock]:
    for run, holders in runs:
        parent = run.above
        for block, local_hash in zip(run.hashes, run.local_hashes(), strict=True):
            for worker in holders:
                yield HeldBlock(worker, parent, SequenceHash(block), local_hash)
            parent = SequenceHash(block)
