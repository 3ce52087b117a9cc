"""A decode worker's tasks at the prefill queue: submitted, waited for, and never left behind.

The Submit stream is read by a task of its own, because a waiter that is cancelled must not take the stream with it: a
handoff may be on its way, and the blocks of one that nobody hears of stay pinned until their time is up.

    waiter takes the answer                  nothing is left
    waiter leaves before                     PrefillQueue.Cancel, then the stream is read to its end, within a bound:
        ... and the task was not done        the queue says so, and whoever holds it stops
        ... and it was                       the handoff is given back
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.waits import Waits
from kvmesh.services.channels import Channels
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.prefills import Patience
from kvmesh.v1 import generation_pb2, prefill_queue_pb2, prefill_queue_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

if TYPE_CHECKING:
    from kvmesh.v1.prefill_queue_pb2_grpc import PrefillQueueAsyncStub

log = telemetry.logger(__name__)

Answer = asyncio.Future[prefill_queue_pb2.TaskCompleted]


class PrefillSubmissions:
    """Every task of one decode worker."""

    def __init__(
        self, *, channels: Channels, waits: Waits, give_back: Callable[[generation_pb2.KvHandoff], None]
    ) -> None:
        """`give_back` frees a handoff that was completed for nobody."""
        self._channels = channels
        self._waits = waits
        self._give_back = give_back
        self._readers = OwnedTasks()
        self._leaving: set[asyncio.Task[None]] = set()
        self._tasks = OwnedTasks()

    async def aclose(self) -> None:
        """Let those who leave cancel their tasks, within the bound of one call; the rest ends with its stream."""
        if self._leaving:
            await asyncio.wait(tuple(self._leaving), timeout=self._waits.connect_s)
        await self._tasks.aclose()
        await self._readers.aclose()

    async def complete(
        self,
        address: str,
        task: prefill_queue_pb2.PrefillTask,
        *,
        patience: Patience,
        on_position: Callable[[int | None], None],
    ) -> prefill_queue_pb2.TaskCompleted:
        """Submit to the queue at `address` and wait for the result, whose handoff is the caller's from then on.

        `on_position` hears how many tasks are before this one, None once it is leased; what it raises ends the wait.

        Raises: OutOfTimeError(PREFILL_FAILED) when `patience` is over, else MeshError.
        """
        began_at = asyncio.get_running_loop().time()
        timer = asyncio.timeout_at(patience.due)

        def hear(position: int | None) -> None:
            on_position(position)
            if position is None:
                patience.leased()
            else:
                patience.queued()
            if not timer.expired():
                timer.reschedule(patience.due)

        stub = prefill_queue_pb2_grpc.PrefillQueueStub(self._channels.get(address))
        # The deadline of the call lies behind the wait: it is the wait that ends and is counted, and whoever leaves
        # then can still read the stream to its end.
        call = stub.Submit(
            prefill_queue_pb2.SubmitRequest(task=task), timeout=patience.end - began_at + self._waits.connect_s
        )
        answer: Answer = asyncio.get_running_loop().create_future()
        reader = self._readers.start(self._read(call, answer, hear), name=f"submission-{task.request_id}")
        # Not in the reader itself: a task that is cancelled before its first step never gets to its `finally`.
        reader.add_done_callback(lambda _: call.cancel())
        try:
            async with timer:
                return await asyncio.shield(answer)
        except BaseException as exc:
            self._leave(stub, task, answer, reader)
            if isinstance(exc, TimeoutError) or (isinstance(exc, MeshError) and exc.reason is Reason.DEADLINE):
                telemetry.WAIT_ENDED.labels(wait="prefill_s").inc()  # the task's time to live is this wait
                waited = f"within {asyncio.get_running_loop().time() - began_at:.1f} s"
                what = "leased, but not computed" if patience.is_leased else "not leased"
                raise OutOfTimeError(Reason.PREFILL_FAILED, f"the prefill was {what} {waited}") from exc
            raise

    async def _read(
        self,
        call: "grpc.aio.UnaryStreamCall[prefill_queue_pb2.SubmitRequest, prefill_queue_pb2.SubmitResponse]",
        answer: Answer,
        on_position: Callable[[int | None], None],
    ) -> None:
        """Read a Submit stream to its end, whether or not anybody waits for the answer by then."""
        try:
            async for message in call:
                match message.WhichOneof("event"):
                    case "completed" if answer.done():
                        self._give_back(message.completed.handoff)
                        return
                    case "completed":
                        answer.set_result(message.completed)
                        return
                    case "queued" if not answer.done():
                        _tell(answer, on_position, message.queued.position)
                    case "leased" if not answer.done():
                        _tell(answer, on_position, None)
                    case _:
                        continue
            error: MeshError = TryElsewhereError(Reason.PREFILL_FAILED, "the queue ended the task without a result")
        except grpc.aio.AioRpcError as exc:
            error = from_rpc_error(exc)
        if not answer.done():
            answer.set_exception(error)

    def _leave(
        self,
        stub: "PrefillQueueAsyncStub",
        task: prefill_queue_pb2.PrefillTask,
        answer: Answer,
        reader: "asyncio.Task[None]",
    ) -> None:
        """Give up a task without anybody waiting for its end."""
        if not answer.done():
            answer.cancel()
        elif not answer.cancelled() and answer.exception() is None:
            self._give_back(answer.result().handoff)  # it came while the waiter was being cancelled
        if not reader.done():
            leaving = self._tasks.start(self._cancel(stub, task, reader), name=f"cancel-{task.request_id}")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _cancel(
        self, stub: "PrefillQueueAsyncStub", task: prefill_queue_pb2.PrefillTask, reader: "asyncio.Task[None]"
    ) -> None:
        key = prefill_queue_pb2.TaskKey(request_id=task.request_id, attempt=task.attempt)
        try:
            await stub.Cancel(prefill_queue_pb2.CancelRequest(key=key), timeout=self._waits.connect_s)
            await asyncio.wait([reader], timeout=self._waits.connect_s)
        except grpc.aio.AioRpcError as exc:
            log.debug("prefill.not_cancelled", request_id=task.request_id, reason=from_rpc_error(exc).reason.value)
        finally:
            reader.cancel()  # the end of the stream cancels the task as well, where the queue still hears of it


def _tell(answer: Answer, on_position: Callable[[int | None], None], position: int | None) -> None:
    """Tell of a position. A refusal ends the wait and not the reading: the task may be done before it is cancelled."""
    try:
        on_position(position)
    except MeshError as refusal:
        answer.set_exception(refusal)
