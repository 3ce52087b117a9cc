"""The streams that the prefill queue's effects go to: one or more per live task, one per attached worker.

An entry lives as long as what it is for: a task's until its outcome is told or its last stream is gone (which cancels
it), a worker's until its Attach ends or another takes its place.
"""

from dataclasses import dataclass, field
from typing import assert_never

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, MeshError, Reason
from kvmesh.core.ids import AttemptKey, Epoch, SequenceHash, WorkerId
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
    TaskQueued,
    WorkerSuperseded,
)
from kvmesh.core.lease_task import SubmitResult, TaskSpec
from kvmesh.services.outbox import Outbox
from kvmesh.v1 import prefill_queue_pb2
from kvmesh.wire.prefill_queue import failed_outcome, task_key_to_wire

log = telemetry.logger(__name__)

Progress = Outbox[prefill_queue_pb2.SubmitResponse]
Notices = Outbox[prefill_queue_pb2.AttachResponse]


@dataclass(slots=True)
class _Submitters:
    """Who waits for one live task."""

    block_hashes: tuple[SequenceHash, ...]
    streams: list[Progress] = field(default_factory=list)
    latest: prefill_queue_pb2.SubmitResponse | None = None
    """What a stream that joins is told first."""


@dataclass(frozen=True, slots=True)
class _Attachment:
    epoch: Epoch
    notices: Notices


class QueueStreams:
    """Every open Submit and Attach stream of one queue. Nothing here waits."""

    def __init__(self) -> None:
        """Start with none."""
        self._submitters: dict[AttemptKey, _Submitters] = {}
        self._attachments: dict[WorkerId, _Attachment] = {}

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """Workers whose Attach stream is open."""
        return tuple(self._attachments)

    def block_hashes(self, key: AttemptKey) -> tuple[SequenceHash, ...]:
        """Return the block hashes of a live task; none when it just ended."""
        submitters = self._submitters.get(key)
        return submitters.block_hashes if submitters is not None else ()

    # The submitters' side.

    def join(self, spec: TaskSpec, result: SubmitResult) -> Progress:
        """Open a stream for a task as `result` found it; a task that has ended is answered and not kept."""
        progress = Progress()
        if result.outcome is not None:
            _answer(progress, result.outcome)
            return progress
        submitters = self._submitters.setdefault(spec.key, _Submitters(spec.block_hashes))
        submitters.streams.append(progress)
        if result.already and submitters.latest is not None:
            progress.put(submitters.latest if result.position is None else _queued(result.position))
        return progress

    def leave(self, key: AttemptKey, progress: Progress) -> bool:
        """Forget a stream that ended; True when it was the last one of a live task, which nobody waits for any more."""
        submitters = self._submitters.get(key)
        if submitters is None or progress not in submitters.streams:
            return False
        submitters.streams.remove(progress)
        if submitters.streams:
            return False
        del self._submitters[key]
        return True

    def refuse(self, key: AttemptKey, error: MeshError) -> None:
        """End the streams of a live task with `error`; their end then cancels it."""
        submitters = self._submitters.get(key)
        for progress in submitters.streams if submitters is not None else ():
            progress.end(error)

    # The workers' side.

    def attach(self, worker_id: WorkerId, epoch: Epoch, notices: Notices) -> None:
        """Make `notices` the worker's stream; the one before ends, whatever its epoch."""
        before = self._attachments.get(worker_id)
        self._attachments[worker_id] = _Attachment(epoch, notices)
        if before is not None:
            before.notices.end(ConflictError(Reason.STALE_EPOCH, f"{worker_id} attached again, with epoch {epoch}"))

    def detach(self, worker_id: WorkerId, notices: Notices) -> bool:
        """Forget a worker's stream; False when another one has taken its place."""
        attachment = self._attachments.get(worker_id)
        if attachment is None or attachment.notices is not notices:
            return False
        del self._attachments[worker_id]
        return True

    # Both.

    def deliver(self, effect: Effect) -> None:
        """Tell whoever an effect is for, and the log."""
        match effect:
            case TaskQueued(key, position, attempts):
                if attempts:
                    log.warning("queue.requeued", lease_attempts=attempts, **_where(key))
                self._tell(key, _queued(position))
            case TaskLeased(key, worker_id, attempt):
                log.debug("queue.leased", worker_id=worker_id, lease_attempt=attempt, **_where(key))
                leased = prefill_queue_pb2.TaskLeased(worker_id=worker_id, lease_attempt=attempt)
                self._tell(key, prefill_queue_pb2.SubmitResponse(leased=leased))
            case TaskBackedOff(key, attempt, _, detail):
                log.warning("queue.backed_off", lease_attempt=attempt, error=detail, **_where(key))
            case TaskCompleted() | TaskDead() | TaskExpired() | TaskCancelled():
                self._end(effect)
            case LeaseRevoked(key, worker_id, epoch, lease_id):
                notice = prefill_queue_pb2.TaskCancelled(key=task_key_to_wire(key), lease_id=lease_id)
                self._notify(worker_id, epoch, prefill_queue_pb2.AttachResponse(cancelled=notice))
            case DrainRequested(worker_id, epoch):
                notice_of_drain = prefill_queue_pb2.AttachResponse(draining=prefill_queue_pb2.QueueDraining())
                self._notify(worker_id, epoch, notice_of_drain)
            case WorkerSuperseded(worker_id, epoch):
                log.warning("queue.worker_superseded", worker_id=worker_id, epoch=epoch)
            case _:
                assert_never(effect)

    def end_all(self, error: MeshError) -> None:
        """End every stream with `error`."""
        for key in tuple(self._submitters):
            self.refuse(key, error)
        for attachment in self._attachments.values():
            attachment.notices.end(error)

    def _tell(self, key: AttemptKey, message: prefill_queue_pb2.SubmitResponse) -> None:
        submitters = self._submitters.get(key)
        if submitters is None:
            return
        submitters.latest = message
        for progress in submitters.streams:
            progress.put(message)

    def _notify(self, worker_id: WorkerId, epoch: Epoch, notice: prefill_queue_pb2.AttachResponse) -> None:
        attachment = self._attachments.get(worker_id)
        if attachment is not None and attachment.epoch == epoch:
            attachment.notices.put(notice)

    def _end(self, outcome: Outcome) -> None:
        _note(outcome)
        submitters = self._submitters.pop(outcome.key, None)
        for progress in submitters.streams if submitters is not None else ():
            _answer(progress, outcome)


