"""Random batches of the numpy_llama engine: each request gets the tokens it gets alone, whoever comes and goes."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvmesh.engines.engine import EngineRequest, Sampling
from kvmesh.engines.numpy_llama import NumpyLlamaEngine
from kvmesh.engines.numpy_llama_attention import Scratch, plan_attention
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions
from kvmesh.engines.numpy_llama_sampling import pick_tokens
from kvmesh.engines.numpy_llama_weights import Floats, LlamaWeights, load_weights
from kvmesh.testing.engine_contract import NOTHING_HELD, Answer, held, prompt_tokens, run_all, token_request
from kvmesh.testing.tiny_model import write_tiny_model

SHARED = prompt_tokens(0, 24, vocab_size=512)
"""What some prompts begin with."""
PHASES = (Phase.explicit, Phase.generate)
"""No shrinking: it would run a failing batch for minutes to find a smaller one."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> LlamaWeights:
    return tiny_weights(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@cache
def tiny_weights(folder: Path) -> LlamaWeights:
    return load_weights(folder, dtype="float64")


def unreadable_memory(blocks: int, block_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory in which every float is a NaN: one that is read before it was written spoils an answer."""
    return np.full((blocks, block_bytes), 0xFF, dtype=np.uint8)


def make(weights: LlamaWeights, **options: Any) -> NumpyLlamaEngine:
    return NumpyLlamaEngine(
        weights, NumpyLlamaOptions(**{"dtype": "float64", "total_blocks": 256, **options}), allocate=unreadable_memory
    )


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 5, 600]),
    seed=st.integers(0, 2**63),
    ignore_eos=st.booleans(),
)
ARRIVALS = st.tuples(
    st.integers(0, 6),  # steps since the one before
    st.integers(1, 90),  # prompt tokens
    st.booleans(),  # begins with SHARED
    SAMPLINGS,
)


def prompt_of(number: int, count: int, *, is_shared: bool) -> npt.NDArray[np.uint32]:
    tokens = prompt_tokens(number, count, vocab_size=512)
    return np.concatenate((SHARED, tokens)) if is_shared else tokens


@settings(max_examples=25, deadline=None, derandomize=True, phases=PHASES)
@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=7),
    block_size=st.sampled_from([1, 4, 16]),
    max_batched_tokens=st.sampled_from([5, 32, 512]),
    spare_blocks=st.integers(0, 40),
)
def test_answers_are_those_of_each_request_alone(
    weights: LlamaWeights, arrivals: list[Any], block_size: int, max_batched_tokens: int, spare_blocks: int
) -> None:
    largest = -(-(24 + 90 + 12) // block_size)
    together = make(
        weights, block_size=block_size, max_batched_tokens=max_batched_tokens, total_blocks=largest + spare_blocks,
        eos_token_ids=tuple(range(0, 512, 16)),
    )  # fmt: skip
    alone = make(weights, block_size=16, eos_token_ids=tuple(range(0, 512, 16)))
    requests, found = [], dict[Any, list[int]]()
    for number, (wait, count, is_shared, sampling) in enumerate(arrivals, 1):
        for _ in range(wait):
            note(together, found)
        tokens = prompt_of(number, count, is_shared=is_shared)
        requests.append((number, tokens, sampling))
        together.submit(token_request(together.info, number, tokens, sampling=sampling))
    while together.has_work():
        note(together, found)

    for number, tokens, sampling in requests:
        request = token_request(alone.info, number, tokens, sampling=sampling)
        alone.clear_cache()
        assert found[request.key] == answer(alone, request).token_ids, f"request {number}"
    assert held(together) == NOTHING_HELD
    together.check_integrity()


def note(engine: NumpyLlamaEngine, found: dict[Any, list[int]]) -> None:
    for output in engine.step().outputs:
        found.setdefault(output.key, []).extend(output.token_ids)


def answer(engine: NumpyLlamaEngine, request: EngineRequest) -> Answer:
    engine.submit(request)
    return run_all(engine).answers[request.key]


def test_many_sequences_of_all_lengths_decode_as_each_does_alone(weights: LlamaWeights) -> None:
    together, alone = make(weights, total_blocks=400), make(weights, total_blocks=400)
    counts = [1, 2, 15, 16, 17, 31, 64, 65, 130, 300, 301, 700, 1_000]
    requests = [
        token_request(together.info, number, prompt_of(number, count, is_shared=False), max_tokens=20)
        for number, count in enumerate(counts, 1)
    ]
    for request in requests:
        together.submit(request)
    answers = run_all(together).answers

    assert {request.key: answers[request.key].token_ids for request in requests} == {
        request.key: answer(alone, request).token_ids for request in requests
    }


@pytest.mark.parametrize("most", [2**24, 24 * 40, 1])
def test_attention_of_a_step_is_that_of_each_row_over_its_own_keys(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("_MAX_SCORES", "_MAX_GATHERED"):
        monkeypatch.setattr(f"kvmesh.engines.numpy_llama_attention.{bound}", most)
    rng = np.random.default_rng(3)
    kv: Floats = np.full((40, 2, 2, 4, 2, 6), np.nan)  # (blocks, layers, keys and values, tokens, kv_heads, dim)
    counts, starts = [1, 3, 1, 1, 1], [0, 5, 9, 70, 11]
    free = iter(rng.permutation(40).tolist())
    blocks = [
        [next(free) for _ in range((start + count + 3) // 4)] for start, count in zip(starts, counts, strict=True)
    ]
    for held_blocks, start, count in zip(blocks, starts, counts, strict=True):
        for position in range(start + count):
            kv[held_blocks[position // 4], :, :, position % 4] = rng.normal(size=(2, 2, 2, 6))
    positions = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    owners = np.repeat(np.arange(5), counts)
    queries = rng.normal(size=(7, 4, 6))

    found = np.full((7, 4 * 6), np.nan)
    taken: list[int] = []
    for attention in plan_attention(blocks, positions, counts, kv, heads=4, scratch=Scratch()):
        found[attention.rows] = attention.attend(queries[attention.rows], 1)
        taken += np.arange(7)[attention.rows].tolist()

    assert sorted(taken) == list(range(7))
    for row, (owner, position) in enumerate(zip(owners, positions, strict=True)):
        for head in range(4):
            seen = [kv[blocks[owner][at // 4], 1, :, at % 4, head // 2] for at in range(position + 1)]
            weights = np.exp([queries[row, head].dot(key) / 6**0.5 for key, _ in seen])
            expected = sum(weight * value for weight, (_, value) in zip(weights, seen, strict=True)) / weights.sum()
            np.testing.assert_allclose(found[row, head * 6 : head * 6 + 6], expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True, phases=PHASES)
@given(rows=st.lists(st.tuples(SAMPLINGS, st.integers(0, 99)), min_size=1, max_size=5), levels=st.integers(2, 400))
def test_token_of_a_row_is_one_of_its_likeliest_and_the_same_alone(rows: list[Any], levels: int) -> None:
    samplings, positions = [sampling for sampling, _ in rows], [position for _, position in rows]
    logits = np.random.default_rng(levels).integers(0, levels, (len(rows), 300)) / 7.0  # with many equal ones

    found = pick_tokens(logits, samplings, seeds=[sampling.seed or 0 for sampling in samplings], positions=positions)

    for token, row, sampling, position in zip(found, logits, samplings, positions, strict=True):
        order = sorted(range(300), key=lambda index: (-row[index], index))
        if sampling.temperature == 0 or sampling.top_k == 1:
            assert token == order[0]
            continue
        kept = order[: sampling.top_k] if sampling.top_k else order
        shares = np.exp((row[kept] - row[kept[0]]) / sampling.temperature)
        nucleus = int(np.searchsorted(np.cumsum(shares / shares.sum()), sampling.top_p - 1e-9)) + 1
        assert token in kept[: nucleus + 1]
        assert [token] == pick_tokens(row[np.newaxis], [sampling], seeds=[sampling.seed or 0], positions=[position])
