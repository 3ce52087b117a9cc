"""The prefill queue: tasks leased to workers, redelivered until exactly one answer stands.

Laws:
    1. A task has at most one valid lease; only its lease_id extends, completes or fails it; no lease_id is ever reused.
    2. A task ends in exactly one terminal state, with exactly one outcome.
    3. Every state change is a move of `lease_task.TRANSITIONS`, made by `TaskTable.move` and nowhere else.
    4. Time passes only through `now`: whatever fell due up to then happens first, in order of time, then the call. So
       no answer depends on how often `tick` is called. At the very moment of a deadline it is over.
    5. A call that raises has changed nothing but what time alone changed.

Order is priority, then arrival. A lost lease (expiry, holder gone) was not the task's fault: it is requeued at once in
its old place. A failed one backs off and then arrives anew, at the end of its priority: a consumer that always fails
can therefore never hold fresh tasks back with retries.

What the world must hear is collected as effects; take them after every call, also after one that raised.

Bounds: waiting tasks by `max_depth` plus what was leased and comes back; leased ones by what attached workers pull;
ended ones and dead letters by count. Costs per call are O(log n) amortised, apart from what `lease_lines` says.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

from kvmesh.core.errors import BackOffError, ConflictError, NotKnownError, OutOfTimeError, Reason
from kvmesh.core.ids import AttemptKey, Epoch, LeaseId, SequenceHash, WorkerId
from kvmesh.core.lease_capability import WorkerCapability
from kvmesh.core.lease_effects import (
    DrainRequested,
    Effect,
    LeaseRevoked,
    Outcome,
    TaskBackedOff,
    TaskCancelled,
    TaskCompleted,
    TaskDead,
    TaskExpired,
    TaskLeased,
    WorkerSuperseded,
)
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.lease_table import QueueStats, TaskTable
from kvmesh.core.lease_task import Grant, Lease, SubmitResult, Task, TaskEvent, TaskSpec, TaskState, TaskView
from kvmesh.core.lease_workers import AttachedWorker, AttachedWorkers


class LeaseQueue:
    """The state machine of one prefill queue; one thread, no clock, no I/O."""

    def __init__(self, limits: QueueLimits, *, new_lease_id: Callable[[], LeaseId]) -> None:
        """`new_lease_id` returns an id that no queue ever returned before: another queue's leases must not fit here."""
        self._limits = limits
        self._new_lease_id = new_lease_id
        self._now = float("-inf")
        self._arrivals = count()
        self._table = TaskTable(limits)
        self._workers = AttachedWorkers()

    # The submitters' side.

    def submit(self, spec: TaskSpec, *, payload: Any, now: float) -> SubmitResult:
        """Put a task in line. Idempotent: the same key and content again is the same task, and gets the same answer.

        While no worker takes leases (as just after an election) the task waits for one. A cancelled key begins anew.

        Raises: ConflictError(ALREADY_EXISTS) for other content under the key; OutOfTimeError(DEADLINE) past its
        time-to-live; TryElsewhereError(NO_CAPABLE_WORKER) if workers take leases but none can do it;
        BackOffError(QUEUE_FULL).
        """
        self._advance(now)
        known = self._known(spec)
        if known is not None:
            return known
        if spec.expires_at is not None and spec.expires_at <= now:
            raise OutOfTimeError(Reason.DEADLINE, f"{spec.key}: past its time-to-live")
        self._workers.require_capable(spec.requirement)
        if self._table.waiting >= self._limits.max_depth:
            raise BackOffError(
                Reason.QUEUE_FULL,
                f"{self._table.waiting} tasks wait, {self._limits.max_depth} may",
                retry_after_s=self._limits.full_retry_after_s,
            )
        task = Task(spec=spec, payload=payload, arrival=next(self._arrivals))
        self._table.add(task)
        return SubmitResult(task.state, already=False, position=self._table.position(task))

    def cancel(self, key: AttemptKey, *, now: float) -> bool:
        """Drop a task; its holder is told. False if it had ended already. Raises: NotKnownError(NOT_FOUND)."""
        self._advance(now)
        if key in self._table.finished:
            return False
        task = self._task(key)
        self._revoke(task)
        self._table.finish(task, TaskEvent.CANCEL, TaskCancelled(key), now=now)
        return True

    # The workers' side.

    def attach(self, worker_id: WorkerId, epoch: Epoch, capability: WorkerCapability, *, now: float) -> None:
        """Let a worker lease. A higher epoch supersedes a lower one, whose leases are requeued at once.

        The same epoch again renews the capability and keeps leases and draining.
        Raises: ConflictError(STALE_EPOCH) if a higher epoch is attached.
        """
        self._advance(now)
        self._workers.refuse_stale(worker_id, epoch)
        worker = self._workers.get(worker_id)
        if worker is not None and worker.epoch == epoch:
            self._workers.put(replace(worker, capability=capability))
            return
        if worker is not None:
            self._release_leases(worker_id, "its holder was superseded")
            self._table.effects.append(WorkerSuperseded(worker_id, worker.epoch))
        self._workers.put(AttachedWorker(worker_id, epoch, capability))

    def detach(self, worker_id: WorkerId, epoch: Epoch, *, now: float) -> bool:
        """Forget a worker and requeue its leases at once; False, and nothing changes, if this epoch is not attached."""
        self._advance(now)
        worker = self._workers.get(worker_id)
        if worker is None or worker.epoch != epoch:
            return False
        self._release_leases(worker_id, "its holder is gone")
        self._workers.remove(worker_id)
        return True

    def drain(self, worker_id: WorkerId, *, now: float) -> None:
        """Give a worker no further leases; those it holds go on. Idempotent. Raises: ConflictError(NOT_ATTACHED)."""
        self._advance(now)
        worker = self._workers.get(worker_id)
        if worker is None:
            raise ConflictError(Reason.NOT_ATTACHED, f"{worker_id} is not attached")
        if not worker.draining:
            self._workers.put(replace(worker, draining=True))
            self._table.effects.append(DrainRequested(worker_id, worker.epoch))

    def lease(
        self,
        worker_id: WorkerId,
        epoch: Epoch,
        *,
        max_tasks: int,
        now: float,
        max_tokens: int | None = None,
        holds: Callable[[tuple[SequenceHash, ...]], int] | None = None,
    ) -> list[Grant]:
        """Lease the next tasks that this worker can do, in order, to it.

        Stops at `max_tasks`, or at the first task whose uncached tokens do not fit into `max_tokens` any more; the
        first task always fits. `holds` counts the leading blocks of a sequence in the worker's cache; None = no
        affinity. Empty when nothing waits for it or it drains.

        Raises: ConflictError(NOT_ATTACHED), ConflictError(STALE_EPOCH).
        """
        self._advance(now)
        worker = self._workers.require(worker_id, epoch)
        prefix_depth = None if holds is None else _remembered(holds)
        grants: list[Grant] = []
        tokens = 0
        while not worker.draining and len(grants) < max_tasks:
            pick = self._table.lines.pick(
                worker.capability,
                prefix_depth=prefix_depth,
                max_skips=self._limits.max_skips,
                window=self._limits.affinity_window,
            )
            if pick is None:
                break
            tokens += pick.task.spec.uncached_tokens
            if grants and max_tokens is not None and tokens > max_tokens:
                break
            for older in pick.passed_over:
                older.skips += 1
            grants.append(self._grant(pick.task, worker))
        return grants

    def extend(self, key: AttemptKey, lease_id: LeaseId, *, now: float) -> float:
        """Renew a lease and return its new TTL in seconds; it never passes the task's time-to-live.

        Raises: NotKnownError(NOT_FOUND), ConflictError(LEASE_LOST).
        """
        self._advance(now)
        task, lease = self._held(key, lease_id)
        expires_at = self._lease_end(task)
        self._table.renew(task, replace(lease, expires_at=expires_at))
        return expires_at - now

    def complete(self, key: AttemptKey, lease_id: LeaseId, result: Any, *, now: float) -> None:
        """End a task with its result. Idempotent: the completing lease may say it again, and the first result stands.

        Raises: NotKnownError(NOT_FOUND), ConflictError(LEASE_LOST).
        """
        self._advance(now)
        finished = self._table.finished.get(key)
        if finished is not None and finished.lease_id == lease_id:
            return
        task, _ = self._held(key, lease_id)
        self._table.finish(task, TaskEvent.COMPLETE, TaskCompleted(key, result), now=now, lease_id=lease_id)

    def fail(
        self, key: AttemptKey, lease_id: LeaseId, *, retryable: bool, now: float, delay_s: float = 0.0, detail: str = ""
    ) -> None:
        """Give a lease back as failed: the task backs off, at least `delay_s`, or is dead.

        Raises: NotKnownError(NOT_FOUND), ConflictError(LEASE_LOST).
        """
        self._advance(now)
        task, _ = self._held(key, lease_id)
        if not retryable:
            self._bury(task, detail or "failed, not retryable")
        elif task.attempts >= self._limits.max_attempts:
            self._bury(task, detail or "failed")
        else:
            visible_at = now + self._limits.backoff_s(task.attempts, delay_s)
            self._table.effects.append(TaskBackedOff(key, task.attempts, visible_at, detail))
            self._table.move(task, TaskEvent.BACK_OFF, visible_at=visible_at)

    # Time and effects.

    def tick(self, now: float) -> list[Effect]:
        """Let whatever fell due happen, and take all effects."""
        self._advance(now)
        return self.take_effects()

    def next_wakeup(self) -> float | None:
        """Return when `tick` will have something to do; None = not before another call."""
        return self._table.deadlines.earliest()

    def take_effects(self) -> list[Effect]:
        """Return the effects since the last time, in order, and forget them."""
        effects, self._table.effects = self._table.effects, []
        return effects

    # Inspection.

    @property
    def waiting(self) -> int:
        """Tasks that count towards the depth: queued and delayed."""
        return self._table.waiting

    @property
    def leased(self) -> int:
        """Tasks under a lease."""
        return self._table.leased

    @property
    def leases_lost(self) -> int:
        """Leases that ended unanswered, ever."""
        return self._table.leases_lost

    def stats(self) -> QueueStats:
        """Return the counts; O(workers)."""
        return self._table.stats(workers=len(self._workers), draining=self._workers.draining)

    def dead(self) -> tuple[TaskDead, ...]:
        """Return the dead letters that are kept, the oldest first."""
        return tuple(self._table.dead)

    def outcome(self, key: AttemptKey) -> Outcome | None:
        """Return how a task ended, while that is remembered; None if it lives. Raises: NotKnownError(NOT_FOUND)."""
        finished = self._table.finished.get(key)
        if finished is not None:
            return finished.outcome
        self._task(key)
        return None

    def snapshot(self) -> tuple[TaskView, ...]:
        """Return a copy of every live task, in order of priority and arrival. O(n log n)."""
        return self._table.snapshot()

    def check_integrity(self) -> None:
        """Assert that the whole state is consistent; for tests. O(n log n)."""
        self._table.check_integrity()
        for view in self._table.snapshot():
            holder = None if view.lease is None else self._workers.get(view.lease.worker_id)
            assert view.lease is None or (holder and holder.epoch == view.lease.epoch), f"{view.key}: holder not here"

    # What happens, and the guards before it.

    def _advance(self, now: float) -> None:
        """Let time pass: every deadline up to `now`, each at its own moment."""
        assert now >= self._now, f"time runs backwards: {self._now} to {now}"
        while (due := self._table.deadlines.pop_due(now)) is not None:
            self._now, key = due
            self._fall_due(self._table.live[key])
        self._now = now
        self._table.forget(before=now - self._limits.terminal_kept_s)

    def _fall_due(self, task: Task) -> None:
        if task.spec.expires_at is not None and task.spec.expires_at <= self._now:
            self._table.leases_lost += task.lease is not None
            self._revoke(task)
            self._table.finish(task, TaskEvent.EXPIRE, TaskExpired(task.spec.key), now=self._now)
        elif task.state is TaskState.LEASED:
            self._revoke(task)
            self._lose(task, "its lease expired")
        else:
            task.arrival = next(self._arrivals)
            self._table.move(task, TaskEvent.READY)

    def _grant(self, task: Task, worker: AttachedWorker) -> Grant:
        task.attempts += 1
        lease = Lease(self._new_lease_id(), worker.worker_id, worker.epoch, self._lease_end(task))
        self._table.move(task, TaskEvent.GRANT, lease=lease)
        self._table.effects.append(TaskLeased(task.spec.key, worker.worker_id, task.attempts))
        ttl_s = lease.expires_at - self._now
        return Grant(task.spec.key, lease.lease_id, task.attempts, ttl_s, lease.expires_at, task.payload)

    def _lease_end(self, task: Task) -> float:
        end = self._now + self._limits.lease_ttl_s
        return end if task.spec.expires_at is None else min(end, task.spec.expires_at)

    def _release_leases(self, worker_id: WorkerId, cause: str) -> None:
        for task in self._table.leases_of(worker_id):
            self._lose(task, cause)

    def _lose(self, task: Task, cause: str) -> None:
        self._table.leases_lost += 1
        if task.attempts < self._limits.max_attempts:
            self._table.move(task, TaskEvent.LOSE)
        else:
            self._bury(task, cause)

    def _bury(self, task: Task, cause: str) -> None:
        detail = f"attempt {task.attempts} of {self._limits.max_attempts}: {cause}"
        dead = TaskDead(task.spec.key, task.attempts, detail)
        self._table.finish(task, TaskEvent.GIVE_UP, dead, now=self._now)

    def _revoke(self, task: Task) -> None:
        """Tell the holder, if there is one, that its lease is over."""
        if task.lease is not None:
            lease = task.lease
            self._table.effects.append(LeaseRevoked(task.spec.key, lease.worker_id, lease.epoch, lease.lease_id))

    def _known(self, spec: TaskSpec) -> SubmitResult | None:
        """Answer a repeated Submit; None if the key is new or was cancelled."""
        task = self._table.live.get(spec.key)
        finished = self._table.finished.get(spec.key)
        content = task.spec.content if task else finished.content if finished else spec.content
        if content != spec.content:
            raise ConflictError(Reason.ALREADY_EXISTS, f"{spec.key}: here with other content")
        if task is not None:
            return SubmitResult(task.state, already=True, position=self._table.position(task))
        if finished is not None and finished.state is not TaskState.CANCELLED:
            return SubmitResult(finished.state, already=True, outcome=finished.outcome)
        return None

    def _task(self, key: AttemptKey) -> Task:
        task = self._table.live.get(key)
        if task is None:
            raise NotKnownError(Reason.NOT_FOUND, f"no task {key}")
        return task

    def _held(self, key: AttemptKey, lease_id: LeaseId) -> tuple[Task, Lease]:
        """Return the task if this lease holds it: the fence of law 1."""
        task = None if key in self._table.finished else self._task(key)
        if task is None or task.lease is None or task.lease.lease_id != lease_id:
            raise ConflictError(Reason.LEASE_LOST, f"lease {lease_id} does not hold {key}")
        return task, task.lease


def _remembered(holds: Callable[[tuple[SequenceHash, ...]], int]) -> Callable[[Task], int]:
    """Ask `holds` once per task, although each grant of a Lease looks at the same tasks again."""
    depths: dict[AttemptKey, int] = {}

    def prefix_depth(task: Task) -> int:
        depth = depths.get(task.spec.key)
        if depth is None:
            depth = depths[task.spec.key] = holds(task.spec.block_hashes) if task.spec.block_hashes else 0
        return depth

    return prefix_depth
