"""Prefills without the queue: one prefill worker is chosen and asked, and where it cannot, the next, each once.

Nobody redelivers here: a worker that dies with a task has the decode worker ask another one, or compute it itself.

    waiter takes the handoff         nothing is left
    anything else                    PrefillWorker.Cancel: the worker stops, or frees what it has handed over
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from kvmesh import telemetry
from kvmesh.core.approximate_index import ApproximateIndex
from kvmesh.core.errors import MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.ids import Epoch, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefill_choice import PrefillCandidate, choose_prefill_worker
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.services.channels import Channels
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.prefills import Patience
from kvmesh.v1 import prefill_queue_pb2, prefill_worker_pb2, prefill_worker_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

if TYPE_CHECKING:
    from kvmesh.v1.prefill_worker_pb2_grpc import PrefillWorkerAsyncStub

    _Call = grpc.aio.UnaryStreamCall[
        prefill_worker_pb2.PrefillWorkerGenerateRequest, prefill_worker_pb2.PrefillWorkerGenerateResponse
    ]

log = telemetry.logger(__name__)

_ASK_ANOTHER = frozenset({Reason.WORKER_LOST, Reason.DRAINING, Reason.OVERLOADED, Reason.LAYOUT_MISMATCH})
"""What says that this worker and not the task is the trouble."""
_BELIEVED_PAIRS = 100_000


class DirectPrefills:
    """Asks prefill workers for one decode worker's tasks; see `Prefills`."""

    reason = "remote_direct"

    def __init__(
        self, *, peers: Peers, channels: Channels, waits: Waits, block_size: int, rng: random.Random | None = None
    ) -> None:
        """Choose among the prefill workers that `peers` knows; prompts are counted in blocks of `block_size` tokens."""
        self._peers = peers
        self._channels = channels
        self._waits = waits
        self._block_size = block_size
        self._rng = rng or random.Random()
        self._tokens_in_flight: Counter[WorkerId] = Counter()
        self._tasks_in_flight: Counter[WorkerId] = Counter()
        self._caches = ApproximateIndex(max_pairs=_BELIEVED_PAIRS)
        self._epochs: dict[WorkerId, Epoch] = {}
        self._leaving = OwnedTasks()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def depth(self) -> int:
        """Tasks of this decode worker at the prefill worker that has the fewest."""
        return min((self._tasks_in_flight[record.worker_id] for record in self._peers.prefill_records("")), default=0)

    async def aclose(self) -> None:
        """Let those who leave say so, within the bound of one call."""
        if self._closing:
            await asyncio.wait(tuple(self._closing), timeout=self._waits.connect_s)
        await self._leaving.aclose()

    async def compute(
        self, task: prefill_queue_pb2.PrefillTask, *, patience: Patience
    ) -> prefill_queue_pb2.TaskCompleted:
        """Ask the cheapest worker; see `Prefills.compute`."""
        hashes = tuple(map(SequenceHash, task.block_hashes))
        asked: set[WorkerId] = set()
        refusal: MeshError | None = None
        while (worker := self._choose(task, hashes, asked)) is not None:
            asked.add(worker.worker_id)
            try:
                completed = await self._ask(worker, task, patience)
            except MeshError as error:
                if error.reason not in _ASK_ANOTHER or asyncio.get_running_loop().time() >= patience.end:
                    raise
                log.warning(
                    "prefill.refused", request_id=task.request_id, worker_id=worker.worker_id,
                    reason=error.reason.value, error=error.message,
                )  # fmt: skip
                refusal = error
            else:
                self._caches.record(WorkerRank(worker.worker_id), hashes, asyncio.get_running_loop().time())
                return completed
        raise refusal or TryElsewhereError(Reason.PREFILL_FAILED, "no prefill worker is known")

    def _choose(
        self, task: prefill_queue_pb2.PrefillTask, hashes: tuple[SequenceHash, ...], asked: set[WorkerId]
    ) -> WorkerRecord | None:
        self._forget_gone()
        known = {one.worker_id: one for one in self._peers.prefill_records(task.model) if one.worker_id not in asked}
        for record in known.values():
            if self._epochs.get(record.worker_id) != record.epoch:  # it came back with an empty cache
                self._caches.remove_worker(record.worker_id)
                self._epochs[record.worker_id] = record.epoch
                self._caches.limit(WorkerRank(record.worker_id), record.total_blocks or None)
        self._caches.expire(asyncio.get_running_loop().time())
        held = self._caches.match(hashes)
        candidates = [
            PrefillCandidate(
                worker_id=worker_id,
                tokens_in_flight=self._tokens_in_flight[worker_id],
                cached_tokens=held.get(WorkerRank(worker_id), 0) * self._block_size,
            )
            for worker_id in known
        ]
        prompt_tokens = task.first_block * self._block_size + task.uncached_tokens
        chosen = choose_prefill_worker(candidates, prompt_tokens=prompt_tokens, rng=self._rng)
        return known[chosen.worker_id] if chosen is not None else None

    def _forget_gone(self) -> None:
        """Keep what is known of the workers that are there, draining or not: whoever comes back begins anew."""
        live = {record.worker_id for record in self._peers.roster.records(WorkerRole.PREFILL)}
        for worker_id in self._epochs.keys() - live:
            del self._epochs[worker_id]
            self._caches.remove_worker(worker_id)

    async def _ask(
        self, worker: WorkerRecord, task: prefill_queue_pb2.PrefillTask, patience: Patience
    ) -> prefill_queue_pb2.TaskCompleted:
        """Ask one worker, which says within `waits.connect_s` whether it takes the task."""
        loop = asyncio.get_running_loop()
        self._tokens_in_flight[worker.worker_id] += task.uncached_tokens
        self._tasks_in_flight[worker.worker_id] += 1
        stub = prefill_worker_pb2_grpc.PrefillWorkerStub(self._channels.get(worker.address))
        began_at, is_accepted = loop.time(), False

        def accepted() -> None:
            nonlocal is_accepted
            is_accepted = True
            patience.leased()
            if not timer.expired():
                timer.reschedule(patience.due)

        # The deadline of the call lies behind the wait: it is the wait that ends and is counted.
        call = stub.Generate(
            prefill_worker_pb2.PrefillWorkerGenerateRequest(task=task),
            timeout=max(patience.end - began_at, 0.0) + self._waits.connect_s,
        )
        timer = asyncio.timeout_at(min(began_at + self._waits.connect_s, patience.end))
        try:
            async with timer:
                return await _read(call, accepted)
        except BaseException as exc:
            self._leave(call, stub, task)
            if isinstance(exc, grpc.aio.AioRpcError):
                raise from_rpc_error(exc) from exc
            if isinstance(exc, TimeoutError):
                is_over = is_accepted or loop.time() >= patience.end
                raise _out_of_time(worker, is_over=is_over, waited_s=loop.time() - began_at) from exc
            raise
        finally:
            self._tokens_in_flight[worker.worker_id] -= task.uncached_tokens
            self._tasks_in_flight[worker.worker_id] -= 1
            if not self._tasks_in_flight[worker.worker_id]:  # none: the ids of workers that left are not kept
                del self._tokens_in_flight[worker.worker_id], self._tasks_in_flight[worker.worker_id]

    def _leave(
        self,
        call: "_Call",
        stub: "PrefillWorkerAsyncStub",
        task: prefill_queue_pb2.PrefillTask,
    ) -> None:
        """Give up a task without anybody waiting for its end: a handoff may be on its way."""
        call.cancel()
        leaving = self._leaving.start(self._cancel(stub, task), name=f"cancel-{task.request_id}")
        self._closing.add(leaving)
        leaving.add_done_callback(self._closing.discard)

    async def _cancel(self, stub: "PrefillWorkerAsyncStub", task: prefill_queue_pb2.PrefillTask) -> None:
        key = prefill_queue_pb2.TaskKey(request_id=task.request_id, attempt=task.attempt)
        try:
            await stub.Cancel(prefill_worker_pb2.PrefillWorkerCancelRequest(key=key), timeout=self._waits.connect_s)
        except grpc.aio.AioRpcError as exc:  # what it holds then ends by its pin's time
            log.debug("prefill.not_cancelled", request_id=task.request_id, reason=from_rpc_error(exc).reason.value)