def _answer(progress: Progress, outcome: Outcome) -> None:
    if isinstance(outcome, TaskCompleted):
        progress.put(prefill_queue_pb2.SubmitResponse(completed=outcome.result))
        progress.end()
    else:
        progress.end(failed_outcome(outcome))


def _note(outcome: Outcome) -> None:
    match outcome:
        case TaskCompleted(key):
            telemetry.QUEUE_TASKS.labels(outcome="completed").inc()
            log.debug("queue.completed", **_where(key))
        case TaskDead(key, attempts, detail):
            telemetry.QUEUE_TASKS.labels(outcome="dead").inc()
            log.warning("queue.dead", lease_attempts=attempts, error=detail, **_where(key))
        case TaskExpired(key):
            telemetry.QUEUE_TASKS.labels(outcome="expired").inc()
            log.warning("queue.expired", **_where(key))
        case TaskCancelled(key):
            telemetry.QUEUE_TASKS.labels(outcome="cancelled").inc()
            log.info("queue.cancelled", **_where(key))
        case _:
            assert_never(outcome)


def _queued(position: int) -> prefill_queue_pb2.SubmitResponse:
    return prefill_queue_pb2.SubmitResponse(queued=prefill_queue_pb2.TaskQueued(position=position))


def _where(key: AttemptKey) -> dict[str, object]:
    return {"request_id": key.request_id, "attempt": key.attempt}
