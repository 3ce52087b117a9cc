"""The decode worker's side of a remote prefill: decide, submit, wait, fetch; every failure means a local one.

Who holds which blocks, and until when:
    pinned prefix    decode's own blocks [0, cached); pinned before the decision, held until the whole is committed
    lent prefix      the same blocks, lent to the prefill worker that computes the rest; ends with the wait for it
    import           decode's new blocks [cached, cap); see `handoff_fetch`
    prepared pin     decode's blocks [0, cap); held until the engine has computed the rest of the prompt
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, MeshError, Reason, TryElsewhereError
from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.core.remote_prefill import RemotePrefillDecision, RemotePrefillReason, RemotePrefillRules, decide
from kvmesh.core.waits import Waits
from kvmesh.engines.engine import EngineHandoff, EngineRequest, Pin
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.handoff_fetch import HandoffFetch
from kvmesh.services.handoff_source import HandoffSource
from kvmesh.services.peers import Peers
from kvmesh.services.prefills import Patience, Prefills
from kvmesh.services.worker_transports import WorkerTransports
from kvmesh.v1 import decode_worker_pb2, generation_pb2, prefill_queue_pb2
from kvmesh.wire.layout import layout_to_wire
from kvmesh.wire.validation import duration

log = telemetry.logger(__name__)

_PREFILL_SHARE = 0.25
"""A remote prefill may take this share of what remains of a request's time."""
_FIRST_TOKEN_SHARE = 0.5
"""While it is being computed, it may take this share of the wait for a first token: the rest is for a local prefill."""


@dataclass(slots=True)
class Prepared:
    """A prompt whose full blocks are all cached and pinned in the decode engine."""

    pin_id: int | None
    """Owned by the request until its prompt is computed; None once given back."""
    cached_tokens: int
    """What decode held before."""
    remote_tokens: int
    """What a prefill worker handed over."""
    bytes_moved: int
    """To the prefill worker and back."""
    handoff: EngineHandoff | None = None
    """Of engines that move their own KV: the decode engine goes on from it, and no pin is held."""


