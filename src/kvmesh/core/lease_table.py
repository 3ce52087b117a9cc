"""The live tasks and the remembered ended ones, with every index over them; the only place where a task moves.

A task is in `lines` exactly while QUEUED, under its worker in the leases exactly while LEASED, and has one entry in
`deadlines` whenever time alone will move it. `move` is what keeps that true, and emits what follows from the move.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from kvmesh.core.ids import AttemptKey, LeaseId, WorkerId
from kvmesh.core.lease_deadlines import Deadlines
from kvmesh.core.lease_effects import Effect, Outcome, TaskDead, TaskQueued
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.lease_lines import WaitingLines
from kvmesh.core.lease_task import (
    LIVE_STATES,
    TRANSITIONS,
    FinishedTask,
    Lease,
    Task,
    TaskEvent,
    TaskState,
    TaskView,
)


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Counts now, and totals since the start."""

    queued: int
    delayed: int
    leased: int
    """Leases in flight."""
    queued_tokens: int
    """Uncached prompt tokens of the queued tasks."""
    workers: int
    """Attached, draining ones included."""
    draining: int
    ended: Mapping[TaskState, int]
    """Total per terminal state."""
    requeued: int
    """Total of leases lost and requeued."""
    backed_off: int
    leases_lost: int
    """Total of leases that ended unanswered: expired, holder gone or superseded, time-to-live over."""


