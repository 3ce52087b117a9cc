"""What `PrefixIndex` and its naive twin answer with."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvmesh.core.ids import LocalHash, SequenceHash, WorkerRank


class StoreResult(Enum):
    """What became of a store."""

    STORED = "stored"
    UNKNOWN_PARENT = "unknown_parent"
    """The rank holds no such parent."""
    CONFLICTING_PARENT = "conflicting_parent"
    """A block is known below another parent already: the sender's keys are not sequence hashes."""
    FULL = "full"
    """No room under `max_pairs`, the rank's own limit or `max_aside_per_worker`: it is incomplete from now on."""


@dataclass(frozen=True, slots=True)
class StoreOutcome:
    """What one store did; one that is not STORED recorded no block."""

    result: StoreResult
    stored: int = 0
    """Blocks the rank did not hold before, attached or aside."""
    duplicates: int = 0
    """Blocks it held already."""


class HeldBlock(NamedTuple):
    """One (rank, block) pair of a dump; `restore` replays it."""

    worker: WorkerRank
    parent: SequenceHash | None
    block_hash: SequenceHash
    local_hash: LocalHash | None = None
    """None where that of this block, or of one above it, is not known."""


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Figures of an index; `rejected_*` and `dropped_aside` count since it was made."""

    keys: int
    """Distinct blocks, including those of forgotten ranks until they are swept."""
    pairs: int
    """Attached (rank, block) pairs: what `match` sees."""
    aside_pairs: int
    """Orphan pairs, kept below a block that their rank lost."""
    unswept_pairs: int
    """Pairs of forgotten ranks that still take memory."""
    workers: int
    """Ranks that hold at least one block."""
    incomplete: frozenset[WorkerRank]
    """Ranks of which something was refused or dropped for want of room: degraded until cleared and stored anew."""
    rejected_unknown_parent: int
    rejected_conflicting_parent: int
    rejected_full: int
    dropped_aside: int
    """Orphan pairs dropped: no room aside, or in conflict when their parent returned."""
