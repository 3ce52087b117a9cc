"""The decode worker's side of a remote prefill: decide, submit, wait, pull, commit; every failure means a local one.

Who holds which blocks, and until when:
    pinned prefix    decode's own blocks [0, cached); pinned before the decision, held until the whole is committed
    import           decode's new blocks [cached, cap); invisible until `commit_import`, freed by `abort_import`
    handoff's pin    the prefill worker's blocks; held until KvTransfer.Release, whose OK is the permission to commit
    prepared pin     decode's blocks [0, cap); held until the engine has computed the rest of the prompt
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.core.ids import SequenceHash
from kvmesh.core.remote_prefill import RemotePrefillDecision, RemotePrefillRules, decide
from kvmesh.core.waits import Waits
from kvmesh.engines.engine import EngineRequest, Import, Pin
from kvmesh.services.channels import Channels
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.identity import WorkerIdentity
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.transports.transport import Transport
from kvmesh.v1 import (
    decode_worker_pb2,
    generation_pb2,
    kv_transfer_pb2,
    kv_transfer_pb2_grpc,
    prefill_queue_pb2,
    prefill_queue_pb2_grpc,
)
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.layout import layout_to_wire
from kvmesh.wire.validation import duration

log = telemetry.logger(__name__)

_TRANSFER_BYTES_PER_S = 100 << 20
_PREFILL_SHARE = 0.25
"""A remote prefill may take this share of what remains of a request's time."""
_CALL_MARGIN_S = 1.0
"""The deadline of the call lies this much behind the wait, so that it is the wait that ends and is counted."""


@dataclass(slots=True)
class Prepared:
    """A prompt whose full blocks are all cached and pinned in the decode engine."""

    pin_id: int | None
    """Owned by the request until its prompt is computed; None once given back."""
    cached_tokens: int
    """What decode held before."""
    remote_tokens: int
    bytes_moved: int


