"""PrefillWorker: the direct mode, without the queue."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import BackOffError, Reason, RequestCancelledError, TryElsewhereError
from kvmesh.core.ids import AttemptKey, RequestId
from kvmesh.services.prefill_compute import PrefillCompute
from kvmesh.v1 import prefill_queue_pb2, prefill_worker_pb2, prefill_worker_pb2_grpc
from kvmesh.wire.prefill_queue import task_key

_HANDED_OVER_KEPT = 1_024
"""Results that a caller may still give up: one that has ended by its pin's time costs nothing but its entry."""


class PrefillWorker(prefill_worker_pb2_grpc.PrefillWorkerServicer):
    """Computes what it is asked for at once, and refuses what it has no room for: its callers know others."""

    def __init__(self, compute: PrefillCompute, *, max_tasks: int) -> None:
        """Serve `compute`, at most `max_tasks` tasks at once."""
        self.draining = False
        self._compute = compute
        self._max_tasks = max_tasks
        self._running: Counter[AttemptKey] = Counter()
        self._cancelled: set[AttemptKey] = set()
        """Of those that run."""
        self._handed_over: OrderedDict[AttemptKey, prefill_queue_pb2.TaskCompleted] = OrderedDict()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return self._running.total()

    async def Generate(
        self,
        request: prefill_worker_pb2.PrefillWorkerGenerateRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> AsyncIterator[prefill_worker_pb2.PrefillWorkerGenerateResponse]:
        """See the contract."""
        if self.draining:
            raise TryElsewhereError(Reason.DRAINING, "this worker takes no new tasks")
        if len(self) >= self._max_tasks:
            raise BackOffError(Reason.OVERLOADED, f"{len(self)} direct tasks run here: remote_prefill.max_direct_tasks")
        key = AttemptKey(RequestId(request.task.request_id), request.task.attempt)
        self._begin(key)
        try:
            yield _progress(prefill_worker_pb2.PrefillProgress())
            result = await self._compute.compute(request.task)
            if key in self._cancelled:
                self._compute.give_back(result)
                raise RequestCancelledError(Reason.CANCELLED, "the caller gave the task up")
            self._keep(key, result)
        finally:
            self._end(key)
        is_sent = False
        try:
            yield _progress(
                prefill_worker_pb2.PrefillProgress(
                    computed_tokens=result.computed_tokens,
                    cached_tokens=result.cached_tokens,
                    prefix_tokens=result.prefix_tokens,
                )
            )
            yield prefill_worker_pb2.PrefillWorkerGenerateResponse(handoff=result.handoff)
            is_sent = True
        finally:
            if not is_sent:  # the caller is gone: nobody will release what it never heard of
                self._compute.give_back(result)

    async def Cancel(
        self,
        request: prefill_worker_pb2.PrefillWorkerCancelRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> prefill_worker_pb2.PrefillWorkerCancelResponse:
        """See the contract."""
        key = task_key(request.key)
        if key in self._running:
            self._cancelled.add(key)  # the end of the stream stops it, unless it is done by then
        result = self._handed_over.pop(key, None)
        if result is not None:
            self._compute.give_back(result)
        return prefill_worker_pb2.PrefillWorkerCancelResponse()

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Take nothing new, let what runs end within `timeout_s`; return (finished, still running)."""
        self.draining = True
        before = len(self)
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            telemetry.WAIT_ENDED.labels(wait="drain_s").inc()
        return before - len(self), len(self)

    def undrain(self) -> None:
        """Take tasks again. Idempotent."""
        self.draining = False

    def _begin(self, key: AttemptKey) -> None:
        self._running[key] += 1
        self._empty.clear()

    def _end(self, key: AttemptKey) -> None:
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
            self._cancelled.discard(key)
        if not self._running:
            self._empty.set()

    def _keep(self, key: AttemptKey, result: prefill_queue_pb2.TaskCompleted) -> None:
        self._handed_over[key] = result
        if len(self._handed_over) > _HANDED_OVER_KEPT:
            self._handed_over.popitem(last=False)


def _progress(progress: prefill_worker_pb2.PrefillProgress) -> prefill_worker_pb2.PrefillWorkerGenerateResponse:
    return prefill_worker_pb2.PrefillWorkerGenerateResponse(progress=progress)
