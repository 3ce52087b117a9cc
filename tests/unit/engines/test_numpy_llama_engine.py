"""The numpy_llama engine: one answer, whatever the batch, the chunks and the place where its KV was computed."""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmesh.core.errors import FixRequestError, Reason, TryElsewhereError
from kvmesh.engines.engine import EngineRequest, FinishReason, Sampling
from kvmesh.engines.numpy_llama import NumpyLlamaEngine
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions, parse
from kvmesh.engines.numpy_llama_sampling import pick_tokens, token_probabilities
from kvmesh.engines.numpy_llama_weights import LlamaWeights, load_weights
from kvmesh.testing.engine_contract import NOTHING_HELD, attempt, held, prompt_tokens, run_all, token_request
from kvmesh.testing.tiny_model import write_tiny_model

SIZE = 16
OUTPUT_TOKENS = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@cache
def weights_of(folder: Path, dtype: str) -> LlamaWeights:
    return load_weights(folder, dtype=dtype)


def make(folder: Path, **changes: Any) -> NumpyLlamaEngine:
    options = NumpyLlamaOptions(**{"total_blocks": 128, "block_size": SIZE, "dtype": "float64", **changes})
    return NumpyLlamaEngine(weights_of(folder, options.dtype), options)


def make_request(engine: NumpyLlamaEngine, number: int, *, prompt: int = 100, **changes: Any) -> EngineRequest:
    tokens = prompt_tokens(number, prompt, vocab_size=engine.info.vocab_size)
    return token_request(engine.info, number, tokens, **{"max_tokens": OUTPUT_TOKENS, **changes})


def answer_alone(engine: NumpyLlamaEngine, request: EngineRequest) -> list[int]:
    engine.submit(request)
    return run_all(engine).answers[request.key].token_ids


def greedy(*, max_tokens: int = OUTPUT_TOKENS, ignore_eos: bool = False) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[int]:
    """64 greedy tokens of request 1, computed alone, its prompt in one chunk."""
    engine = make(tiny)
    tokens = answer_alone(engine, make_request(engine, 1))
    assert len(tokens) == OUTPUT_TOKENS
    assert len(set(tokens)) > OUTPUT_TOKENS // 2, "a model that repeats itself shows nothing"
    return tokens


def test_answer_is_the_same_among_others_at_different_stages(tiny: Path, expected: list[int]) -> None:
    engine = make(tiny, total_blocks=512)
    for number in (2, 3, 4):
        engine.submit(make_request(engine, number, prompt=20 * number))
    for _ in range(10):
        engine.step()
    for number in (1, 5, 6):
        engine.submit(make_request(engine, number))

    assert run_all(engine).answers[attempt(1)].token_ids == expected


@pytest.mark.parametrize("max_batched_tokens", [1, 7, SIZE, 33])
def test_answer_is_the_same_however_the_prompt_is_cut(tiny: Path, expected: list[int], max_batched_tokens: int) -> None:
    engine = make(tiny, max_batched_tokens=max_batched_tokens)

    assert answer_alone(engine, make_request(engine, 1)) == expected


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_answer_is_the_same_in_blocks_of_any_size(tiny: Path, expected: list[int], block_size: int) -> None:
    engine = make(tiny, total_blocks=512, block_size=block_size)

    assert answer_alone(engine, make_request(engine, 1)) == expected


def test_answer_is_the_same_from_cached_blocks(tiny: Path, expected: list[int]) -> None:
    engine = make(tiny)
    engine.submit(make_request(engine, 1, prefill_only=True))
    pin = run_all(engine).answers[attempt(1)].outputs[-1].pin
    assert pin is not None

    engine.submit(make_request(engine, 1))
    answer = run_all(engine).answers[attempt(1)]

    assert answer.prompt_output.cached_tokens == 96
    assert answer.token_ids == expected


def test_answer_is_the_same_after_preemptions_and_evictions(tiny: Path, expected: list[int]) -> None:
    engine = make(tiny, total_blocks=24)
    for number in (2, 3, 1, 4):
        engine.submit(make_request(engine, number))
    run = run_all(engine)
    for number in range(5, 10):
        answer_alone(engine, make_request(engine, number, max_tokens=1))
    forgotten = engine.cached_blocks(make_request(engine, 1).block_hashes)
    again = answer_alone(engine, make_request(engine, 1))

    assert run.preempted > 0
    assert run.answers[attempt(1)].token_ids == expected
    assert forgotten == 0
    assert again == expected
    assert held(engine) == NOTHING_HELD
    engine.check_integrity()


