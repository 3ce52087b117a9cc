"""PrefillQueue: leased prefill tasks, served over the pure `LeaseQueue`.

Every call is one moment: the core is asked at the loop's time, then its effects are delivered to the streams that wait
for them and the one timer is set to the core's next deadline. No Lease awaits between asking the core and answering, so
a caller that is gone never leaves with a lease.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uuid_utils

from kvmesh import telemetry
from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey, Epoch, LeaseId, WorkerId
from kvmesh.core.lease_effects import Effect, TaskBackedOff, TaskDead, TaskQueued
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.lease_queue import LeaseQueue
from kvmesh.core.lease_task import Grant, TaskState
from kvmesh.services.deadline_timer import DeadlineTimer
from kvmesh.services.queue_affinity import CachedBlocks, QueueAffinity
from kvmesh.services.queue_streams import Notices, Progress, QueueStreams
from kvmesh.services.waiting_leases import WaitingLeases
from kvmesh.v1 import frontend_pb2, prefill_queue_pb2, prefill_queue_pb2_grpc
from kvmesh.wire import validation
from kvmesh.wire.prefill_queue import (
    dead_to_wire,
    failure_detail,
    grant_to_wire,
    incarnation,
    stats_to_wire,
    task_key,
    task_spec,
    worker_capability,
)

if TYPE_CHECKING:
    from kvmesh.v1.prefill_queue_pb2_grpc import _ServicerContext as Context

log = telemetry.logger(__name__)

MAX_LEASE_WAIT_S = 30.0
_DEFAULT_DEAD_LISTED = 100


def new_lease_id() -> LeaseId:
    """Return an id that no queue ever gave before."""
    return LeaseId(str(uuid_utils.uuid7()))


class PrefillQueue(prefill_queue_pb2_grpc.PrefillQueueServicer):
    """The servicer of one queue. State lives in memory: what is lost with it is submitted again by its owner."""

    def __init__(
        self,
        limits: QueueLimits | None = None,
        *,
        cached_blocks: CachedBlocks | None = None,
        new_lease_id: Callable[[], LeaseId] = new_lease_id,
    ) -> None:
        """Without `cached_blocks` there is no affinity: tasks go in order to whoever asks."""
        self._limits = limits or QueueLimits()
        self._core = LeaseQueue(self._limits, new_lease_id=new_lease_id)
        self._affinity = QueueAffinity(cached_blocks)
        self._streams = QueueStreams()
        self._waiting = WaitingLeases()
        self._dead: deque[prefill_queue_pb2.DeadTask] = deque(maxlen=self._limits.dead_kept)
        """Newest first."""
        self._leases_lost = 0
        """Counted already."""
        self._timer = DeadlineTimer(self._tick)
        self._draining = False
        self._closed = False
        self._none_leased = asyncio.Event()
        self._none_leased.set()

    # In process.

    def stats(self) -> frontend_pb2.QueueStats:
        """Return the counts; O(workers)."""
        return stats_to_wire(self._core.stats())

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Take no task and grant no lease any more, let the leased tasks finish; return (finished, given up).

        Workers are told on their Attach streams. Waiting tasks are given up at once, their submitters told DRAINING;
        tasks still leased after `timeout_s` when the queue is closed.
        """
        self._draining = True
        before = self.stats()
        with self._moment() as now:
            for worker_id in self._streams.workers:
                self._core.drain(worker_id, now=now)
        for task in self._core.snapshot():
            if task.state is not TaskState.LEASED:
                self._streams.refuse(task.key, _draining())
        log.info("queue.draining", leased=before.leased, waiting=before.depth)
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_leased.wait()
        except TimeoutError:
            telemetry.WAIT_ENDED.labels(wait="drain_s").inc()
        finished = self.stats().completed - before.completed
        return finished, before.depth + before.leased - finished

    def close(self) -> None:
        """End every stream and every waiting call with DRAINING, so that the server can stop. Idempotent."""
        self._draining = self._closed = True
        self._streams.end_all(_draining())
        self._waiting.wake()
        self._timer.set(None)

    # The submitters' side.

    async def Submit(
        self, request: prefill_queue_pb2.SubmitRequest, context: "Context"
    ) -> AsyncIterator[prefill_queue_pb2.SubmitResponse]:
        """See PrefillQueue.Submit."""
        self._refuse_when_draining()
        key, progress = self._submit(request.task)
        try:
            await asyncio.sleep(0)  # a worker that waits goes before the word that the task is in line
            async for message in progress:
                yield message
        finally:
            if self._streams.leave(key, progress):
                with self._moment() as now:
                    self._core.cancel(key, now=now)

    async def Cancel(
        self, request: prefill_queue_pb2.CancelRequest, context: "Context"
    ) -> prefill_queue_pb2.CancelResponse:
        """See PrefillQueue.Cancel."""
        with self._moment() as now:
            self._core.cancel(task_key(request.key), now=now)
        return prefill_queue_pb2.CancelResponse()

    def _submit(self, task: prefill_queue_pb2.PrefillTask) -> tuple[AttemptKey, Progress]:
        with self._moment() as now:
            spec = task_spec(task, now=now)
            result = self._core.submit(spec, payload=task, now=now)
            return spec.key, self._streams.join(spec, result)

    # The workers' side.

    async def Attach(
        self, request: prefill_queue_pb2.AttachRequest, context: "Context"
    ) -> AsyncIterator[prefill_queue_pb2.AttachResponse]:
        """See PrefillQueue.Attach."""
        self._refuse_when_draining()
        worker_id, epoch = incarnation(request)
        notices = self._attach(worker_id, epoch, request)
        try:
            async for notice in notices:
                yield notice
        finally:
            self._detach(worker_id, epoch, notices)

    async def Lease(
        self, request: prefill_queue_pb2.LeaseRequest, context: "Context"
    ) -> prefill_queue_pb2.LeaseResponse:
        """See PrefillQueue.Lease."""
        worker_id, epoch = incarnation(request)
        if request.max_tasks < 1:
            raise validation.invalid("max_tasks", "0 is out of range: 1 or more")
        wait_s = validation.seconds(request.wait, path="wait", high=MAX_LEASE_WAIT_S)
        until = asyncio.get_running_loop().time() + wait_s
        while True:
            grants = self._lease(worker_id, epoch, request)
            if grants or not wait_s or not await self._waiting.wait(worker_id, until=until):
                return prefill_queue_pb2.LeaseResponse(tasks=map(grant_to_wire, grants))

    async def Extend(
        self, request: prefill_queue_pb2.ExtendRequest, context: "Context"
    ) -> prefill_queue_pb2.ExtendResponse:
        """See PrefillQueue.Extend."""
        with self._moment() as now:
            ttl_s = self._core.extend(task_key(request.key), LeaseId(request.lease_id), now=now)
        return prefill_queue_pb2.ExtendResponse(ttl=validation.duration(ttl_s))

    async def Complete(
        self, request: prefill_queue_pb2.CompleteRequest, context: "Context"
    ) -> prefill_queue_pb2.CompleteResponse:
        """See PrefillQueue.Complete."""
        with self._moment() as now:
            self._core.complete(task_key(request.key), LeaseId(request.lease_id), request.result, now=now)
        await asyncio.sleep(0)  # the submitter, who waits for the result, goes before the worker, who has done its part
        return prefill_queue_pb2.CompleteResponse()

    async def Fail(self, request: prefill_queue_pb2.FailRequest, context: "Context") -> prefill_queue_pb2.FailResponse:
        """See PrefillQueue.Fail."""
        delay_s = validation.seconds(request.delay, path="delay")
        with self._moment() as now:
            self._core.fail(
                task_key(request.key),
                LeaseId(request.lease_id),
                retryable=request.retryable,
                delay_s=delay_s,
                detail=failure_detail(request.error),
                now=now,
            )
        return prefill_queue_pb2.FailResponse()

    def _attach(self, worker_id: WorkerId, epoch: Epoch, request: prefill_queue_pb2.AttachRequest) -> Notices:
        with self._moment() as now:
            self._core.attach(worker_id, epoch, worker_capability(request), now=now)
            notices = Notices()
            ready = prefill_queue_pb2.AttachReady(lease_ttl=validation.duration(self._limits.lease_ttl_s))
            notices.put(prefill_queue_pb2.AttachResponse(ready=ready))
            self._streams.attach(worker_id, epoch, notices)
        log.info("queue.worker_attached", worker_id=worker_id, epoch=epoch)
        self._waiting.wake()  # a call of an earlier epoch is refused now; another capability may fit other tasks
        return notices

    def _detach(self, worker_id: WorkerId, epoch: Epoch, notices: Notices) -> None:
        if not self._streams.detach(worker_id, notices):
            return
        with self._moment() as now:
            self._core.detach(worker_id, epoch, now=now)
        log.info("queue.worker_detached", worker_id=worker_id, epoch=epoch)
        self._waiting.wake()  # its own waiting call is refused now

    def _lease(self, worker_id: WorkerId, epoch: Epoch, request: prefill_queue_pb2.LeaseRequest) -> list[Grant]:
        if self._closed:
            raise _draining()
        with self._moment() as now:
            return self._core.lease(
                worker_id,
                epoch,
                max_tasks=request.max_tasks,
                max_tokens=request.max_tokens or None,
                holds=self._affinity.held_by(worker_id),
                now=now,
            )

    # Inspection.

    async def GetStats(
        self, request: prefill_queue_pb2.GetStatsRequest, context: "Context"
    ) -> prefill_queue_pb2.GetStatsResponse:
        """See PrefillQueue.GetStats."""
        return prefill_queue_pb2.GetStatsResponse(stats=self.stats())

    async def ListDead(
        self, request: prefill_queue_pb2.ListDeadRequest, context: "Context"
    ) -> prefill_queue_pb2.ListDeadResponse:
        """See PrefillQueue.ListDead."""
        listed = list(self._dead)[: request.limit or _DEFAULT_DEAD_LISTED]
        return prefill_queue_pb2.ListDeadResponse(tasks=listed)

    # Time and effects.

    @contextmanager
    def _moment(self) -> Iterator[float]:
        """Yield the time to ask the core at; what follows from it is delivered, also when the core refuses."""
        try:
            yield asyncio.get_running_loop().time()
        finally:
            self._deliver(self._core.take_effects())

    def _deliver(self, effects: list[Effect]) -> None:
        queued: list[AttemptKey] = []
        for effect in effects:
            self._streams.deliver(effect)
            if isinstance(effect, TaskDead):
                self._dead.appendleft(dead_to_wire(effect, died_at_ns=time.time_ns()))
            elif isinstance(effect, TaskQueued | TaskBackedOff) and self._draining:
                self._streams.refuse(effect.key, _draining())
            elif isinstance(effect, TaskQueued):
                queued.append(effect.key)
        if queued:
            self._waiting.wake(self._affinity.ranking([self._streams.block_hashes(key) for key in queued]))
        self._count()
        self._timer.set(None if self._closed else self._core.next_wakeup())

    def _count(self) -> None:
        core = self._core
        telemetry.QUEUE_DEPTH.set(core.waiting)
        telemetry.QUEUE_LEASED.set(core.leased)
        if core.leases_lost != self._leases_lost:
            telemetry.QUEUE_LEASES_LOST.inc(core.leases_lost - self._leases_lost)
            self._leases_lost = core.leases_lost
        if core.leased:
            self._none_leased.clear()
        else:
            self._none_leased.set()

    def _tick(self) -> None:
        self._deliver(self._core.tick(asyncio.get_running_loop().time()))

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise _draining()


def _draining() -> TryElsewhereError:
    return TryElsewhereError(Reason.DRAINING, "this prefill queue is shutting down")
