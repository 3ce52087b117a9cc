"""Log probabilities beside an output: they come with the text of their tokens."""

from kvmesh.engines.engine import TokenLogprobs
from kvmesh.services.logprobs import OutputLogprobs, logprobs_to_proto
from kvmesh.tokenizing.byte_tokenizer import ByteTokenizer
from kvmesh.v1 import generation_pb2


def entries_of(text: str) -> list[generation_pb2.TokenLogprobs]:
    tokens = text.encode()
    return logprobs_to_proto(tokens, [TokenLogprobs(-1.0)] * len(tokens))


def test_ids_and_numbers_are_what_a_worker_sends() -> None:
    (entry,) = logprobs_to_proto((65,), [TokenLogprobs(-0.5, (66, 65), (-0.25, -0.5))])

    assert (entry.token.token_id, entry.token.logprob) == (65, -0.5)
    assert [(likely.token_id, likely.logprob) for likely in entry.top] == [(66, -0.25), (65, -0.5)]
    assert not entry.token.HasField("output_bytes")


def test_each_is_given_its_texts() -> None:
    output = OutputLogprobs(ByteTokenizer())
    output.push(logprobs_to_proto((65,), [TokenLogprobs(-0.5, (0xC3,), (-0.25,))]))

    (entry,) = output.take(1)

    assert (entry.token.text, entry.token.output_bytes) == ("A", b"A")
    assert (entry.top[0].text, entry.top[0].output_bytes) == ("\ufffd", b"\xc3")


def test_what_belongs_to_text_that_is_held_back_is_held_back_with_it() -> None:
    output = OutputLogprobs(ByteTokenizer())

    output.push(entries_of("abc"))
    first = output.take(1)
    output.push(entries_of("d"))
    rest = output.take(3)

    assert [entry.token.text for entry in first] == ["a"]
    assert [entry.token.text for entry in rest] == ["b", "c", "d"]


def test_text_left_over_at_the_end_belongs_to_no_token() -> None:
    output = OutputLogprobs(None)
    output.push(entries_of("a"))

    assert len(output.take(2)) == 1
    assert output.take(1) == []
