"""What a `PrefixIndex` knows of one rank besides its bit in the runs: how much it holds, and its orphans.

An orphan is a block that the rank holds below one that it lost. It is kept aside, neither it nor its parent attached,
until its parent is attached again.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmesh.core.block_run import Lost
from kvmesh.core.ids import SequenceHash, WorkerRank


class Orphan(NamedTuple):
    """Where a block kept aside belongs."""

    parent: SequenceHash
    local_hash: int | None


@dataclass(slots=True, eq=False)
class RankBlocks:
    """One rank; `aside` and `below` say the same and change together."""

    worker: WorkerRank
    bit: int
    pairs: int = 0
    """Blocks attached."""
    aside: dict[SequenceHash, Orphan] = field(default_factory=dict)
    below: dict[SequenceHash, set[SequenceHash]] = field(default_factory=dict)
    """Orphans by parent."""

    def put_aside(self, orphans: dict[SequenceHash, Orphan]) -> None:
        """Keep orphans aside."""
        self.aside.update(orphans)
        for block, orphan in orphans.items():
            self.below.setdefault(orphan.parent, set()).add(block)

    def take(self, block: SequenceHash) -> Orphan | None:
        """Return an orphan, no longer aside; None if the block is none."""
        orphan = self.aside.pop(block, None)
        if orphan is not None:
            self.below[orphan.parent].discard(block)
            if not self.below[orphan.parent]:
                del self.below[orphan.parent]
        return orphan

    def returning(self, parent: SequenceHash | None, blocks: Iterable[SequenceHash]) -> int | None:
        """Count the orphans among blocks to attach below `parent`; None if one of them belongs elsewhere."""
        count = 0
        if self.aside:
            above = parent
            for block in blocks:
                orphan = self.aside.get(block)
                if orphan is not None and orphan.parent != above:
                    return None
                count += orphan is not None
                above = block
        return count

    def check_integrity(self) -> None:
        """Assert that both tables agree."""
        assert {(block, above) for above, blocks in self.below.items() for block in blocks} == {
            (block, orphan.parent) for block, orphan in self.aside.items()
        }


def orphans_of(lost: Lost, unwanted: Container[SequenceHash]) -> dict[SequenceHash, Orphan]:
    """Return those of the lost blocks that the rank still holds."""
    found: dict[SequenceHash, Orphan] = {}
    above = lost.above
    for block, local_hash in zip(lost.hashes, lost.local_hashes, strict=False):
        if block not in unwanted:
            assert above is not None  # something unwanted is above it
            found[block] = Orphan(above, local_hash)
        above = block
    return found
