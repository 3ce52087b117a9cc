"""Log probabilities of numpy_llama: those of the model's own distribution, one per output token."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmesh.engines.engine import EngineRequest, Sampling, TokenLogprobs
from kvmesh.engines.numpy_llama import NumpyLlamaEngine
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions
from kvmesh.engines.numpy_llama_sampling import token_logprobs
from kvmesh.engines.numpy_llama_weights import LlamaWeights, load_weights
from kvmesh.testing.engine_contract import Answer, attempt, prompt_tokens, run_all, token_request
from kvmesh.testing.tiny_model import write_tiny_model

TOP = 5
HOT = Sampling(max_tokens=24, temperature=1.5, top_p=0.8, seed=3, ignore_eos=True, logprobs=TOP)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@cache
def weights_of(folder: Path) -> LlamaWeights:
    return load_weights(folder, dtype="float64")


def make(folder: Path, **changes: Any) -> NumpyLlamaEngine:
    options = NumpyLlamaOptions(**{"total_blocks": 128, "block_size": 16, "dtype": "float64", **changes})
    return NumpyLlamaEngine(weights_of(folder), options)


def make_request(
    engine: NumpyLlamaEngine, number: int, sampling: Sampling = HOT, *, after: tuple[int, ...] = ()
) -> EngineRequest:
    """Return request `number`, whose prompt goes on with `after`."""
    prompt = prompt_tokens(number, 40, vocab_size=engine.info.vocab_size)
    tokens = np.concatenate((prompt, np.array(after, dtype=np.uint32)))
    return token_request(engine.info, number, tokens, sampling=sampling)


def known_of(answer: Answer) -> list[TokenLogprobs]:
    return [known for output in answer.outputs for known in output.logprobs]


def answer_alone(engine: NumpyLlamaEngine, request: EngineRequest) -> Answer:
    engine.submit(request)
    return run_all(engine).answers[request.key]


def test_probabilities_are_those_of_the_logits_by_hand() -> None:
    logits = np.array([0.0, math.log(2), math.log(5), math.log(2)])

    known = token_logprobs(logits, 0, count=3)

    assert known.logprob == pytest.approx(math.log(0.1))
    assert known.top_token_ids == (2, 1, 3)
    assert known.top_logprobs == pytest.approx((math.log(0.5), math.log(0.2), math.log(0.2)))


def test_large_logits_do_not_overflow_and_none_may_be_asked_for() -> None:
    logits = np.array([1e4, 1e4, -1e4], dtype=np.float32)

    known = token_logprobs(logits, 1, count=0)

    assert known.logprob == pytest.approx(math.log(0.5))
    assert known.top_token_ids == known.top_logprobs == ()


def test_each_output_token_has_its_own_and_the_likeliest_of_its_place(tiny: Path) -> None:
    answer = answer_alone(make(tiny), make_request(make(tiny), 1))

    known = known_of(answer)
    assert len(known) == len(answer.token_ids) == HOT.max_tokens
    assert any(token != each.top_token_ids[0] for token, each in zip(answer.token_ids, known, strict=True))
    for token, each in zip(answer.token_ids, known, strict=True):
        assert len(each.top_token_ids) == len(each.top_logprobs) == TOP
        assert list(each.top_logprobs) == sorted(each.top_logprobs, reverse=True)
        assert each.logprob <= each.top_logprobs[0] < 0
        if token in each.top_token_ids:
            assert each.top_logprobs[each.top_token_ids.index(token)] == each.logprob


def test_they_are_what_the_model_says_of_the_text_so_far_however_the_token_was_drawn(tiny: Path) -> None:
    engine = make(tiny)
    answer = answer_alone(engine, make_request(engine, 1))
    whole = replace(HOT, max_tokens=1, temperature=0.0, logprobs=engine.info.vocab_size)

    for position in (0, 7, 20):
        request = make_request(make(tiny), 1, whole, after=tuple(answer.token_ids[:position]))
        (expected,) = known_of(answer_alone(make(tiny), request))
        known = known_of(answer)[position]
        by_token = dict(zip(expected.top_token_ids, expected.top_logprobs, strict=True))
        assert sum(map(math.exp, by_token.values())) == pytest.approx(1)
        assert known.top_token_ids == expected.top_token_ids[:TOP]
        assert known.logprob == pytest.approx(by_token[answer.token_ids[position]], rel=1e-9)


def test_they_are_the_same_among_others_and_after_a_preemption(tiny: Path) -> None:
    expected = known_of(answer_alone(make(tiny), make_request(make(tiny), 1)))
    crowded = make(tiny, total_blocks=9)
    silent = replace(HOT, logprobs=None)

    for number in (2, 1, 3):
        crowded.submit(make_request(crowded, number, HOT if number == 1 else silent))
    run = run_all(crowded)

    known = known_of(run.answers[attempt(1)])
    assert run.preempted > 0
    assert [each.top_token_ids for each in known] == [each.top_token_ids for each in expected]
    assert [each.logprob for each in known] == pytest.approx([each.logprob for each in expected], rel=1e-9)
    assert known_of(run.answers[attempt(2)]) == []
