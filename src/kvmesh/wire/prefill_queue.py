"""The prefill queue's nouns between the contract and the core."""

import hashlib
from typing import assert_never

from google.rpc import status_pb2

from kvmesh.core.errors import MeshError, OutOfTimeError, RequestCancelledError, TryElsewhereError
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, SequenceHash, WorkerId
from kvmesh.core.lease_capability import Capability, WorkerCapability
from kvmesh.core.lease_effects import TaskCancelled, TaskDead, TaskExpired
from kvmesh.core.lease_table import QueueStats
from kvmesh.core.lease_task import Grant, TaskSpec, TaskState
from kvmesh.v1 import frontend_pb2, generation_pb2, prefill_queue_pb2
from kvmesh.wire import error_catalog, validation

DEFAULT_PRIORITY = 10
DEFAULT_TIME_TO_LIVE_S = 60.0
_MAX_DETAIL = 512
"""Characters of a holder's error that are kept."""


def task_spec(task: prefill_queue_pb2.PrefillTask, *, now: float) -> TaskSpec:
    """Return what the queue must know of a task submitted `now`. Raises: FixRequestError(INVALID_FIELD)."""
    key = _attempt_key(task.request_id, task.attempt, path="task")
    if task.WhichOneof("input") is None:
        raise validation.invalid("task.input", "set one of text, token_ids")
    time_to_live_s = DEFAULT_TIME_TO_LIVE_S
    if task.HasField("time_to_live"):
        time_to_live_s = validation.seconds(task.time_to_live, path="task.time_to_live")
    block_size, dtype, layout = _layout_parts(task.layout)
    return TaskSpec(
        key=key,
        content=_digest(task),
        requirement=Capability(
            model=task.model, block_size=block_size, dtype=dtype, layout=layout, transports=frozenset(task.transports)
        ),
        priority=task.priority if task.HasField("priority") else DEFAULT_PRIORITY,
        uncached_tokens=task.uncached_tokens,
        block_hashes=tuple(map(SequenceHash, task.block_hashes)),
        expires_at=now + time_to_live_s,
    )


def worker_capability(request: prefill_queue_pb2.AttachRequest) -> WorkerCapability:
    """Return what an attaching worker can do."""
    block_size, dtype, layout = _layout_parts(request.layout)
    return WorkerCapability(
        models=frozenset(request.models),
        block_size=block_size,
        dtype=dtype,
        layout=layout,
        transports=frozenset(request.transports),
    )


def incarnation(request: prefill_queue_pb2.AttachRequest | prefill_queue_pb2.LeaseRequest) -> tuple[WorkerId, Epoch]:
    """Return which worker asks. Raises: FixRequestError(INVALID_FIELD) when either part is missing."""
    if not request.worker_id:
        raise validation.invalid("worker_id", "required")
    if not request.epoch:
        raise validation.invalid("epoch", "required")
    return WorkerId(request.worker_id), Epoch(request.epoch)


def task_key(key: prefill_queue_pb2.TaskKey) -> AttemptKey:
    """Return a task's key. Raises: FixRequestError(INVALID_FIELD) when either part is missing."""
    return _attempt_key(key.request_id, key.attempt, path="key")


def task_key_to_wire(key: AttemptKey) -> prefill_queue_pb2.TaskKey:
    """Return the contract's TaskKey."""
    return prefill_queue_pb2.TaskKey(request_id=key.request_id, attempt=key.attempt)


def grant_to_wire(grant: Grant) -> prefill_queue_pb2.LeasedTask:
    """Return the contract's LeasedTask; the grant's payload is the task as it was submitted."""
    return prefill_queue_pb2.LeasedTask(
        task=grant.payload,
        lease_id=grant.lease_id,
        lease_attempt=grant.attempt,
        ttl=validation.duration(grant.ttl_s),
    )


def failure_detail(status: status_pb2.Status) -> str:
    """Return a holder's error in one bounded line; "" when it gave none."""
    if not status.code:
        return ""
    error = error_catalog.from_status(status)
    text = f"{error.reason.value}: {error.message}" if error.message else error.reason.value
    return " ".join(text.split())[:_MAX_DETAIL]


def failed_outcome(outcome: TaskDead | TaskExpired | TaskCancelled) -> MeshError:
    """Return the error that a submitter gets for a task that was not completed."""
    match outcome:
        case TaskDead(reason=reason, detail=detail):
            return TryElsewhereError(reason, detail)
        case TaskExpired(key, reason):
            return OutOfTimeError(reason, f"{key.request_id}/{key.attempt} is past its time-to-live")
        case TaskCancelled(key, reason):
            return RequestCancelledError(reason, f"{key.request_id}/{key.attempt} was cancelled")
        case _:
            assert_never(outcome)


def dead_to_wire(dead: TaskDead, *, died_at_ns: int) -> prefill_queue_pb2.DeadTask:
    """Return the contract's DeadTask; `died_at_ns` counts from 1970."""
    letter = prefill_queue_pb2.DeadTask(
        key=task_key_to_wire(dead.key), lease_attempts=dead.attempts, reason=dead.detail
    )
    letter.died_at.FromNanoseconds(died_at_ns)
    return letter


def stats_to_wire(stats: QueueStats) -> frontend_pb2.QueueStats:
    """Return the contract's QueueStats; a task in backoff waits like any other."""
    waiting = stats.queued + stats.delayed
    return frontend_pb2.QueueStats(
        depth=waiting,
        leased=stats.leased,
        dead=stats.ended[TaskState.DEAD],
        submitted=waiting + stats.leased + sum(stats.ended.values()),
        completed=stats.ended[TaskState.COMPLETED],
        cancelled=stats.ended[TaskState.CANCELLED],
        expired_leases=stats.leases_lost,
        timed_out=stats.ended[TaskState.EXPIRED],
        attached_workers=stats.workers,
    )


def _attempt_key(request_id: str, attempt: int, *, path: str) -> AttemptKey:
    if not request_id:
        raise validation.invalid(f"{path}.request_id", "required")
    if attempt < 1:
        raise validation.invalid(f"{path}.attempt", "counts from 1")
    return AttemptKey(RequestId(request_id), attempt)


def _layout_parts(layout: generation_pb2.KvLayout) -> tuple[int, str, str]:
    """Return (block_size, dtype, the rest as text), the grain in which a refusal names a difference; empty if unset."""
    if not layout.ByteSize():
        return 0, "", ""
    rest = f"{layout.layers} layers x {layout.kv_heads} heads x {layout.head_dim}, {layout.order}"
    return layout.block_size, layout.dtype, f"{rest}, {layout.bytes_per_block} bytes, {layout.model_fingerprint}"


def _digest(task: prefill_queue_pb2.PrefillTask) -> bytes:
    """Hash what makes two Submits the same: all but the time left and the trace, which differ when one is repeated."""
    content = prefill_queue_pb2.PrefillTask()
    content.CopyFrom(task)
    content.ClearField("time_to_live")
    content.ClearField("traceparent")
    return hashlib.blake2b(content.SerializeToString(deterministic=True), digest_size=16).digest()