def test_answer_is_the_same_from_kv_that_another_engine_computed(tiny: Path, expected: list[int]) -> None:
    source, target = make(tiny, max_batched_tokens=9), make(tiny)
    answer_alone(target, make_request(target, 2))  # so that the blocks have other ids there
    request = make_request(source, 1, prefill_only=True)
    source.submit(request)
    pin = run_all(source).answers[request.key].outputs[-1].pin
    assert pin is not None
    _import(source, pin.block_ids, target, request)

    target.submit(make_request(target, 1))
    answer = run_all(target).answers[attempt(1)]

    assert answer.prompt_output.cached_tokens == 96
    assert answer.token_ids == expected


@pytest.mark.parametrize("block", [0, 2, 5])
def test_zeroed_block_changes_the_answer(tiny: Path, expected: list[int], block: int) -> None:
    engine = make(tiny)
    request = make_request(engine, 1)
    answer_alone(engine, request)
    memory = engine.kv_memory()
    assert memory is not None
    memory[engine.pin_prefix(request.block_hashes).block_ids[block]] = 0

    assert answer_alone(engine, request) != expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_import_of_which_a_part_never_arrived_is_refused(tiny: Path, dtype: str) -> None:
    source, target = make(tiny, dtype=dtype), make(tiny, dtype=dtype)
    request = make_request(source, 1)
    answer_alone(source, request)
    origin, arrived = source.kv_memory(), target.kv_memory()
    assert origin is not None
    assert arrived is not None
    pin, opened = source.pin_prefix(request.block_hashes), target.begin_import(request.block_hashes, first_block=0)
    *whole, broken = zip(opened.block_ids, pin.block_ids, strict=True)
    for target_id, source_id in whole:
        arrived[target_id] = origin[source_id]
    arrived[broken[0], :-100] = origin[broken[1], :-100]

    with pytest.raises(TryElsewhereError) as caught:
        target.commit_import(opened.import_id, block_hashes=request.block_hashes, local_hashes=request.local_hashes)

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
    assert held(target) == NOTHING_HELD


def test_float32_and_float64_agree_on_the_tiny_model(tiny: Path, expected: list[int]) -> None:
    engine = make(tiny, dtype="float32")

    assert answer_alone(engine, make_request(engine, 1)) == expected


def test_end_of_sequence_ends_the_answer_unless_it_is_ignored(tiny: Path, expected: list[int]) -> None:
    end = expected[20]
    engine = make(tiny, eos_token_ids=(end, 511))
    runs = []
    for ignore_eos in (False, True):
        request = make_request(engine, 1, sampling=greedy(ignore_eos=ignore_eos))
        engine.submit(request)
        runs.append(run_all(engine).answers[request.key])

    ended, ignored = runs
    assert engine.info.eos_token_ids == (end, 511)
    assert ended.token_ids == expected[: expected.index(end) + 1]
    assert (ended.finish, ignored.finish) == (FinishReason.STOP, FinishReason.LENGTH)
    assert ignored.token_ids == expected


def test_end_of_sequence_at_the_limit_is_its_own_end(tiny: Path, expected: list[int]) -> None:
    engine = make(tiny, eos_token_ids=(expected[0],))
    engine.submit(make_request(engine, 1, sampling=greedy(max_tokens=1)))

    assert run_all(engine).answers[attempt(1)].finish is FinishReason.STOP


def test_context_is_that_of_model_options_and_pool_whichever_is_smallest(tiny: Path) -> None:
    contexts = [
        make(tiny, total_blocks=512).info.max_context_tokens,
        make(tiny, max_context_tokens=500).info.max_context_tokens,
        make(tiny, total_blocks=3).info.max_context_tokens,
    ]

    assert contexts == [4_096, 500, 48]


def test_layout_tells_dtype_axes_and_size(tiny: Path) -> None:
    layout = make(tiny).info.layout

    assert layout is not None
    assert (layout.dtype, layout.layers, layout.block_size, layout.kv_heads, layout.head_dim) == (
        "float64", 2, SIZE, 2, 16,
    )  # fmt: skip
    assert layout.order == "layer,kv,token,head,dim"
    assert layout.bytes_per_block == 2 * 2 * SIZE * 2 * 16 * 8
    assert layout.model_fingerprint == weights_of(tiny, "float32").fingerprint


