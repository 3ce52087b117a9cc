"""What a decision asks of an index of cached blocks, whichever kind it is."""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol, runtime_checkable

from kvmesh.core.ids import SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_records import IndexStats


class IndexMode(Enum):
    """Where a router's knowledge of caches comes from."""

    EVENTS = "events"
    """What the workers say they hold."""
    APPROXIMATE = "approximate"
    """What was routed to them lately, for workers that send no events."""
    OFF = "off"
    """Nowhere: overlap is 0 everywhere."""


class CacheIndex(Protocol):
    """Leading blocks of a prompt by rank; a rank is one bit of a mask."""

    @property
    def version(self) -> int:
        """A number that changes whenever a rank gets or loses its bit."""

    @property
    def stats(self) -> IndexStats:
        """The current figures."""

    def bit_of(self, worker: WorkerRank) -> int | None:
        """Return the number of a rank's bit; None while it holds nothing."""

    def match(self, block_hashes: Sequence[SequenceHash]) -> dict[WorkerRank, int]:
        """Return the leading blocks that each rank holds, ranks with none left out."""

    def match_masks(self, block_hashes: Sequence[SequenceHash]) -> Sequence[tuple[int, int]]:
        """Return (bits of the ranks that hold exactly so many leading blocks, how many), no rank twice, no depth 0."""

    def limit(self, worker: WorkerRank, max_blocks: int | None) -> None:
        """Bound the blocks of one rank; None: no bound of its own."""

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Forget all ranks of a worker."""


@runtime_checkable
class LearnsRoutes(Protocol):
    """What an index also has that is told what was routed, and forgets it by age."""

    def record(self, worker: WorkerRank, blocks: Sequence[SequenceHash], now: float) -> None:
        """Note that a prompt was booked on a rank."""

    def expire(self, now: float) -> int:
        """Forget what is too old, and count it."""


class NoIndex:
    """Knows of no cached block; `IndexMode.OFF`."""

    version = 0
    stats = IndexStats(0, 0, 0, 0, 0, frozenset(), 0, 0, 0, 0)

    def bit_of(self, worker: WorkerRank) -> int | None:
        """Return None."""
        return None

    def match(self, block_hashes: Sequence[SequenceHash]) -> dict[WorkerRank, int]:
        """Return nobody."""
        return {}

    def match_masks(self, block_hashes: Sequence[SequenceHash]) -> Sequence[tuple[int, int]]:
        """Return nobody."""
        return ()

    def limit(self, worker: WorkerRank, max_blocks: int | None) -> None:
        """Do nothing."""

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Do nothing."""