class RemotePrefill:
    """Prepares prompts with the help of prefill workers."""

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        driver: EngineDriver,
        peers: Peers,
        channels: Channels,
        transport: Transport,
        rules: RemotePrefillRules,
        waits: Waits,
        required: bool,
    ) -> None:
        """`required`: a failed remote prefill fails the request instead of falling back to a local one."""
        self._identity = identity
        self._driver = driver
        self._peers = peers
        self._channels = channels
        self._transport = transport
        self._rules = rules
        self._waits = waits
        self._required = required
        self._queue_depth = 0
        self._tasks = OwnedTasks()
        self._giving_up: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Give back what others hold for this worker, within the bound of one call; the rest ends by time."""
        if self._giving_up:
            await asyncio.wait(tuple(self._giving_up), timeout=self._waits.connect_s)
        await self._tasks.aclose()

    def is_possible(self, model: str) -> bool:
        """Tell whether any prefill worker that could serve `model` is known; if not, no question need be asked."""
        return self._peers.prefill_workers(model) > 0

    async def prepare(
        self,
        request: decode_worker_pb2.DecodeRequest,
        engine_request: EngineRequest,
        *,
        prompt_tokens: int,
        deadline_at: float,
        on_decision: Callable[[generation_pb2.PrefillDecision], None],
    ) -> Prepared | None:
        """Have the prompt's full blocks computed elsewhere; None: compute it here.

        `on_decision` may be called twice: remote, then local when that failed.

        Raises: TryElsewhereError(PREFILL_FAILED) only where the policy requires remote prefills.
        """
        block_size = self._driver.info.block_size
        hashes = engine_request.block_hashes[: max_overlap_blocks(prompt_tokens, block_size)]
        pin = await self._driver.acquire(
            lambda engine: engine.pin_prefix(hashes), undo=lambda engine, held: engine.unpin(held.pin_id)
        )
        try:
            cached_tokens = len(pin.block_ids) * block_size
            if self._driver.info.layout is not None and len(pin.block_ids) == len(hashes):
                cached_tokens = prompt_tokens  # no full block is left to move: only full blocks do
            decision = self._decide(request, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
            on_decision(self._note(decision.is_remote, decision.reason.name.lower()))
            if not decision.is_remote:
                return None
            try:
                return await self._fetch(request, engine_request, pin, prompt_tokens, deadline_at)
            except MeshError as error:
                self._fall_back(request, error)
                on_decision(self._note(False, f"fallback_{error.reason.value.lower()}"))
                return None
        finally:
            self._driver.post(lambda engine: engine.unpin(pin.pin_id))

    def _decide(
        self, request: decode_worker_pb2.DecodeRequest, *, prompt_tokens: int, cached_tokens: int
    ) -> RemotePrefillDecision:
        return decide(
            self._rules,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            queue_depth=self._queue_depth,
            capable_workers=self._peers.prefill_workers(request.model),
        )

    def _note(self, remote: bool, reason: str) -> generation_pb2.PrefillDecision:
        telemetry.PREFILL_DECISIONS.labels(remote=str(remote).lower(), reason=reason).inc()
        return generation_pb2.PrefillDecision(remote=remote, reason=reason)

    def _fall_back(self, request: decode_worker_pb2.DecodeRequest, error: MeshError) -> None:
        log.warning(
            "prefill.fell_back", request_id=request.request_id, attempt=request.attempt,
            reason=error.reason.value, error=error.message,
        )  # fmt: skip
        if self._required:
            raise TryElsewhereError(
                Reason.PREFILL_FAILED, f"remote prefill is required and failed: {error.message}"
            ) from error

    async def _fetch(
        self,
        request: decode_worker_pb2.DecodeRequest,
        engine_request: EngineRequest,
        pin: Pin,
        prompt_tokens: int,
        deadline_at: float,
    ) -> Prepared:
        first_block = len(pin.block_ids)
        hashes = engine_request.block_hashes[: max_overlap_blocks(prompt_tokens, self._driver.info.block_size)]
        remaining_s = deadline_at - asyncio.get_running_loop().time()
        wait_s = min(self._waits.prefill_s, max(remaining_s, 0.0) * _PREFILL_SHARE)
        task = self._task(request, engine_request, prompt_tokens, first_block, wait_s)
        try:
            async with asyncio.timeout(wait_s):
                completed = await self._submit(task, wait_s)
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="prefill_s").inc()
            raise OutOfTimeError(Reason.PREFILL_FAILED, f"no prefill within {wait_s:.1f} s") from exc
        handoff = completed.handoff
        block_size = self._driver.info.block_size
        if self._driver.info.layout is None and handoff.WhichOneof("content") is None:
            return Prepared(pin_id=None, cached_tokens=0, remote_tokens=completed.computed_tokens, bytes_moved=0)
        try:
            self._check(handoff, first_block, hashes)
            wanted = await self._driver.acquire(
                lambda engine: engine.begin_import(hashes, first_block=first_block),
                undo=lambda engine, begun: engine.abort_import(begun.import_id),
            )
            committed = await self._move(handoff, wanted, hashes, engine_request.local_hashes[: len(hashes)])
        except BaseException:
            self._give_up(handoff)
            raise
        return Prepared(
            pin_id=committed.pin_id,
            cached_tokens=first_block * block_size,
            remote_tokens=len(wanted.block_ids) * block_size,
            bytes_moved=handoff.bytes_total,
        )

    def _task(
        self,
        request: decode_worker_pb2.DecodeRequest,
        engine_request: EngineRequest,
        prompt_tokens: int,
        first_block: int,
        wait_s: float,
    ) -> prefill_queue_pb2.PrefillTask:
        info = self._driver.info
        task = prefill_queue_pb2.PrefillTask(
            request_id=request.request_id,
            attempt=request.attempt,
            model=request.model,
            block_hashes=engine_request.block_hashes,
            first_block=first_block,
            uncached_tokens=prompt_tokens - first_block * info.block_size,
            time_to_live=duration(wait_s),
            lora=request.lora,
            cache_namespace=request.cache_namespace,
            traceparent=request.traceparent,
        )
        if request.HasField("priority"):
            task.priority = request.priority
        if engine_request.token_ids is None:
            task.text = engine_request.text or ""
        else:
            task.token_ids.CopyFrom(request.token_ids)
        if info.layout is not None:
            task.layout.CopyFrom(layout_to_wire(info.layout))
            task.transports.append(self._transport.name)
        return task

    async def _submit(self, task: prefill_queue_pb2.PrefillTask, wait_s: float) -> prefill_queue_pb2.TaskCompleted:
        address = self._peers.queue_address()
        if address is None:
            raise TryElsewhereError(Reason.PREFILL_FAILED, "no prefill queue is known")
        stub = prefill_queue_pb2_grpc.PrefillQueueStub(self._channels.get(address))
        call = stub.Submit(prefill_queue_pb2.SubmitRequest(task=task), timeout=wait_s + _CALL_MARGIN_S)
        try:
            async for message in call:
                event = message.WhichOneof("event")
                if event == "completed":
                    return message.completed
                if event == "queued":
                    self._check_depth(message.queued.position)
                else:
                    self._queue_depth = 0
        except grpc.aio.AioRpcError as exc:
            error = from_rpc_error(exc)
            if error.reason is Reason.DEADLINE:  # the task's time to live, which is this wait
                raise TimeoutError(error.message) from exc
            raise error from exc
        finally:
            call.cancel()
        raise TryElsewhereError(Reason.PREFILL_FAILED, "the queue ended the task without a result")

    def _check_depth(self, position: int) -> None:
        self._queue_depth = position
        if self._rules.max_queue_depth is not None and position > self._rules.max_queue_depth:
            self._queue_depth = 0  # known only from the queue's answers: the next request asks again
            raise TryElsewhereError(Reason.QUEUE_FULL, f"{position} tasks wait before this one")

    def _check(self, handoff: generation_pb2.KvHandoff, first_block: int, hashes: tuple[int, ...]) -> None:
        if self._driver.info.layout is None or handoff.layout != layout_to_wire(self._driver.info.layout):
            raise ConflictError(Reason.LAYOUT_MISMATCH, f"{handoff.worker_id} hands over blocks of another layout")
        if handoff.transport != self._transport.name:
            raise ConflictError(
                Reason.LAYOUT_MISMATCH, f"{handoff.worker_id} serves {handoff.transport}, not {self._transport.name}"
            )
        if (
            handoff.first_block != first_block
            or tuple(handoff.block_hashes) != hashes[first_block:]
            or len(handoff.blocks.source_block_ids) != len(handoff.block_hashes)
        ):
            raise TryElsewhereError(
                Reason.KV_TRANSFER_FAILED, f"{handoff.worker_id} hands over other blocks than asked for"
            )

    async def _move(
        self,
        handoff: generation_pb2.KvHandoff,
        wanted: Import,
        hashes: tuple[SequenceHash, ...],
        local: tuple[int, ...],
    ) -> Pin:
        """Pull, have the source say that it held still, commit. The import is aborted unless all three succeed."""
        try:
            await self._pull(handoff, wanted)
            await self._release(handoff)
        except BaseException:
            self._driver.post(lambda engine: engine.abort_import(wanted.import_id))
            raise
        return await self._driver.acquire(
            lambda engine: engine.commit_import(wanted.import_id, block_hashes=hashes, local_hashes=local),
            undo=lambda engine, pin: engine.unpin(pin.pin_id),
        )

    async def _pull(self, handoff: generation_pb2.KvHandoff, wanted: Import) -> None:
        memory = await self._driver.call(lambda engine: engine.kv_memory())
        if memory is None:
            raise ConflictError(Reason.LAYOUT_MISMATCH, "this engine has no KV memory")
        bound_s = self._waits.kv_transfer_s + handoff.bytes_total / _TRANSFER_BYTES_PER_S
        try:
            async with asyncio.timeout(bound_s):
                moved = await self._transport.pull(
                    handoff.agent_name,
                    source_block_ids=handoff.blocks.source_block_ids,
                    target=memory,
                    target_block_ids=wanted.block_ids,
                )
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="kv_transfer_s").inc()
            raise OutOfTimeError(Reason.KV_TRANSFER_FAILED, f"not moved within {bound_s:.1f} s") from exc
        telemetry.KV_BYTES_MOVED.labels(transport=self._transport.name).inc(moved)

    def _give_up(self, handoff: generation_pb2.KvHandoff) -> None:
        """Release without anybody waiting for it: the source would else hold its blocks until their pin ends."""
        if handoff.pin_id:
            task = self._tasks.start(self._release_quietly(handoff), name="release-handoff")
            self._giving_up.add(task)
            task.add_done_callback(self._giving_up.discard)

    async def _release_quietly(self, handoff: generation_pb2.KvHandoff) -> None:
        try:
            await self._release(handoff)
        except MeshError as error:
            log.debug("handoff.not_released", worker_id=handoff.worker_id, reason=error.reason.value)

    async def _release(self, handoff: generation_pb2.KvHandoff) -> None:
        stub = kv_transfer_pb2_grpc.KvTransferStub(self._channels.get(handoff.address))
        release = kv_transfer_pb2.KvTransferReleaseRequest(
            worker_id=handoff.worker_id, epoch=handoff.epoch, pin_id=handoff.pin_id
        )
        try:
            await stub.Release(release, timeout=self._waits.connect_s)
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from exc
