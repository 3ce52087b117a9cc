"""The decode worker's side of a remote prefill: decide, submit, wait, fetch; every failure means a local one.

Who holds which blocks, and until when:
    pinned prefix    decode's own blocks [0, cached); pinned before the decision, held until the whole is committed
    import           decode's new blocks [cached, cap); see `handoff_fetch`
    prepared pin     decode's blocks [0, cap); held until the engine has computed the rest of the prompt
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.core.remote_prefill import RemotePrefillDecision, RemotePrefillRules, decide
from kvmesh.core.waits import Waits
from kvmesh.engines.engine import EngineRequest, Pin
from kvmesh.services.channels import Channels
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.handoff_fetch import HandoffFetch
from kvmesh.services.identity import WorkerIdentity
from kvmesh.services.peers import Peers
from kvmesh.transports.transport import Transport
from kvmesh.v1 import (
    decode_worker_pb2,
    generation_pb2,
    prefill_queue_pb2,
    prefill_queue_pb2_grpc,
)
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.layout import layout_to_wire
from kvmesh.wire.validation import duration

log = telemetry.logger(__name__)

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
        self._fetcher = HandoffFetch(driver=driver, channels=channels, transport=transport, waits=waits)

    async def aclose(self) -> None:
        """Give back what others hold for this worker."""
        await self._fetcher.aclose()

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
        fetched = await self._fetcher.fetch(
            handoff, first_block=first_block, hashes=hashes, local_hashes=engine_request.local_hashes[: len(hashes)]
        )
        return Prepared(
            pin_id=fetched.pin_id,
            cached_tokens=first_block * block_size,
            remote_tokens=(len(hashes) - first_block) * block_size,
            bytes_moved=fetched.bytes_moved,
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
