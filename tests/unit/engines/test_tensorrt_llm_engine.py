"""The tensorrt_llm engine against a stand-in with the LLM API's signatures: contract, handoff, events, figures."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any, ClassVar

import numpy as np
import pytest

from kvmesh.core.errors import FixRequestError, NotServedError, Reason
from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent
from kvmesh.engines.engine import EngineHandoff, EngineLoad, EngineRequest, FinishReason, Output, Sampling
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.engines.tensorrt_llm import TensorRtLlmEngine
from kvmesh.engines.tensorrt_llm_api import TensorRtLlmApi, load_api, pack_handoff, unpack_handoff
from kvmesh.engines.tensorrt_llm_events import TensorRtLlmEvents, read_figures
from kvmesh.engines.tensorrt_llm_options import TensorRtLlmOptions, parse
from kvmesh.runtime.engine_registry import EnginePlan
from kvmesh.testing.engine_contract import Answer, EngineContract, attempt, run_all
from kvmesh.testing.mesh import generate, open_frontend, running_mesh
from kvmesh.v1 import generation_pb2

VOCAB_SIZE = 1_000
BOUND_S = 15.0


@dataclass(slots=True, kw_only=True)
class DisaggregatedParams:
    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None


@dataclass(kw_only=True)
class SamplingParams:
    end_id: int | None = None
    max_tokens: int = 32
    n: int = 1
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    ignore_eos: bool = False
    detokenize: bool = True


@dataclass(kw_only=True)
class KvCacheConfig:
    enable_block_reuse: bool = True
    max_tokens: int | None = None
    free_gpu_memory_fraction: float | None = None
    event_buffer_max_size: int = 0
    tokens_per_block: int = 32


@dataclass(kw_only=True)
class CacheTransceiverConfig:
    backend: str | None = None
    max_tokens_in_buffer: int | None = None


@dataclass
class CompletionOutput:
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    disaggregated_params: DisaggregatedParams | None = None


class RequestOutput:
    """Yields itself with one more token each time, as the streaming RequestOutput does."""

    def __init__(
        self, llm: "LLM", prompt: list[int], params: SamplingParams, disagg: DisaggregatedParams | None
    ) -> None:
        self.outputs = [CompletionOutput()]
        self.cached_tokens = 0
        self.was_aborted = False
        self.prompt = prompt
        self.params = params
        self.disagg = disagg
        self._llm = llm

    def abort(self) -> None:
        self.was_aborted = True

    def __aiter__(self) -> "RequestOutput":
        return self

    async def __anext__(self) -> "RequestOutput":
        completion, llm = self.outputs[0], self._llm
        if completion.finish_reason is not None:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        if llm.hold_after is not None and len(completion.token_ids) >= llm.hold_after:
            await asyncio.Event().wait()
        kind = self.disagg.request_type if self.disagg is not None else None
        completion.token_ids.append((sum(self.prompt) + len(completion.token_ids)) % VOCAB_SIZE)
        if len(completion.token_ids) >= self.params.max_tokens:
            completion.finish_reason = llm.finish_reason
        if kind == "context_only":
            completion.disaggregated_params = DisaggregatedParams(
                request_type="context_only",
                first_gen_tokens=list(completion.token_ids),
                ctx_request_id=41,
                opaque_state=b"\x00where the blocks are\xff",
            )
        return self


class LLM:
    """The part of `tensorrt_llm.LLM` that the engine calls."""

    made: ClassVar[list["LLM"]] = []

    def __init__(
        self,
        model: str,
        tokenizer: Any = None,
        *,
        backend: str | None = None,
        tensor_parallel_size: int = 1,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        max_seq_len: int | None = None,
        kv_cache_config: KvCacheConfig | None = None,
        cache_transceiver_config: CacheTransceiverConfig | None = None,
        enable_iter_perf_stats: bool = False,
    ) -> None:
        self.arguments = {name: value for name, value in locals().items() if name != "self"}
        self.requests: list[RequestOutput] = []
        self.events: list[dict[str, Any]] = []
        self.stats: list[dict[str, Any]] = []
        self.hold_after: int | None = None
        self.finish_reason = "length"
        self.is_shut_down = False
        self.breaks_with: Exception | None = None
        LLM.made.append(self)

    def generate_async(  # noqa: PLR0917  # the package's own signature
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        streaming: bool = False,
        disaggregated_params: DisaggregatedParams | None = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        assert streaming
        assert sampling_params is not None
        assert isinstance(inputs, list)
        if len(inputs) > 500:
            raise ValueError("The sum of prompt length and max_tokens exceeds max_seq_len")
        self.requests.append(RequestOutput(self, inputs, sampling_params, disaggregated_params))
        return self.requests[-1]

    async def get_kv_cache_events_async(  # as the package has it
        self,
        timeout: float | None = 2,  # noqa: ASYNC109
    ) -> AsyncIterator[dict[str, Any]]:
        if self.breaks_with is not None:
            raise self.breaks_with
        while self.events:
            yield self.events.pop(0)
        raise IndexError("queue is empty")

    async def get_stats_async(  # as above
        self,
        timeout: float | None = 2,  # noqa: ASYNC109
    ) -> AsyncIterator[dict[str, Any]]:
        if not self.requests:
            raise RuntimeError("IterationResult is not properly instantiated.")
        while self.stats:
            yield self.stats.pop(0)

    def shutdown(self) -> None:
        self.is_shut_down = True


API = TensorRtLlmApi(LLM, SamplingParams, KvCacheConfig, CacheTransceiverConfig, DisaggregatedParams)


class TestTensorRtLlmEngine(EngineContract):
    def make_engine(self, *, total_blocks: int = 64, block_size: int = 4, max_sequences: int = 4) -> TensorRtLlmEngine:
        options = TensorRtLlmOptions(block_size=block_size, max_sequences=max_sequences, event_buffer=0)
        return TensorRtLlmEngine(options, model="model", vocab_size=VOCAB_SIZE, api=API)


MakeEngine = Callable[..., tuple[TensorRtLlmEngine, LLM]]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    made: list[TensorRtLlmEngine] = []

    def make(**options: Any) -> tuple[TensorRtLlmEngine, LLM]:
        given = TensorRtLlmOptions(**{"block_size": 4, "poll_s": 0.001, "event_buffer": 0, **options})
        engine = TensorRtLlmEngine(given, model="folder", vocab_size=VOCAB_SIZE, api=API)
        made.append(engine)
        return engine, LLM.made[-1]

    yield make
    for engine in made:
        engine.close()
    LLM.made.clear()


def tokens_request(tokens: list[int], number: int = 1, max_tokens: int = 3, **fields: Any) -> EngineRequest:
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, seed=5)
    request = EngineRequest(attempt(number), sampling, token_ids=np.array(tokens, dtype=np.uint32))
    return changed(request, **fields)


def answer_of(engine: TensorRtLlmEngine, request: EngineRequest) -> Answer:
    engine.submit(request)
    return run_all(engine).answers[request.key]


def events_until(engine: TensorRtLlmEngine, count: int) -> list[KvEvent]:
    events: list[KvEvent] = []
    deadline = time.monotonic() + BOUND_S
    while len(events) < count:
        assert time.monotonic() < deadline, events
        events += engine.step().kv_events
    return events


def load_until(engine: TensorRtLlmEngine, is_over: Callable[[EngineLoad], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not is_over(engine.load()):
        assert time.monotonic() < deadline, engine.load()


def stored_event(event_id: int, parent: int | None, blocks: dict[int, list[int]]) -> dict[str, Any]:
    listed = [
        {
            "type": "stored_block", "block_hash": name, "cache_level": 0, "priority": 35,
            "tokens": [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens],
        }
        for name, tokens in blocks.items()
    ]  # fmt: skip
    return {"event_id": event_id, "data": {"type": "stored", "parent_hash": parent, "blocks": listed}}


def ours(tokens: list[int], *, block_size: int = 4) -> BlocksStored:
    local = local_block_hashes(np.array(tokens, dtype=np.uint32), block_size)
    return BlocksStored(None, sequence_hashes(local), tuple(local))


def test_the_model_is_loaded_as_the_options_say(make_engine: MakeEngine) -> None:
    _, llm = make_engine(
        block_size=64, max_sequences=8, max_num_tokens=4_096, max_context_tokens=2_048, tensor_parallel=2,
        gpu_memory_fraction=0.5, event_buffer=16, transceiver="NIXL",
    )  # fmt: skip

    assert llm.arguments == {
        "model": "folder", "tokenizer": None, "backend": "pytorch", "tensor_parallel_size": 2, "max_batch_size": 8,
        "max_num_tokens": 4_096, "max_seq_len": 2_048, "enable_iter_perf_stats": True,
        "kv_cache_config": KvCacheConfig(
            event_buffer_max_size=16, free_gpu_memory_fraction=0.5, tokens_per_block=64, enable_block_reuse=True
        ),
        "cache_transceiver_config": CacheTransceiverConfig(backend="NIXL"),
    }  # fmt: skip


def test_sampling_is_passed_on(make_engine: MakeEngine) -> None:
    engine, llm = make_engine()
    sampling = Sampling(max_tokens=2, temperature=0.5, top_p=0.9, top_k=7, seed=3, ignore_eos=True)

    answer_of(engine, changed(tokens_request([1, 2]), sampling=sampling))

    (sent,) = llm.requests
    assert sent.prompt == [1, 2]
    assert sent.params == SamplingParams(
        max_tokens=2, temperature=0.5, top_p=0.9, top_k=7, seed=3, ignore_eos=True, detokenize=False
    )


def test_a_cancelled_request_is_aborted(make_engine: MakeEngine) -> None:
    engine, llm = make_engine()
    llm.hold_after = 1
    engine.submit(tokens_request([1, 2]))
    outputs: list[Output] = []
    deadline = time.monotonic() + BOUND_S
    while not outputs:
        assert time.monotonic() < deadline
        outputs += engine.step().outputs

    engine.cancel(attempt(1))
    engine.close()

    assert llm.requests[0].was_aborted
    assert llm.is_shut_down


def test_silence_ends_with_its_wait(make_engine: MakeEngine) -> None:
    engine, llm = make_engine(first_token_s=0.1)
    llm.hold_after = 0

    answer = answer_of(engine, tokens_request([1, 2]))

    assert answer.outputs[-1].error == "WORKER_LOST: no output within 0.1 s"
    assert llm.requests[0].was_aborted


@pytest.mark.parametrize(
    ("finish_reason", "error"),
    [("timeout", "DEADLINE: "), ("cancelled", "WORKER_LOST: ")],
    ids=["timeout", "cancelled"],
)
def test_an_end_that_is_no_answers_fails_the_request(finish_reason: str, error: str, make_engine: MakeEngine) -> None:
    engine, llm = make_engine()
    llm.finish_reason = finish_reason

    answer = answer_of(engine, tokens_request([1, 2], max_tokens=1))

    assert (answer.outputs[-1].error or "").startswith(error)


def test_a_stop_is_a_stop(make_engine: MakeEngine) -> None:
    engine, llm = make_engine()
    llm.finish_reason = "stop"

    assert answer_of(engine, tokens_request([1, 2])).finish is FinishReason.STOP


def test_what_the_llm_refuses_fails_that_request(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()

    answer = answer_of(engine, tokens_request([1] * 501))

    assert (answer.outputs[-1].error or "").startswith("INVALID_FIELD: prompt: The sum of prompt length")


def test_a_prefill_is_handed_over_and_decoded_elsewhere_as_by_one_engine(make_engine: MakeEngine) -> None:
    whole, _ = make_engine()
    prefill, prefill_llm = make_engine(transceiver="UCX")
    decode, decode_llm = make_engine(transceiver="UCX")
    expected = answer_of(whole, tokens_request([1, 2, 3], max_tokens=4)).token_ids

    prefilled = answer_of(prefill, tokens_request([1, 2, 3], prefill_only=True))
    handoff = prefilled.outputs[-1].handoff
    assert handoff is not None
    decoded = answer_of(decode, tokens_request([1, 2, 3], max_tokens=4, handoff=handoff))

    assert (prefilled.produced, prefilled.finish) == (0, FinishReason.PREFILLED)
    assert prefill_llm.requests[0].disagg == DisaggregatedParams(request_type="context_only")
    assert prefill_llm.requests[0].params.max_tokens == 1
    assert handoff.first_tokens == (6,)
    assert decode_llm.requests[0].disagg == DisaggregatedParams(
        request_type="generation_only", first_gen_tokens=[6], ctx_request_id=41,
        opaque_state=b"\x00where the blocks are\xff",
    )  # fmt: skip
    assert decoded.token_ids == expected == [6, 7, 8, 9]


async def test_a_mesh_hands_the_engines_own_state_from_prefill_to_decode() -> None:
    options = TensorRtLlmOptions(block_size=4, transceiver="UCX", event_buffer=0)

    def build(node: str, *, index: int = 0, allocate: Allocate = allocate_here) -> TensorRtLlmEngine:
        return TensorRtLlmEngine(options, model=node, vocab_size=VOCAB_SIZE, api=API)

    plan = EnginePlan(model_name="native", tokenizer=None, min_uncached_tokens=1, build=build)
    async with running_mesh(plan=plan, mesh__decode=1, mesh__prefill=1) as mesh, open_frontend(mesh) as frontend:
        prompt = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=[1, 2, 3]))
        answer = await generate(frontend, prompt, sampling=generation_pb2.SamplingParams(max_tokens=4))
    llms = {llm.arguments["model"]: llm for llm in LLM.made}
    LLM.made.clear()

    assert answer.token_ids == [6, 7, 8, 9]
    assert answer.finished is not None
    assert answer.finished.usage.remote_prefill_tokens == 3
    prefilled, decoded = (request.disagg for node in ("NODE2", "NODE1") for request in llms[node].requests)
    assert prefilled == DisaggregatedParams(request_type="context_only")
    assert decoded is not None
    assert (decoded.request_type, decoded.opaque_state) == ("generation_only", b"\x00where the blocks are\xff")


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"opaque_state": "***"}', b'{"unknown": 1}'])
def test_a_state_of_another_engine_is_refused(state: bytes) -> None:
    with pytest.raises(FixRequestError, match="engine_state") as caught:
        unpack_handoff(EngineHandoff(state, (1,)), API)

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED


def test_a_handoff_survives_being_packed() -> None:
    params = DisaggregatedParams(
        request_type="context_only",
        first_gen_tokens=[1, 2],
        ctx_request_id=2**63,
        opaque_state=b"\x80",
        draft_tokens=[3],
    )

    unpacked = unpack_handoff(pack_handoff(params), API)

    assert unpacked == changed(params, request_type="generation_only")


def test_events_of_its_cache_come_with_the_steps(make_engine: MakeEngine) -> None:
    engine, llm = make_engine(event_buffer=16)
    created = {"event_id": 0, "data": {"type": "created", "num_blocks_per_cache_level": [8, 0]}}
    llm.events += [created, stored_event(1, None, {700: [1, 2, 3, 4]}), stored_event(2, 700, {701: [5, 6, 7, 8]})]
    engine.submit(tokens_request([1, 2]))

    events = events_until(engine, 2)

    whole = ours([1, 2, 3, 4, 5, 6, 7, 8])
    first, second = whole.block_hashes
    assert events == [
        BlocksStored(None, (first,), whole.local_hashes[:1]),
        BlocksStored(first, (second,), whole.local_hashes[1:]),
    ]


def test_events_come_without_any_request(make_engine: MakeEngine) -> None:
    engine, llm = make_engine(event_buffer=16)
    llm.events.append(stored_event(0, None, {700: [1, 2, 3, 4]}))

    assert engine.has_work()
    assert events_until(engine, 1) == [ours([1, 2, 3, 4])]


def test_a_feed_that_breaks_ends_the_engine(make_engine: MakeEngine) -> None:
    engine, llm = make_engine(event_buffer=16)
    llm.breaks_with = ValueError("the executor is gone")

    with pytest.raises(ValueError, match="the executor is gone"):
        load_until(engine, lambda load: False)


def test_a_block_that_is_not_full_or_not_on_the_gpu_is_not_claimed() -> None:
    events = TensorRtLlmEvents(block_size=4)
    partly = stored_event(0, None, {1: [1, 2, 3, 4], 2: [5, 6]})
    offloaded = stored_event(1, None, {3: [9, 9, 9, 9]})
    offloaded["data"]["blocks"][0]["cache_level"] = 1

    assert events.translate(partly) == [ours([1, 2, 3, 4])]
    assert events.translate(offloaded) == []


def test_a_block_that_leaves_the_gpu_is_removed() -> None:
    events = TensorRtLlmEvents(block_size=4)
    stored = ours([1, 2, 3, 4])
    events.translate(stored_event(0, None, {1: [1, 2, 3, 4]}))
    level = {"type": "event_diff", "old_value": 0, "new_value": 1}
    updated = {"event_id": 1, "data": {"type": "updated", "block_hash": 1, "cache_level": level, "priority": None}}

    assert events.translate(updated) == [BlocksRemoved(stored.block_hashes)]
    assert events.translate({"event_id": 2, "data": {"type": "removed", "block_hashes": [1]}}) == []


def test_a_missing_event_takes_back_every_claim() -> None:
    events = TensorRtLlmEvents(block_size=4)
    events.translate(stored_event(0, None, {1: [1, 2, 3, 4]}))

    meant = events.translate(stored_event(2, None, {2: [5, 6, 7, 8]}))

    assert meant == [CacheCleared(), ours([5, 6, 7, 8])]


def test_another_ranks_events_are_left_out() -> None:
    events = TensorRtLlmEvents(block_size=4)
    event = stored_event(0, None, {1: [1, 2, 3, 4]})

    assert events.translate({**event, "attention_dp_rank": 1}) == []
    assert events.translate({**event, "attention_dp_rank": 0}) == [ours([1, 2, 3, 4])]


def test_figures_are_the_last_iterations() -> None:
    counted = EngineLoad(active_requests=5, max_requests=8, waiting_requests=1)
    stat = {
        "numActiveRequests": 3, "numQueuedRequests": 2,
        "kvCacheStats": {"maxNumBlocks": 100, "usedNumBlocks": 25, "freeNumBlocks": 75, "cacheHitRate": 0.5},
    }  # fmt: skip

    assert read_figures(counted, stat) == EngineLoad(
        active_requests=3, max_requests=8, active_blocks=25, total_blocks=100, waiting_requests=3, cache_usage=0.25,
        prefix_hit_rate=0.5,
    )  # fmt: skip
    assert read_figures(counted, {"numQueuedRequests": None}) == counted


def test_figures_reach_the_load(make_engine: MakeEngine) -> None:
    engine, llm = make_engine()
    llm.stats.append({"kvCacheStats": {"maxNumBlocks": 10, "usedNumBlocks": 5}})
    answer_of(engine, tokens_request([1, 2]))

    load_until(engine, lambda load: load.total_blocks == 10)

    assert engine.load().cache_usage == 0.5


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("libcuda.so"), RuntimeError("no GPU")])
def test_without_the_package_it_says_what_to_install(error: Exception) -> None:
    def load(name: str) -> Any:
        raise error

    with pytest.raises(NotServedError, match=r"engine unavailable: .*tensorrt-llm") as caught:
        load_api(load)

    assert caught.value.reason is Reason.UNIMPLEMENTED
    assert str(error) in caught.value.message


def test_a_release_without_a_name_is_refused() -> None:
    with pytest.raises(NotServedError, match="engine unavailable"):
        load_api(lambda name: object())


def test_an_option_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(FixRequestError, match="the nearest is transceiver"):
        parse({"tranceiver": "UCX"})