def test_seed_fixes_a_sampled_answer_whatever_the_batch(tiny: Path) -> None:
    engine = make(tiny)
    sampling = Sampling(max_tokens=30, temperature=0.8, top_p=0.95, top_k=100, seed=3, ignore_eos=True)
    other_seed = Sampling(max_tokens=30, temperature=0.8, top_p=0.95, top_k=100, seed=4, ignore_eos=True)
    alone = answer_alone(engine, make_request(engine, 1, sampling=sampling))
    engine.submit(make_request(engine, 2))
    engine.step()
    engine.submit(make_request(engine, 1, sampling=sampling))
    together = run_all(engine).answers[attempt(1)].token_ids

    assert together == alone
    assert answer_alone(engine, make_request(engine, 1, sampling=other_seed)) != alone


def test_answers_without_a_seed_differ(tiny: Path) -> None:
    engine = make(tiny)
    sampling = Sampling(max_tokens=30, temperature=1.0, ignore_eos=True)

    answers = [answer_alone(engine, make_request(engine, 1, sampling=sampling)) for _ in range(2)]

    assert answers[0] != answers[1]


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3]))
    sampling = Sampling(max_tokens=1, temperature=1.0)

    drawn = Counter(
        pick_tokens(np.tile(logits, (4_000, 1)), [sampling] * 4_000, seeds=[9] * 4_000, positions=range(4_000))
    )

    assert drawn[0] / 4_000 == pytest.approx(0.1, abs=0.03)
    assert drawn[1] / 4_000 == pytest.approx(0.6, abs=0.03)
    assert drawn[2] / 4_000 == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {1: 0.5, 3: 0.25, 0: 0.15, 2: 0.1}),
        ({"top_k": 2}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_k": 9}, {1: 0.5, 3: 0.25, 0: 0.15, 2: 0.1}),
        ({"top_p": 0.7}, {1: 2 / 3, 3: 1 / 3}),  # the second one takes it past 0.7
        ({"top_p": 0.4}, {1: 1.0}),
        ({"top_p": 0.0}, {1: 1.0}),  # the likeliest is always kept
        ({"top_k": 3, "top_p": 0.8}, {1: 2 / 3, 3: 1 / 3}),  # of the three: 0.56, 0.28, 0.17
        ({"temperature": 0.5}, {1: 0.25 / 0.345, 3: 0.0625 / 0.345, 0: 0.0225 / 0.345, 2: 0.01 / 0.345}),
    ],
)
def test_kept_tokens_are_the_likeliest(changes: dict[str, Any], kept: dict[int, float]) -> None:
    logits = np.log(np.array([0.15, 0.5, 0.1, 0.25])) + 7.0
    sampling = Sampling(**{"max_tokens": 1, "temperature": 1.0, **changes})

    order, probabilities = token_probabilities(logits, sampling)

    assert order.tolist() == list(kept)
    np.testing.assert_allclose(probabilities, list(kept.values()), rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = np.array([3.0, 7.0, 6.99, -800.0])
    sampling = Sampling(max_tokens=1, temperature=temperature)

    tokens = pick_tokens(np.tile(logits, (50, 1)), [sampling] * 50, seeds=[1] * 50, positions=range(50))

    assert tokens == [1] * 50


def test_options_from_text_name_what_is_wrong() -> None:
    options = parse({"dtype": "float64", "total_blocks": "7", "eos_token_ids": "1,2"})
    with pytest.raises(FixRequestError, match="dtype is 'float16', not one of float32, float64"):
        parse({"dtype": "float16"})

    assert (options.dtype, options.total_blocks, options.eos_token_ids) == ("float64", 7, (1, 2))


def _import(
    source: NumpyLlamaEngine, blocks: tuple[int, ...], target: NumpyLlamaEngine, request: EngineRequest
) -> None:
    """Move blocks as a transport would."""
    count = len(blocks)
    hashes, local = request.block_hashes[:count], request.local_hashes[:count]
    opened = target.begin_import(hashes, first_block=0)
    origin, arrived = source.kv_memory(), target.kv_memory()
    assert origin is not None
    assert arrived is not None
    assert set(opened.block_ids).isdisjoint(blocks), "the same ids would show nothing"
    arrived[list(opened.block_ids)] = origin[list(blocks)]
    target.commit_import(opened.import_id, block_hashes=hashes, local_hashes=local)
