"""What a worker rank says of its load, and what became of the saying."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from kvmesh.core.ids import AttemptKey, Epoch, RouterId


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """Load that reached a worker one way: through one router, or unrouted."""

    active_requests: int = 0
    prefill_tokens: int = 0
    """Prompt tokens still to be computed there."""
    decode_blocks: int = 0

    def __add__(self, other: "RouterLoad") -> "RouterLoad":
        return RouterLoad(
            self.active_requests + other.active_requests,
            self.prefill_tokens + other.prefill_tokens,
            self.decode_blocks + other.decode_blocks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One load snapshot of a worker rank."""

    epoch: Epoch
    sequence: int
    """Counts reports of one epoch and rank."""
    received_at: float
    """Seconds, on the clock of `now`."""
    active_requests: int = 0
    max_requests: int = 0
    active_blocks: int = 0
    total_blocks: int = 0
    waiting_requests: int = 0
    cache_usage: float = 0.0
    prefix_hit_rate: float = 0.0
    per_router: Mapping[RouterId, RouterLoad] = field(default_factory=dict)
    unrouted: RouterLoad = RouterLoad()
    reservation_ids: frozenset[int] = frozenset()
    """The asking router's reservations that the worker holds."""


class ReportOutcome(Enum):
    """What became of a load report."""

    APPLIED = "applied"
    UNKNOWN_WORKER = "unknown_worker"
    STALE_EPOCH = "stale_epoch"
    """It is not of the live incarnation."""
    OLD_SEQUENCE = "old_sequence"
    """Not newer than the last one applied."""


@dataclass(frozen=True, slots=True)
class ReportResult:
    """What a load report changed."""

    outcome: ReportOutcome
    released: tuple[AttemptKey, ...] = ()
    """Bookings that the report ended."""