def _out_of_time(worker: WorkerRecord, *, is_over: bool, waited_s: float) -> MeshError:
    """Count a wait that ended; `is_over`: it was the wait for the prefill, and another worker's would be no shorter."""
    if not is_over:
        telemetry.WAIT_ENDED.labels(wait="connect_s").inc()
        return TryElsewhereError(Reason.WORKER_LOST, f"{worker.worker_id} took nothing within {waited_s:.1f} s")
    telemetry.WAIT_ENDED.labels(wait="prefill_s").inc()
    return OutOfTimeError(
        Reason.PREFILL_FAILED, f"{worker.worker_id} did not compute the prefill within {waited_s:.1f} s"
    )


async def _read(
    call: "_Call",
    accepted: Callable[[], None],
) -> prefill_queue_pb2.TaskCompleted:
    """Read a stream to its handoff. Raises: TryElsewhereError(PREFILL_FAILED) when it ends without one."""
    progress = prefill_worker_pb2.PrefillProgress()
    async for message in call:
        if message.WhichOneof("event") == "handoff":
            return prefill_queue_pb2.TaskCompleted(
                handoff=message.handoff,
                computed_tokens=progress.computed_tokens,
                cached_tokens=progress.cached_tokens,
                prefix_tokens=progress.prefix_tokens,
            )
        progress = message.progress
        accepted()
    raise TryElsewhereError(Reason.PREFILL_FAILED, "the prefill worker ended the stream without a handoff")
