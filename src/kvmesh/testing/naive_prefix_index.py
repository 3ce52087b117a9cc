"""The naive twin of `PrefixIndex`: a table per rank and a linear walk. It says what the index must answer."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvmesh.core.ids import LocalHash, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_records import HeldBlock, IndexStats, StoreOutcome, StoreResult


class _Block(NamedTuple):
    parent: SequenceHash | None
    local_hash: LocalHash | None


_Held = dict[SequenceHash, _Block]
"""What one rank holds, attached or aside."""


class NaivePrefixIndex:
    """Same calls, answers and figures as `PrefixIndex`, except that forgotten ranks leave nothing to sweep.

    Every block must be given one parent only: the twin does not look for conflicts. It knows the local hash of a block
    where the rank that holds it brought it, so its dump is that of the index where all stores bring them, or none.
    """

    def __init__(self, *, max_pairs: int | None = None, max_aside_per_worker: int = 16_384) -> None:
        """Take the same bounds as `PrefixIndex`."""
        self._max_pairs = max_pairs
        self._max_aside = max_aside_per_worker
        self._held: dict[WorkerRank, _Held] = {}
        self._limits: dict[WorkerRank, int] = {}
        self._incomplete: set[WorkerRank] = set()
        self._rejected: Counter[StoreResult] = Counter()
        self._dropped_aside = 0

    def match(self, block_hashes: Sequence[SequenceHash]) -> dict[WorkerRank, int]:
        """Return the leading blocks that each rank holds, ranks with none left out."""
        depths = {worker: self.depth(worker, block_hashes) for worker in self._held}
        return {worker: depth for worker, depth in depths.items() if depth}

    def depth(self, worker: WorkerRank, block_hashes: Sequence[SequenceHash]) -> int:
        """Count the leading blocks of one chained sequence that `worker` holds."""
        held = self._held.get(worker, {})
        depth = 0
        for block in block_hashes:
            if block not in held:
                break
            depth += 1
        return depth

    def blocks_of(self, worker: WorkerRank) -> frozenset[SequenceHash]:
        """Return every block `worker` holds, aside ones too."""
        return frozenset(self._held.get(worker, {}))

    def dump(self) -> Iterator[HeldBlock]:
        """Yield all attached pairs: blocks depth first, siblings by key, ranks in order."""
        children: dict[SequenceHash | None, set[SequenceHash]] = {}
        holders: dict[SequenceHash, list[WorkerRank]] = {}
        for worker in sorted(self._held):
            for block in self._attached(worker):
                children.setdefault(self._held[worker][block].parent, set()).add(block)
                holders.setdefault(block, []).append(worker)
        stack: list[SequenceHash] = sorted(children.get(None, ()), reverse=True)
        while stack:
            block = stack.pop()
            for worker in holders[block]:
                parent, local_hash = self._held[worker][block]
                yield HeldBlock(worker, parent, block, local_hash)
            stack += sorted(children.get(block, ()), reverse=True)

    @property
    def stats(self) -> IndexStats:
        """Return the current figures."""
        attached = {worker: self._attached(worker) for worker in self._held}
        pairs = sum(len(blocks) for blocks in attached.values())
        return IndexStats(
            keys=len(set().union(*attached.values())),
            pairs=pairs,
            aside_pairs=sum(len(held) for held in self._held.values()) - pairs,
            unswept_pairs=0,
            workers=sum(1 for held in self._held.values() if held),
            incomplete=frozenset(self._incomplete),
            rejected_unknown_parent=self._rejected[StoreResult.UNKNOWN_PARENT],
            rejected_conflicting_parent=0,
            rejected_full=self._rejected[StoreResult.FULL],
            dropped_aside=self._dropped_aside,
        )

    def limit(self, worker: WorkerRank, max_blocks: int | None) -> None:
        """Bound the blocks of one rank; None: no bound."""
        self._limits.pop(worker, None)
        if max_blocks is not None:
            self._limits[worker] = max_blocks

    def store(
        self,
        worker: WorkerRank,
        *,
        parent: SequenceHash | None,
        block_hashes: Sequence[SequenceHash],
        local_hashes: Sequence[int] | None = None,
    ) -> StoreOutcome:
        """Record that `worker` holds `block_hashes`, each below its predecessor, the first below `parent`."""
        held = self._held.get(worker, {})
        if parent is not None and parent not in held:
            self._rejected[StoreResult.UNKNOWN_PARENT] += 1
            return StoreOutcome(StoreResult.UNKNOWN_PARENT)
        local = [None] * len(block_hashes) if local_hashes is None else [LocalHash(known) for known in local_hashes]
        fresh = {
            block: _Block(above, own)
            for block, above, own in zip(block_hashes, [parent, *block_hashes], local, strict=False)
            if block not in held
        }
        goes_aside = parent is not None and parent not in self._attached(worker)
        total = sum(len(blocks) for blocks in self._held.values())
        is_over_limit = len(held) + len(fresh) > self._limits.get(worker, len(held) + len(fresh))
        is_over_bound = self._max_pairs is not None and total + len(fresh) > self._max_pairs
        has_no_room_aside = goes_aside and len(self._aside(worker)) + len(fresh) > self._max_aside
        if has_no_room_aside or (fresh and (is_over_limit or is_over_bound)):
            self._rejected[StoreResult.FULL] += 1
            self._incomplete.add(worker)
            return StoreOutcome(StoreResult.FULL)
        self._held[worker] = held | fresh
        return StoreOutcome(StoreResult.STORED, len(fresh), len(block_hashes) - len(fresh))

    def remove(self, worker: WorkerRank, block_hashes: Sequence[SequenceHash]) -> int:
        """Forget blocks of `worker` and count those it held; what it holds below them goes aside, or is dropped."""
        held = self._held.get(worker, {})
        before = self._aside(worker)
        removed = [held.pop(block) for block in set(block_hashes) if block in held]
        aside = self._aside(worker)
        if len(aside) > self._max_aside:
            for block in aside - before:
                del held[block]
            self._dropped_aside += len(aside - before)
            self._incomplete.add(worker)
        return len(removed)

    def clear(self, worker: WorkerRank) -> None:
        """Forget every block of one rank."""
        self._held.pop(worker, None)
        self._incomplete.discard(worker)

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Forget all ranks of a worker."""
        for worker in {*self._held, *self._incomplete, *self._limits}:
            if worker.worker_id == worker_id:
                self.remove_rank(worker)

    def remove_rank(self, worker: WorkerRank) -> None:
        """Forget one rank of a worker."""
        self.clear(worker)
        self._limits.pop(worker, None)

    def _attached(self, worker: WorkerRank) -> set[SequenceHash]:
        """Walk down from the first blocks of all sequences."""
        held = self._held.get(worker, {})
        attached: set[SequenceHash] = set()
        grown = True
        while grown:
            level = {block for block, (above, _) in held.items() if above is None or above in attached}
            grown = len(level) > len(attached)
            attached = level
        return attached

    def _aside(self, worker: WorkerRank) -> set[SequenceHash]:
        return set(self._held.get(worker, {})) - self._attached(worker)
