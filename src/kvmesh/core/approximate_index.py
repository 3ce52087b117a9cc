"""Which worker rank was sent which prefix: the index where workers say nothing of their caches.

A rank is taken to hold what was routed to it until that was too long ago, or until so much else was routed there that a
cache of its size would have let go of it, least recently used first. This is a guess, apart from `PrefixIndex`, which
holds what workers say: that does not expire, and this never grows into it.

Laws:
    - every block a rank holds belongs to its latest record that leads through it, so each record owns the end of its
      sequence, and what is below a block never belongs to a later record than the block itself;
    - so letting go of records, the oldest first and each from its end, leaves closed prefixes.

Blocks go by `PromptBlocks.keys`: prompts known by local hashes and others known by sequence hashes alone do not meet.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import cast

from kvmesh.core.ids import SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.core.prefix_records import IndexStats
from kvmesh.core.prompt_blocks import PromptBlocks


@dataclass(slots=True, eq=False)
class _Record:
    worker: WorkerRank
    at: float
    own: list[SequenceHash] = field(default_factory=list)
    """Its own blocks, the last of its sequence; never empty while it counts."""

    def give(self, blocks: Sequence[SequenceHash], start: int) -> list[SequenceHash]:
        """Give up its first blocks as far as they lead along `blocks`, where the first of them is at `start`."""
        count = min(len(self.own), len(blocks) - start)
        if self.own[count - 1] != blocks[start + count - 1]:
            low = 0
            while count - low > 1:
                middle = (low + count) // 2
                low, count = (middle, count) if self.own[middle] == blocks[start + middle] else (low, middle)
        given = self.own[:count]
        del self.own[:count]
        return given


@dataclass(slots=True)
class _Rank:
    owners: dict[SequenceHash, _Record] = field(default_factory=dict)
    records: OrderedDict[_Record, None] = field(default_factory=OrderedDict)
    """The oldest first."""


class ApproximateIndex:
    """Leading blocks per worker rank, as far as they were routed there lately; `now` never goes back."""

    def __init__(self, *, ttl_s: float = 120.0, max_pairs: int = 1_000_000) -> None:
        """Hold what was routed in the last `ttl_s`, at most `max_pairs` (rank, block) pairs, the latest."""
        self._ttl_s = ttl_s
        self._max_pairs = max_pairs
        self._index = PrefixIndex()
        self._ranks: dict[WorkerRank, _Rank] = {}
        self._records: OrderedDict[_Record, None] = OrderedDict()
        self._limits: dict[WorkerRank, int] = {}
        self._pairs = 0

    def match(self, block_hashes: Sequence[SequenceHash]) -> dict[WorkerRank, int]:
        """Return the leading blocks that each rank is taken to hold; what is too old counts until `expire`."""
        return self._index.match(_names(block_hashes))

    def match_masks(self, block_hashes: Sequence[SequenceHash]) -> list[tuple[int, int]]:
        """Return (bits of the ranks that hold exactly so many leading blocks, how many), no rank twice, no depth 0."""
        return self._index.match_masks(_names(block_hashes))

    @property
    def version(self) -> int:
        """A number that changes whenever a rank gets or loses its bit."""
        return self._index.version

    def bit_of(self, worker: WorkerRank) -> int | None:
        """Return the number of a rank's bit in `match_masks`, or None while it has none: then it holds nothing."""
        return self._index.bit_of(worker)

    def depth(self, worker: WorkerRank, block_hashes: Sequence[SequenceHash]) -> int:
        """Count the leading blocks of a prompt that `worker` is taken to hold."""
        return self._index.depth(worker, _names(block_hashes))

    @property
    def stats(self) -> IndexStats:
        """Return the current figures; O(workers)."""
        return self._index.stats

    def limit(self, worker: WorkerRank, max_blocks: int | None) -> None:
        """Say how many blocks a rank's cache has; None: not known. Counts from the next record on."""
        if max_blocks is None:
            self._limits.pop(worker, None)
        else:
            self._limits[worker] = max_blocks

    def record(self, worker: WorkerRank, blocks: Sequence[SequenceHash], now: float) -> None:
        """Note that a prompt went to `worker`: all its blocks are there and in use. O(blocks)."""
        names = cast("list[SequenceHash]", blocks.keys) if isinstance(blocks, PromptBlocks) else blocks
        if not names:
            return
        rank = self._ranks.setdefault(worker, _Rank())
        record = _Record(worker, now)
        held = 0
        while held < len(names) and (owner := rank.owners.get(names[held])) is not None:
            given = owner.give(names, held)
            record.own += given
            held += len(given)
            if not owner.own:
                self._drop(rank, owner)
        fresh = names[held:]
        if fresh:
            self._index.store(worker, parent=names[held - 1] if held else None, block_hashes=fresh)
            self._pairs += len(fresh)
            record.own += fresh
        rank.owners.update(zip(record.own, repeat(record), strict=False))
        rank.records[record] = self._records[record] = None
        self._evict(rank.records, len(rank.owners) - self._limits.get(worker, len(rank.owners)))
        self._evict(self._records, self._pairs - self._max_pairs)

    def expire(self, now: float) -> int:
        """Let go of what was last routed `ttl_s` ago or before, and count the (rank, block) pairs."""
        before = self._pairs
        while self._records:
            oldest = next(iter(self._records))
            if now - oldest.at < self._ttl_s:
                break
            self._evict(self._records, len(oldest.own))
        return before - self._pairs

    def clear(self, worker: WorkerRank) -> None:
        """Forget what was routed to a rank; its limit stays."""
        rank = self._ranks.pop(worker, None)
        if rank is None:
            return
        for record in rank.records:
            del self._records[record]
        self._pairs -= len(rank.owners)
        self._index.clear(worker)

    def remove_rank(self, worker: WorkerRank) -> None:
        """Forget one rank of a worker."""
        self.clear(worker)
        self._limits.pop(worker, None)

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Forget all ranks of a worker."""
        for worker in self._ranks.keys() | self._limits.keys():
            if worker.worker_id == worker_id:
                self.remove_rank(worker)

    def check_integrity(self) -> None:
        """Assert the laws of this module; O(pairs), for tests."""
        self._index.check_integrity()
        assert self._records.keys() == {record for rank in self._ranks.values() for record in rank.records}
        assert self._pairs == self._index.stats.pairs
        for worker, rank in self._ranks.items():
            assert self._index.blocks_of(worker) == rank.owners.keys()
            assert sum(len(record.own) for record in rank.records) == len(rank.owners)
            assert all(rank.owners[block] is record for record in rank.records for block in record.own)
            assert all(record.own and record.worker == worker for record in rank.records)

    def _evict(self, records: OrderedDict[_Record, None], count: int) -> None:
        """Let go of `count` pairs of some of the records."""
        while count > 0:
            oldest = next(iter(records))
            rank = self._ranks[oldest.worker]
            gone = oldest.own[-count:]
            del oldest.own[-count:]
            count -= len(gone)
            self._pairs -= len(gone)
            self._index.remove(oldest.worker, gone)
            for block in gone:
                del rank.owners[block]
            if not oldest.own:
                self._drop(rank, oldest)

    def _drop(self, rank: _Rank, record: _Record) -> None:
        del rank.records[record], self._records[record]


def _names(blocks: Sequence[SequenceHash]) -> Sequence[SequenceHash]:
    names = (blocks.key_view or blocks.keys) if isinstance(blocks, PromptBlocks) else blocks
    return cast("Sequence[SequenceHash]", names)
