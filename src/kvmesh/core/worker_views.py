"""What a router answers about its workers: the nouns of `WorkerStates`."""

from dataclasses import dataclass

from kvmesh.core.ids import AttemptKey, WorkerRank
from kvmesh.core.load_report import LoadReport, RouterLoad
from kvmesh.core.roster import RosterOutcome, WorkerRecord


@dataclass(frozen=True, slots=True)
class WorkerChange:
    """What a change of the roster did."""

    outcome: RosterOutcome
    released: tuple[AttemptKey, ...] = ()
    """Bookings that ended with the incarnation before."""
    policy_fault: str = ""
    """What the policy raised when told to forget the worker; "" = nothing."""


@dataclass(frozen=True, slots=True)
class PotentialLoad:
    """What a worker rank would carry with one more request."""

    worker: WorkerRank
    prefill_tokens: int
    decode_blocks: int
    active_requests: int
    """Without that request."""


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """What the router knows of one worker rank."""

    worker: WorkerRank
    record: WorkerRecord
    load: RouterLoad
    """The estimate that routing uses."""
    reservations: int
    """This router's own bookings, which the estimate includes."""
    report: LoadReport | None
    """The last one; None before the first."""
    load_age_s: float
    """Since its last report or, before the first, since it is followed."""
    index_age_s: float | None
    """None before its first KV event."""
    indexed_blocks: int
    """Blocks of it in the index; too many if the index had to drop some, which it says in its own figures."""
    is_stale: bool
    is_index_degraded: bool
