"""The tensorrt_llm engine: TensorRT-LLM's LLM API in this process.

It batches, caches and moves KV by itself. Where it moves KV (`transceiver`), a prefill-only request runs as
`context_only` and ends with an `EngineHandoff`, from which the decode side goes on as `generation_only`. Its KV events
and statistics are read in loops of their own; if one of them breaks, so does the engine: nobody would notice otherwise.

Never run on a real TensorRT-LLM: written from its sources, and tested against a stand-in with the same signatures.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvmesh.core.errors import FixRequestError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.engines.engine import EngineInfo, EngineLoad, EngineRequest, FinishReason, PromptForm
from kvmesh.engines.stream_thread import Piece, Publish, StreamUsage
from kvmesh.engines.streamed_engine import StreamedEngine
from kvmesh.engines.tensorrt_llm_api import TensorRtLlmApi, load_api, pack_handoff, unpack_handoff
from kvmesh.engines.tensorrt_llm_events import TensorRtLlmEvents, read_figures
from kvmesh.engines.tensorrt_llm_options import TensorRtLlmOptions

_DEFAULT_BLOCK_SIZE = 32
_ANSWER_S = 2.0
"""How long one question for events or figures may wait for some."""
_NOTHING_YET = (IndexError, asyncio.QueueEmpty, TimeoutError, RuntimeError)
"""What those questions raise when there is nothing, and before the first request has run."""
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class TensorRtLlmEngine(StreamedEngine):
    """Runs requests in one `LLM`."""

    def __init__(
        self,
        options: TensorRtLlmOptions,
        *,
        model: Path | str,
        vocab_size: int,
        api: TensorRtLlmApi | None = None,
    ) -> None:
        """Load `model`, which takes minutes. Raises: NotServedError(UNIMPLEMENTED) where the package is not."""
        api = api or load_api()
        info = EngineInfo(
            name="tensorrt_llm",
            accepts=frozenset({PromptForm.TOKENS}),
            block_size=options.block_size,
            total_blocks=0,
            max_sequences=options.max_sequences,
            max_context_tokens=options.max_context_tokens,
            vocab_size=vocab_size,
            layout=None,
        )
        streams = _LlmStreams(_load(options, model=model, api=api), api, options)
        super().__init__(info, streams, has_events=options.event_buffer > 0)


def _load(options: TensorRtLlmOptions, *, model: Path | str, api: TensorRtLlmApi) -> Any:
    cache: dict[str, Any] = {
        "enable_block_reuse": True,
        "event_buffer_max_size": options.event_buffer,
        "free_gpu_memory_fraction": options.gpu_memory_fraction,
    }
    if options.block_size != _DEFAULT_BLOCK_SIZE:
        cache["tokens_per_block"] = options.block_size  # older releases have no such field, and this default
    chosen: dict[str, Any] = {}
    if options.max_context_tokens:
        chosen["max_seq_len"] = options.max_context_tokens
    if options.transceiver != "none":
        chosen["cache_transceiver_config"] = api.CacheTransceiverConfig(backend=options.transceiver)
    return api.LLM(
        model=str(model),
        backend="pytorch",
        tensor_parallel_size=options.tensor_parallel,
        max_batch_size=options.max_sequences,
        max_num_tokens=options.max_num_tokens,
        kv_cache_config=api.KvCacheConfig(**cache),
        enable_iter_perf_stats=True,
        **chosen,
    )


class _LlmStreams:
    """The streams of one LLM."""

    def __init__(self, llm: Any, api: TensorRtLlmApi, options: TensorRtLlmOptions) -> None:
        self._llm = llm
        self._api = api
        self._options = options
        self._stat: Mapping[str, Any] = {}
        """The last iteration's."""
        self._loops: list[asyncio.Task[None]] = []

    async def open(self, publish: Publish) -> None:
        loop = asyncio.get_running_loop()
        self._loops.append(loop.create_task(self._read_stats(), name="tensorrt-llm-stats"))
        if self._options.event_buffer:
            events = TensorRtLlmEvents(block_size=self._options.block_size)
            self._loops.append(loop.create_task(self._read_events(events, publish), name="tensorrt-llm-events"))

    def figures(self, counted: EngineLoad) -> EngineLoad:
        for task in self._loops:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        return read_figures(counted, self._stat) if self._stat else counted

    async def aclose(self) -> None:
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await asyncio.to_thread(self._llm.shutdown)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        assert request.token_ids is not None
        result = self._generate(request, request.token_ids.tolist())
        finish: FinishReason | None = None
        handed_on, wait_s = 0, self._options.first_token_s
        try:
            while finish is None:
                output = await self._next(result, wait_s)
                wait_s = self._options.token_gap_s
                completion = output.outputs[0]
                tokens = tuple(completion.token_ids[handed_on:])
                handed_on += len(tokens)
                finish = _finish_of(completion.finish_reason)
                usage = StreamUsage(len(request.token_ids), getattr(output, "cached_tokens", None))
                if request.prefill_only:
                    if finish is None:
                        continue
                    moves_kv = self._options.transceiver != "none"
                    handoff = pack_handoff(completion.disaggregated_params) if moves_kv else None
                    yield Piece(finish=FinishReason.PREFILLED, handoff=handoff, usage=usage)
                elif tokens or finish is not None:
                    yield Piece(token_ids=tokens, finish=finish, usage=usage)
        finally:
            if finish is None:
                result.abort()

    def _generate(self, request: EngineRequest, token_ids: list[int]) -> Any:
        """Raises: FixRequestError."""
        if request.lora is not None:
            raise FixRequestError(Reason.INVALID_FIELD, "lora: this engine loads no adapters", field="lora")
        sampling, chosen = request.sampling, {}
        if request.handoff is not None:
            chosen["disaggregated_params"] = unpack_handoff(request.handoff, self._api)
        elif request.prefill_only and self._options.transceiver != "none":
            chosen["disaggregated_params"] = self._api.DisaggregatedParams(request_type="context_only")
        if request.cache_namespace is not None:
            chosen["cache_salt"] = request.cache_namespace
        try:
            return self._llm.generate_async(
                token_ids,
                sampling_params=self._api.SamplingParams(
                    max_tokens=1 if request.prefill_only else sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k or None,
                    seed=sampling.seed,
                    ignore_eos=sampling.ignore_eos,
                    detokenize=False,
                ),
                streaming=True,
                **chosen,
            )
        except ValueError as exc:
            raise FixRequestError(Reason.INVALID_FIELD, f"prompt: {exc}", field="prompt") from exc

    async def _next(self, result: AsyncIterator[Any], wait_s: float) -> Any:
        try:
            async with asyncio.timeout(wait_s):
                return await anext(result)
        except TimeoutError as exc:
            raise TryElsewhereError(Reason.WORKER_LOST, f"no output within {wait_s:g} s") from exc
        except StopAsyncIteration as exc:
            raise TryElsewhereError(Reason.WORKER_LOST, "the output ended before its finish") from exc

    async def _read_events(self, events: TensorRtLlmEvents, publish: Publish) -> None:
        def take(event: Mapping[str, Any]) -> None:
            if meant := events.translate(event):
                publish(meant)

        await self._poll(self._llm.get_kv_cache_events_async, take)

    async def _read_stats(self) -> None:
        def take(stat: Mapping[str, Any]) -> None:
            self._stat = stat

        await self._poll(self._llm.get_stats_async, take)

    async def _poll(
        self, ask: Callable[..., AsyncIterator[Mapping[str, Any]]], take: Callable[[Mapping[str, Any]], None]
    ) -> None:
        while True:
            with suppress(*_NOTHING_YET):
                async for told in ask(timeout=_ANSWER_S):
                    take(told)
            await asyncio.sleep(self._options.poll_s)


def _finish_of(reason: str | None) -> FinishReason | None:
    """Raises: OutOfTimeError, TryElsewhereError for ends that are none of a good answer."""
    match reason:
        case None:
            return None
        case "timeout":
            raise OutOfTimeError(Reason.DEADLINE, "TensorRT-LLM gave the request up in the middle of it")
        case "cancelled":
            raise TryElsewhereError(Reason.WORKER_LOST, "TensorRT-LLM dropped the request")
        case _:
            return _FINISH.get(reason, FinishReason.STOP)
