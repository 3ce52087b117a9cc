"""One booking, and what one rank carries: the rows of the load table."""

from dataclasses import dataclass, field

from kvmesh.core.ids import AttemptKey, Epoch, WorkerRank
from kvmesh.core.load_report import LoadReport, RouterLoad

_PARTS = 64
"""What output blocks are counted in, so that sums of decayed ones stay exact."""


@dataclass(slots=True)
class Booking:
    """A booked request."""

    key: AttemptKey
    reservation_id: int
    worker: WorkerRank
    keys: list[int]
    """Of its blocks, each unique for the block and all before it."""
    unhashed_blocks: int
    content: tuple[object, ...]
    """What it was booked with; the same again is the same booking."""
    prefill_tokens: int
    expected_output_blocks: float | None
    seen_at: float
    """When it was booked or, later, last shown by a report."""
    was_shown: bool = False
    accepted_sequence: int | None = None
    """The worker's load sequence when it acknowledged the submit: later reports know of this booking."""
    output_blocks: int = 0

    @property
    def output_parts(self) -> int:
        """What the output blocks count as, in parts of a block.

        Where the length is expected, the block with which `n` of `expected` blocks are there counts as
        max(1 - n / expected, 0): what nears its end will soon be gone.
        """
        if self.expected_output_blocks is None:
            return self.output_blocks * _PARTS
        counting = min(self.output_blocks, int(self.expected_output_blocks))
        if not counting:
            return 0
        return round(_PARTS * (counting - counting * (counting + 1) / (2 * self.expected_output_blocks)))

    def is_ended_by(self, report: LoadReport) -> bool:
        """Tell whether a report proves it to be over."""
        if self.reservation_id in report.reservation_ids:
            return False
        return self.was_shown or (self.accepted_sequence is not None and report.sequence > self.accepted_sequence)


@dataclass(slots=True)
class RankLoad:
    """What one rank carries, summed up."""

    epoch: Epoch
    since: float
    row: int
    """Of its columns."""
    report: LoadReport | None = None
    others: RouterLoad = RouterLoad()
    """Reported load that is not this router's."""
    bookings: dict[AttemptKey, Booking] = field(default_factory=dict)
    held_blocks: int = 0
    """Blocks that bookings hold, each counted once."""
    unhashed_blocks: int = 0
    output_parts: int = 0
    prefill_tokens: int = 0

    @property
    def estimate(self) -> RouterLoad:
        """Return the sum; parts of output blocks are rounded up to whole ones."""
        others = self.others
        return RouterLoad(
            len(self.bookings) + others.active_requests,
            self.prefill_tokens + others.prefill_tokens,
            self.held_blocks + self.unhashed_blocks - (-self.output_parts // _PARTS) + others.decode_blocks,
        )
