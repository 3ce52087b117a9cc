"""What the prefill queue tells the world, as data: the queue collects effects, its caller takes and delivers them.

To the submitter of a task:   TaskQueued, TaskLeased, TaskBackedOff, then exactly one Outcome
To the worker on its Attach:  LeaseRevoked, DrainRequested, WorkerSuperseded
TaskQueued also means that a waiting Lease may now be served: there is no other cause for new work.
"""

from dataclasses import dataclass
from typing import Any

from kvmesh.core.errors import Reason
from kvmesh.core.ids import AttemptKey, Epoch, LeaseId, WorkerId


@dataclass(frozen=True, slots=True)
class TaskQueued:
    """The task is in line: after Submit, after a lost lease, after its backoff."""

    key: AttemptKey
    position: int
    """Tasks before it, whatever worker they need; 0 = next."""
    attempts: int
    """Leases granted so far."""


@dataclass(frozen=True, slots=True)
class TaskLeased:
    """A worker took it."""

    key: AttemptKey
    worker_id: WorkerId
    attempt: int
    """Number of this lease of the task, from 1."""


@dataclass(frozen=True, slots=True)
class TaskBackedOff:
    """The holder failed it and it may be tried again, not before `visible_at`."""

    key: AttemptKey
    attempt: int
    """The one that failed."""
    visible_at: float
    detail: str


@dataclass(frozen=True, slots=True)
class TaskCompleted:
    """Outcome: the holder completed it."""

    key: AttemptKey
    result: Any
    """What the holder gave, untouched."""


@dataclass(frozen=True, slots=True)
class TaskDead:
    """Outcome: it failed for good, its attempts used up or its failure not retryable."""

    key: AttemptKey
    attempts: int
    detail: str
    """Last cause, for the operator's log."""
    reason: Reason = Reason.PREFILL_FAILED


@dataclass(frozen=True, slots=True)
class TaskExpired:
    """Outcome: its time-to-live ended."""

    key: AttemptKey
    reason: Reason = Reason.DEADLINE


@dataclass(frozen=True, slots=True)
class TaskCancelled:
    """Outcome: its submitter dropped it."""

    key: AttemptKey
    reason: Reason = Reason.CANCELLED


Outcome = TaskCompleted | TaskDead | TaskExpired | TaskCancelled


@dataclass(frozen=True, slots=True)
class LeaseRevoked:
    """The holder, still attached, may stop: the task was cancelled, its time-to-live ended, or its lease expired."""

    key: AttemptKey
    worker_id: WorkerId
    epoch: Epoch
    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """The worker gets no further leases: it should finish what it holds and leave."""

    worker_id: WorkerId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class WorkerSuperseded:
    """A later incarnation attached under the same worker_id: the stream of this epoch is to be closed."""

    worker_id: WorkerId
    epoch: Epoch


Effect = TaskQueued | TaskLeased | TaskBackedOff | Outcome | LeaseRevoked | DrainRequested | WorkerSuperseded
