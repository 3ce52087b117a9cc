"""Which worker rank is which bit of a mask.

    free -> join -> alive -> retire -> waiting -> begin_wipe -> (wiped everywhere) -> free
                                     `-> free, if nothing was ever marked with it

A bit that marked anything is given out again only after it was wiped everywhere, so that no rank inherits anything.
"""

from collections.abc import Iterator

from kvmesh.core.ids import WorkerRank

_MAX_DECODED = 4096


class RankBits:
    """The bits of an index; not thread-safe."""

    def __init__(self) -> None:
        """Start with no ranks."""
        self.alive = 0
        self.waiting = 0
        """Retired bits that nobody has begun to wipe."""
        self.version = 0
        """Another number whenever a rank gets or loses its bit."""
        self._owners: list[WorkerRank | None] = []
        """By bit number."""
        self._free: list[int] = []
        """Bit numbers to give out again."""
        self._decoded: dict[int, tuple[WorkerRank, ...]] = {}

    def join(self, worker: WorkerRank) -> int:
        """Give a rank a bit and return it."""
        if not self._free:
            self._free.append(len(self._owners))
            self._owners.append(None)
        number = self._free.pop()
        self._owners[number] = worker
        self.alive |= 1 << number
        self.version += 1
        return 1 << number

    def retire(self, bit: int, *, is_marked: bool) -> None:
        """Take a bit from its rank; `is_marked`: something has the bit, and must be wiped first."""
        number = bit.bit_length() - 1
        self._owners[number] = None
        self.alive &= ~bit
        self.version += 1
        self._decoded.clear()
        if is_marked:
            self.waiting |= bit
        else:
            self._free.append(number)

    def begin_wipe(self) -> int:
        """Return the bits that wait, which wait no more."""
        waiting, self.waiting = self.waiting, 0
        return waiting

    def free(self, wiped: int) -> None:
        """Take back bits that nothing has any more."""
        self._free += bit_numbers(wiped)

    def ranks_of(self, mask: int) -> tuple[WorkerRank, ...]:
        """Return the ranks of some live bits, by bit number."""
        ranks = self._decoded.get(mask)
        if ranks is None:
            owners = (self._owners[number] for number in bit_numbers(mask))
            ranks = tuple(owner for owner in owners if owner is not None)
            if len(self._decoded) >= _MAX_DECODED:
                self._decoded.clear()
            self._decoded[mask] = ranks
        return ranks

    def check_integrity(self) -> None:
        """Assert that a bit is in one state only; O(ranks)."""
        assert not self.alive & self.waiting
        assert [owner is not None for owner in self._owners] == [
            bool(self.alive >> number & 1) for number in range(len(self._owners))
        ]
        assert len(set(self._free)) == len(self._free)
        assert all(not (self.alive | self.waiting) >> number & 1 for number in self._free)


def bit_numbers(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits in a mask, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