class TaskTable:
    """All tasks of one queue. Deciding is the queue's; this carries out and keeps account."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self.live: dict[AttemptKey, Task] = {}
        self.finished: dict[AttemptKey, FinishedTask] = {}
        """The latest ended tasks, oldest first."""
        self.dead: deque[TaskDead] = deque(maxlen=limits.dead_kept)
        self.lines = WaitingLines()
        self.deadlines = Deadlines()
        self.effects: list[Effect] = []
        self._leases: dict[WorkerId, dict[AttemptKey, None]] = {}
        """Keys of the tasks a worker holds, in the order of their grants; no entry is empty."""
        self._states: Counter[TaskState] = Counter()
        self._events: Counter[TaskEvent] = Counter()
        self._queued_tokens = 0
        self.leases_lost = 0
        """Leases that ended unanswered; counted by the queue, which knows the cause."""

    @property
    def waiting(self) -> int:
        """Tasks that count towards the depth: queued and delayed."""
        return self._states[TaskState.QUEUED] + self._states[TaskState.DELAYED]

    @property
    def leased(self) -> int:
        """Tasks under a lease."""
        return self._states[TaskState.LEASED]

    def leases_of(self, worker_id: WorkerId) -> tuple[Task, ...]:
        """Return the tasks that a worker holds, in the order of their grants."""
        return tuple(self.live[key] for key in self._leases.get(worker_id, ()))

    def add(self, task: Task) -> None:
        """Take in a new task, QUEUED; whatever was remembered under its key is forgotten."""
        self.finished.pop(task.spec.key, None)
        self.live[task.spec.key] = task
        self._enter(task)

    def move(
        self, task: Task, event: TaskEvent, *, lease: Lease | None = None, visible_at: float | None = None
    ) -> None:
        """Make one move of the table; `lease` goes with GRANT, `visible_at` with BACK_OFF."""
        target = TRANSITIONS[task.state].get(event)
        assert target is not None, f"{task.spec.key}: {event} is illegal in {task.state}"
        self._leave(task)
        self._events[event] += 1
        task.state, task.lease, task.visible_at = target, lease, visible_at
        if target in LIVE_STATES:
            self._enter(task)

    def finish(
        self, task: Task, event: TaskEvent, outcome: Outcome, *, now: float, lease_id: LeaseId | None = None
    ) -> None:
        """Move a task to its end and remember its outcome; `lease_id` is the one that completed it."""
        key = task.spec.key
        self.move(task, event)
        del self.live[key]
        self.deadlines.set(key, None, order=task.arrival)
        self.effects.append(outcome)
        self.finished[key] = FinishedTask(task.spec.content, task.state, outcome, now, lease_id)
        if len(self.finished) > self._limits.terminal_kept:
            del self.finished[next(iter(self.finished))]
        if isinstance(outcome, TaskDead):
            self.dead.append(outcome)

    def renew(self, task: Task, lease: Lease) -> None:
        """Replace the lease of a LEASED task by a longer one of the same holder."""
        task.lease = lease
        self.deadlines.set(task.spec.key, task.deadline, order=task.arrival)

    def forget(self, *, before: float) -> None:
        """Forget the tasks that ended by then."""
        while self.finished:
            key, oldest = next(iter(self.finished.items()))
            if oldest.finished_at > before:
                break
            del self.finished[key]

    def position(self, task: Task) -> int | None:
        """Count the tasks before this one; None if it is not in line."""
        return self.lines.position(task) if task.state is TaskState.QUEUED else None

    def stats(self, *, workers: int, draining: int) -> QueueStats:
        """Return the counts; O(1)."""
        return QueueStats(
            queued=self._states[TaskState.QUEUED],
            delayed=self._states[TaskState.DELAYED],
            leased=self._states[TaskState.LEASED],
            queued_tokens=self._queued_tokens,
            workers=workers,
            draining=draining,
            ended={
                TaskState.COMPLETED: self._events[TaskEvent.COMPLETE],
                TaskState.DEAD: self._events[TaskEvent.GIVE_UP],
                TaskState.EXPIRED: self._events[TaskEvent.EXPIRE],
                TaskState.CANCELLED: self._events[TaskEvent.CANCEL],
            },
            requeued=self._events[TaskEvent.LOSE],
            backed_off=self._events[TaskEvent.BACK_OFF],
            leases_lost=self.leases_lost,
        )

    def snapshot(self) -> tuple[TaskView, ...]:
        """Return a copy of every live task, in order of priority and arrival. O(n log n)."""
        return tuple(
            TaskView(
                key=task.spec.key,
                state=task.state,
                priority=task.spec.priority,
                attempts=task.attempts,
                skips=task.skips,
                position=self.position(task),
                lease=task.lease,
                visible_at=task.visible_at,
                expires_at=task.spec.expires_at,
            )
            for task in sorted(self.live.values(), key=lambda task: (task.spec.priority, task.arrival))
        )

    def check_integrity(self) -> None:
        """Assert that tasks, indexes and counts agree. O(n log n)."""
        self.lines.check_integrity()
        held = Counter(key for keys in self._leases.values() for key in keys)
        for key, task in self.live.items():
            assert key == task.spec.key, f"{key} holds {task.spec.key}"
            assert task.state in LIVE_STATES, f"{key} is {task.state} among the live"
            assert key not in self.finished, f"{key} lives and has ended"
            assert (task in self.lines) == (task.state is TaskState.QUEUED), f"{key} is {task.state}, in line or not"
            assert (task.lease is not None) == (task.state is TaskState.LEASED), f"{key} is {task.state}, leased or not"
            assert held[key] == (task.lease is not None), f"{key} has {held[key]} holders"
            assert task.lease is None or key in self._leases[task.lease.worker_id], f"{key} has another holder"
            assert (task.visible_at is not None) == (task.state is TaskState.DELAYED), f"{key}: backoff"
            assert self.deadlines.get(key) == task.deadline, f"{key}: deadline"
            assert task.attempts <= self._limits.max_attempts, f"{key}: {task.attempts} attempts"
            assert task.skips <= self._limits.max_skips, f"{key}: {task.skips} skips"
        assert held.keys() <= self.live.keys(), "a lease without a task"
        assert all(self._leases.values()), "an empty entry is kept for a worker"
        states = Counter(task.state for task in self.live.values())
        assert all(self._states[state] == states[state] for state in TaskState), "counts per state"
        assert len(self.lines) == states[TaskState.QUEUED], "a place in line without a task"
        assert len(self.deadlines) <= len(self.live), "a deadline without a task"
        queued = (task for task in self.live.values() if task.state is TaskState.QUEUED)
        assert self._queued_tokens == sum(task.spec.uncached_tokens for task in queued), "queued tokens"
        assert len(self.finished) <= self._limits.terminal_kept, "too many ended tasks"

    def _leave(self, task: Task) -> None:
        """Take a task out of the indexes of its live state."""
        self._states[task.state] -= 1
        if task.state is TaskState.QUEUED:
            self.lines.remove(task)
            self._queued_tokens -= task.spec.uncached_tokens
        if task.lease is not None:
            held = self._leases[task.lease.worker_id]
            del held[task.spec.key]
            if not held:
                del self._leases[task.lease.worker_id]

    def _enter(self, task: Task) -> None:
        """Put a task into the indexes of its live state."""
        self._states[task.state] += 1
        if task.lease is not None:
            self._leases.setdefault(task.lease.worker_id, {})[task.spec.key] = None
        if task.state is TaskState.QUEUED:
            self.lines.add(task)
            self._queued_tokens += task.spec.uncached_tokens
            self.effects.append(TaskQueued(task.spec.key, self.lines.position(task), task.attempts))
        self.deadlines.set(task.spec.key, task.deadline, order=task.arrival)