class RemotePrefill:
    """Prepares prompts with the help of prefill workers."""

    def __init__(
        self,
        *,
        driver: EngineDriver,
        peers: Peers,
        prefills: Prefills,
        fetcher: HandoffFetch,
        transports: WorkerTransports,
        source: HandoffSource,
        rules: RemotePrefillRules,
        waits: Waits,
        required: bool,
    ) -> None:
        """Own `prefills` and `fetcher`; `source` lends this worker's blocks.

        `required`: where the rules say remote, local is no way out.
        """
        self._driver = driver
        self._peers = peers
        self._transports = transports
        self._source = source
        self._rules = rules
        self._waits = waits
        self._required = required
        self._prefills = prefills
        self._fetcher = fetcher

    async def aclose(self) -> None:
        """Give back what others hold for this worker."""
        await self._prefills.aclose()
        await self._fetcher.aclose()

    def is_possible(self, model: str) -> bool:
        """Tell whether a prefill of `model` may end up elsewhere; if not, no question need be asked."""
        return self._required or self._peers.prefill_workers(model) > 0

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
            decision = self._decide(request.model, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
            try:
                if decision.reason is RemotePrefillReason.NO_CAPABLE_WORKER and self._required:
                    await self._wait_for_worker(request.model, wait_s=self._wait_s(deadline_at))
                    decision = self._decide(request.model, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
                reason = self._prefills.reason if decision.is_remote else decision.reason.name.lower()
                on_decision(self._note(decision.is_remote, reason))
                if not decision.is_remote:
                    return None
                patience = self._patience(deadline_at)
                return await self._fetch(request, engine_request, pin, prompt_tokens, patience)
            except MeshError as error:
                self._fall_back(request, error)
                on_decision(self._note(False, f"fallback_{error.reason.value.lower()}"))
                return None
        finally:
            self._driver.post(lambda engine: engine.unpin(pin.pin_id))

    def _decide(self, model: str, *, prompt_tokens: int, cached_tokens: int) -> RemotePrefillDecision:
        return decide(
            self._rules,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            queue_depth=self._prefills.depth,
            capable_workers=self._peers.prefill_workers(model),
        )

    async def _wait_for_worker(self, model: str, *, wait_s: float) -> None:
        """Wait for a prefill worker to come. Raises: TryElsewhereError(PREFILL_FAILED) when none has after `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                while not self._peers.prefill_workers(model):
                    await self._peers.changed()
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="prefill_s").inc()
            raise TryElsewhereError(
                Reason.PREFILL_FAILED,
                f"no prefill worker for {model or 'any model'} came within {wait_s:.1f} s: start one, or unset "
                "remote_prefill.required",
            ) from exc

    def _wait_s(self, deadline_at: float) -> float:
        return min(self._waits.prefill_s, _share_of_time(deadline_at))

    def _patience(self, deadline_at: float) -> Patience:
        """Return `waits.prefill_s` for a lease, and more once there is one."""
        total_s = max(self._waits.prefill_s, self._waits.first_token_s * _FIRST_TOKEN_SHARE)
        return Patience(lease_s=self._waits.prefill_s, total_s=min(total_s, _share_of_time(deadline_at)))

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
        patience: Patience,
    ) -> Prepared:
        """Submit the task and fetch what comes of it; `pin` holds what is here already."""
        first_block = len(pin.block_ids)
        time_to_live_s = patience.end - asyncio.get_running_loop().time()
        task = self._task(request, engine_request, prompt_tokens, first_block, time_to_live_s)
        completed = await self._compute_elsewhere(task, pin, patience)
        info, handoff = self._driver.info, completed.handoff
        if info.layout is None and handoff.WhichOneof("content") != "blocks":
            native = None
            if handoff.WhichOneof("content") == "engine_state":
                native = EngineHandoff(handoff.engine_state, tuple(handoff.first_tokens))
            return Prepared(
                pin_id=None, cached_tokens=0, remote_tokens=completed.computed_tokens, bytes_moved=0, handoff=native
            )
        hashes = engine_request.block_hashes[: max_overlap_blocks(prompt_tokens, info.block_size)]
        fetched = await self._fetcher.fetch(
            handoff, first_block=first_block, hashes=hashes, local_hashes=engine_request.local_hashes[: len(hashes)]
        )
        prefix_blocks = min(completed.prefix_tokens // info.block_size, first_block)  # no more than what was lent
        return Prepared(
            pin_id=fetched.pin_id,
            cached_tokens=first_block * info.block_size,
            remote_tokens=(len(hashes) - first_block) * info.block_size,
            bytes_moved=fetched.bytes_moved + prefix_blocks * (info.layout.bytes_per_block if info.layout else 0),
        )

    async def _compute_elsewhere(
        self, task: prefill_queue_pb2.PrefillTask, pin: Pin, patience: Patience
    ) -> prefill_queue_pb2.TaskCompleted:
        """Wait for a prefill worker to compute the task, while it may pull what `pin` holds."""
        if self._driver.info.layout is not None and pin.block_ids:
            await self._lend_prefix(task, pin)
        try:
            return await self._prefills.compute(task, patience=patience)
        finally:
            self._source.take_back(task.prefix)

    async def _lend_prefix(self, task: prefill_queue_pb2.PrefillTask, pin: Pin) -> None:
        """Have the task carry what `pin` holds; it does without where this worker serves no blocks."""
        lent = await self._driver.acquire(
            lambda engine: engine.pin_prefix(pin.block_hashes), undo=lambda engine, held: engine.unpin(held.pin_id)
        )
        try:
            task.prefix.CopyFrom(await self._source.lend(lent))
        except ConflictError as error:
            log.debug("prefix.not_lent", request_id=task.request_id, error=error.message)

    def _task(
        self,
        request: decode_worker_pb2.DecodeRequest,
        engine_request: EngineRequest,
        prompt_tokens: int,
        first_block: int,
        time_to_live_s: float,
    ) -> prefill_queue_pb2.PrefillTask:
        info = self._driver.info
        task = prefill_queue_pb2.PrefillTask(
            request_id=request.request_id,
            attempt=request.attempt,
            model=request.model,
            block_hashes=engine_request.block_hashes,
            first_block=first_block,
            uncached_tokens=prompt_tokens - first_block * info.block_size,
            time_to_live=duration(time_to_live_s),
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
            task.transports.extend(self._transports.reaches)
        return task


def _share_of_time(deadline_at: float) -> float:
    return max(deadline_at - asyncio.get_running_loop().time(), 0.0) * _PREFILL_SHARE
