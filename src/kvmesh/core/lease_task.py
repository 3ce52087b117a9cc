"""A prefill task: its states, every legal move between them, and what is known of it while it lives.

Submit --> QUEUED --GRANT--> LEASED --COMPLETE-------------------> COMPLETED
             ^  ^              |
             |  +----LOSE------+--GIVE_UP------------------------> DEAD
             |                 |
             +--READY-- DELAYED <--BACK_OFF

from each of the three live states: CANCEL --> CANCELLED, EXPIRE --> EXPIRED
"""

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from kvmesh.core.ids import AttemptKey, Epoch, LeaseId, SequenceHash, WorkerId
from kvmesh.core.lease_capability import Capability
from kvmesh.core.lease_effects import Outcome


class TaskState(StrEnum):
    """Where a task is. The first three are live, the others terminal."""

    QUEUED = "queued"
    """In line: the next Lease of a worker that can do it may take it."""
    LEASED = "leased"
    """Held by one worker under one lease_id until the lease expires."""
    DELAYED = "delayed"
    """Out of line after a failure, until its backoff ends."""
    COMPLETED = "completed"
    """Its holder completed it; the result is remembered for a while."""
    DEAD = "dead"
    """It failed and is not tried again; a dead letter is kept."""
    EXPIRED = "expired"
    """Its time-to-live ended first."""
    CANCELLED = "cancelled"
    """Its submitter dropped it. The only terminal state that a new Submit under the same key leaves, as a new task."""


class TaskEvent(StrEnum):
    """Why a task moves."""

    GRANT = "grant"
    """A Lease took it."""
    LOSE = "lose"
    """Its lease expired, or its holder detached or was superseded, with attempts left: requeued at once, place kept."""
    BACK_OFF = "back_off"
    """Its holder failed it as retryable, with attempts left."""
    READY = "ready"
    """Its backoff ended: it joins the end of its priority, behind the fresh tasks that waited meanwhile."""
    GIVE_UP = "give_up"
    """Its holder failed it as not retryable, or the last attempt failed or was lost."""
    COMPLETE = "complete"
    """Its holder completed it."""
    CANCEL = "cancel"
    """Its submitter cancelled it."""
    EXPIRE = "expire"
    """Its time-to-live ended."""


TRANSITIONS: MappingProxyType[TaskState, MappingProxyType[TaskEvent, TaskState]] = MappingProxyType(
    {
        TaskState.QUEUED: MappingProxyType(
            {
                TaskEvent.GRANT: TaskState.LEASED,
                TaskEvent.CANCEL: TaskState.CANCELLED,
                TaskEvent.EXPIRE: TaskState.EXPIRED,
            }
        ),
        TaskState.LEASED: MappingProxyType(
            {
                TaskEvent.LOSE: TaskState.QUEUED,
                TaskEvent.BACK_OFF: TaskState.DELAYED,
                TaskEvent.GIVE_UP: TaskState.DEAD,
                TaskEvent.COMPLETE: TaskState.COMPLETED,
                TaskEvent.CANCEL: TaskState.CANCELLED,
                TaskEvent.EXPIRE: TaskState.EXPIRED,
            }
        ),
        TaskState.DELAYED: MappingProxyType(
            {
                TaskEvent.READY: TaskState.QUEUED,
                TaskEvent.CANCEL: TaskState.CANCELLED,
                TaskEvent.EXPIRE: TaskState.EXPIRED,
            }
        ),
        TaskState.COMPLETED: MappingProxyType({}),
        TaskState.DEAD: MappingProxyType({}),
        TaskState.EXPIRED: MappingProxyType({}),
        TaskState.CANCELLED: MappingProxyType({}),
    }
)
"""The whole state machine; a pair that is not here is illegal. A task is born QUEUED."""

LIVE_STATES = frozenset(state for state, moves in TRANSITIONS.items() if moves)


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What a submitter asks for."""

    key: AttemptKey
    content: bytes
    """Digest of the request: a second Submit under `key` is the same task only if it is equal."""
    requirement: Capability
    priority: int = 10
    """0 goes first."""
    uncached_tokens: int = 0
    """Prompt tokens to compute; what a Lease's token budget counts."""
    block_hashes: tuple[SequenceHash, ...] = ()
    """Of the prompt's full blocks, for affinity."""
    expires_at: float | None = None
    """End of its time-to-live on the caller's clock; it is not part of `content`."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One worker's right to a task, valid while now < `expires_at`."""

    lease_id: LeaseId
    worker_id: WorkerId
    epoch: Epoch
    expires_at: float


@dataclass(slots=True, eq=False)
class Task:
    """A live task, changed by the queue alone."""

    spec: TaskSpec
    payload: Any
    arrival: int
    """Place within its priority, unique among live tasks."""
    state: TaskState = TaskState.QUEUED
    attempts: int = 0
    """Leases granted so far."""
    skips: int = 0
    """Times a younger task was preferred to it for its prefix."""
    lease: Lease | None = None
    """Set exactly while LEASED."""
    visible_at: float | None = None
    """Set exactly while DELAYED."""

    @property
    def deadline(self) -> float | None:
        """When time alone moves it next; None = never."""
        due = self.lease.expires_at if self.lease is not None else self.visible_at
        if due is None or self.spec.expires_at is None:
            return due if due is not None else self.spec.expires_at
        return min(due, self.spec.expires_at)


@dataclass(frozen=True, slots=True)
class FinishedTask:
    """What is remembered of a task that ended: its answer, for whoever submits or completes it again."""

    content: bytes
    state: TaskState
    outcome: Outcome
    finished_at: float
    lease_id: LeaseId | None = None
    """The lease that completed it."""


@dataclass(frozen=True, slots=True)
class SubmitResult:
    """Where a submitted task stands."""

    state: TaskState
    already: bool
    """This key with this content was here before; nothing was changed."""
    position: int | None = None
    """Tasks before it; set while QUEUED."""
    outcome: Outcome | None = None
    """Set when it has already ended: the answer it got then."""


@dataclass(frozen=True, slots=True)
class Grant:
    """One leased task, as its holder gets it."""

    key: AttemptKey
    lease_id: LeaseId
    attempt: int
    """Number of this lease of the task, from 1; not the request's attempt, which is in `key`."""
    ttl_s: float
    """Until the lease ends: the limit, or less where the task's time-to-live ends first."""
    expires_at: float
    payload: Any


@dataclass(frozen=True, slots=True)
class TaskView:
    """A copy of a task's state, for inspection."""

    key: AttemptKey
    state: TaskState
    priority: int
    attempts: int
    skips: int
    position: int | None
    lease: Lease | None
    visible_at: float | None
    expires_at: float | None
