"""The echo engine's words; what it shares with every engine is in tests/contract."""

import pytest

from kvmesh.core.errors import BackOffError, FixRequestError, Reason
from kvmesh.core.ids import AttemptKey, RequestId, SequenceHash
from kvmesh.engines.echo import EchoEngine, EchoOptions
from kvmesh.engines.engine import EngineRequest, FinishReason, Output, PromptForm, Sampling

KEY = AttemptKey(RequestId("r"), 1)


def text_request(text: str, *, max_tokens: int = 128, prefill_only: bool = False) -> EngineRequest:
    return EngineRequest(KEY, Sampling(max_tokens), text=text, prefill_only=prefill_only)


def outputs_of(request: EngineRequest, engine: EchoEngine | None = None) -> list[Output]:
    engine = engine or EchoEngine(node_name="NODE1")
    engine.submit(request)
    outputs: list[Output] = []
    while engine.has_work():
        outputs += engine.step().outputs
    return outputs


def test_prompt_comes_back_with_the_name_of_the_node() -> None:
    outputs = outputs_of(text_request("Tell me a joke"))

    assert [output.words for output in outputs] == [("Tell ",), ("me ",), ("a ",), ("joke_GeneratedBy_NODE1",)]
    assert [output.finish for output in outputs] == [None, None, None, FinishReason.STOP]
    assert [output.prefill_done for output in outputs] == [True, False, False, False]


@pytest.mark.parametrize(
    "prompt",
    [
        "one",
        "  leading",
        "trailing  ",
        "tabs\tand\n\nlines\r\n",
        "   ",
        "naïve 日本語　全角 🎉",
        "\u00a0no-break\u00a0",
    ],
)
def test_words_joined_are_the_answer_whatever_the_white_space(prompt: str) -> None:
    words = [word for output in outputs_of(text_request(prompt)) for word in output.words]

    assert "".join(words) == f"{prompt}_GeneratedBy_NODE1"
    assert all(word.strip() for word in words)


def test_prompt_counts_its_utf8_bytes() -> None:
    first = outputs_of(text_request("naïve 🎉"))[0]

    assert (first.prompt_tokens, first.cached_tokens) == (11, 0)


@pytest.mark.parametrize(
    ("max_tokens", "words", "finish"),
    [
        pytest.param(2, ["Tell ", "me "], FinishReason.LENGTH, id="cut"),
        pytest.param(3, ["Tell ", "me ", "more_GeneratedBy_NODE1"], FinishReason.STOP, id="exactly enough"),
    ],
)
def test_max_tokens_counts_words(max_tokens: int, words: list[str], finish: FinishReason) -> None:
    outputs = outputs_of(text_request("Tell me more", max_tokens=max_tokens))

    assert [word for output in outputs for word in output.words] == words
    assert outputs[-1].finish is finish


def test_context_bounds_prompt_and_output_together() -> None:
    engine = EchoEngine(node_name="NODE1", options=EchoOptions(max_context_tokens=8))

    assert outputs_of(text_request("a b c d"), engine)[-1].finish is FinishReason.LENGTH
    with pytest.raises(FixRequestError) as caught:
        engine.submit(text_request("a b c de"))
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "text")
    assert not engine.has_work()


def test_prefill_only_ends_at_once_without_words_or_pin() -> None:
    (output,) = outputs_of(text_request("Tell me", prefill_only=True))

    assert (output.words, output.finish, output.pin) == ((), FinishReason.PREFILLED, None)
    assert output.prompt_tokens == 7


def test_it_reads_text_and_has_no_kv() -> None:
    info = EchoEngine(node_name="NODE1").info

    assert info.accepts == {PromptForm.TEXT}
    assert (info.total_blocks, info.vocab_size, info.layout) == (0, 0, None)
    assert info.block_size > 0


def test_no_block_can_be_imported() -> None:
    engine = EchoEngine(node_name="NODE1")

    with pytest.raises(BackOffError):
        engine.begin_import((SequenceHash(1),), first_block=0)

    assert engine.pool_stats().imports == 0


def test_every_step_takes_the_time_it_was_told_to_take() -> None:
    engine = EchoEngine(node_name="NODE1", options=EchoOptions(step_s=0.25))
    engine.submit(text_request("Tell me"))

    assert engine.step().duration_s == 0.25
