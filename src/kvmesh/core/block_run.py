"""One run of `RunTree`: a stretch of one sequence that the same bits hold, and the paths that lead through runs."""

from array import array
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from kvmesh.core.ids import LocalHash, SequenceHash
from kvmesh.core.prefix_keys import local_between, next_key, prefix_keys

ANCHOR_BLOCKS = 64
"""A power of two: keys at its multiples in a sequence are found without knowing where runs begin."""
_FEW = 8
"""So few keys are made faster one by one."""


@dataclass(slots=True, eq=False)
class Run:
    """A stretch of one sequence. The root has no blocks, no parent and every bit."""

    hashes: "array[int]"
    keys: "array[int]"
    """Of the same blocks; empty where some local hash from the first block on is not known."""
    mask: int
    parent: "Run | None"
    depth: int = 0
    """Blocks of the sequence above this run."""
    first_child: "Run | None" = None
    next_sibling: "Run | None" = None
    previous_sibling: "Run | None" = None
    slot: int = -1
    """Position in the wipe's order; -1 when it is not, or no longer, in the tree."""
    number: int = -1
    """Its own as long as it is in the tree."""

    @property
    def end(self) -> int:
        """Blocks of the sequence down to the end of this run."""
        return self.depth + len(self.hashes)

    @property
    def above(self) -> SequenceHash | None:
        """The block above the first of this run; None for a sequence's first block."""
        return SequenceHash(self.parent.hashes[-1]) if self.parent and self.parent.hashes else None

    @property
    def begins_at_anchor(self) -> bool:
        """True if its first key would be found if it began earlier."""
        return self.depth % ANCHOR_BLOCKS == 0

    def children(self) -> Iterator["Run"]:
        """Yield the runs right below; none may be linked or unlinked meanwhile."""
        child = self.first_child
        while child is not None:
            yield child
            child = child.next_sibling

    def copy(self) -> "Run":
        """Return this run as it is now, without children, below a run of the one block above it."""
        above = self.parent and Run(self.parent.hashes[-1:], self.parent.keys[-1:], self.parent.mask, None)
        return Run(self.hashes[:], self.keys[:], self.mask, above, depth=self.depth)

    def local_hashes(self, start: int = 0) -> list[LocalHash] | list[None]:
        """Return the local hash of every block from position `start` on, which the keys tell, or None where they don't.

        The run must still be linked to its parent.
        """
        if not self.keys:
            return [None] * (len(self.hashes) - start)
        above = self.keys[start - 1] if start else self.parent.keys[-1] if self.parent and self.parent.keys else 0
        found = []
        for depth, key in enumerate(self.keys[start:], start=self.depth + start):
            found.append(local_between(above, key, depth=depth))
            above = key
        return found


class Lost(NamedTuple):
    """Neighbouring blocks that a bit has lost, each below its predecessor."""

    above: SequenceHash | None
    """What the first is below."""
    hashes: list[SequenceHash]
    local_hashes: list[LocalHash] | list[None]
    """Empty where all of these blocks were unwanted."""


@dataclass(slots=True)
class Path:
    """Where a sequence of blocks leads from a known block: first through runs, then into the unknown."""

    start: Run
    """The run of the known block."""
    in_start: int
    """Blocks of the sequence that lie in it too."""
    entered: list[Run]
    """The runs after it."""
    end: int
    """Blocks of the last run that are on the path."""
    rest: Sequence[SequenceHash]
    """Blocks that no run has."""
    short_rest: list[int]
    """The bits of their hashes that they are looked up by."""

    @property
    def last(self) -> Run:
        """The run in which the known part ends."""
        return self.entered[-1] if self.entered else self.start

    def held(self, bit: int) -> int:
        """Count the leading blocks of the sequence that `bit` holds, given that it holds the known block."""
        count = self.in_start
        for run in self.entered:
            if not run.mask & bit:
                break
            count += self.end if run is self.entered[-1] else len(run.hashes)
        return count


def named_positions(run: Run, start: int, stop: int | None) -> Sequence[int]:
    """Return the positions between two in a run whose keys are in `by_key`."""
    stop = len(run.keys) if stop is None else min(stop, len(run.keys))
    anchors = range(start + -(run.depth + start) % ANCHOR_BLOCKS, stop, ANCHOR_BLOCKS)
    return anchors if start or not stop or run.depth % ANCHOR_BLOCKS == 0 else [0, *anchors]


def keys_below(run: Run, end: int, local_hashes: Sequence[int]) -> "array[int]":
    """Return the keys of blocks that follow the first `end` of a run; none if those of the run are not known."""
    keys = array("Q")
    if not local_hashes or (end and not run.keys):
        return keys
    above, depth = run.keys[end - 1] if end else 0, run.depth + end
    if len(local_hashes) >= _FEW:
        local = np.frombuffer(array("Q", local_hashes), dtype=np.uint64)
        keys.frombytes(prefix_keys(local, after=above, depth=depth).tobytes())
        return keys
    for local_hash in local_hashes:
        above = next_key(above, local_hash, depth=depth)
        keys.append(above)
        depth += 1
    return keys


def lost_from(run: Run, start: int, unwanted: Container[SequenceHash]) -> Lost:
    """Return what a run has from a position on; it must still be linked to its parent."""
    above = SequenceHash(run.hashes[start - 1]) if start else run.above
    hashes = cast("list[SequenceHash]", run.hashes[start:].tolist())
    is_wanted = any(block not in unwanted for block in hashes)
    return Lost(above, hashes, run.local_hashes(start) if is_wanted else [])


def link(run: Run) -> None:
    """Enter a run into the list of its parent's children."""
    assert run.parent is not None
    run.next_sibling = run.parent.first_child
    if run.next_sibling is not None:
        run.next_sibling.previous_sibling = run
    run.parent.first_child = run


def unlink(run: Run) -> None:
    """Take a run out of the list of its parent's children."""
    assert run.parent is not None
    if run.previous_sibling is not None:
        run.previous_sibling.next_sibling = run.next_sibling
    else:
        run.parent.first_child = run.next_sibling
    if run.next_sibling is not None:
        run.next_sibling.previous_sibling = run.previous_sibling
    run.next_sibling = run.previous_sibling = None
