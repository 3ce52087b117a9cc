"""OpenAI requests into the mesh's, and the refusals by field."""

from typing import Any

import pytest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.gateway.openai_schema import ChatRequest, CompletionRequest, parse_body
from kvmesh.v1 import generation_pb2

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HELLO, **fields}


def test_a_chat_becomes_a_conversation_with_its_sampling() -> None:
    body = chat(temperature=0, top_p=0.5, max_tokens=7, seed=3, stop="END", stream=True)

    request = parse_body(body, ChatRequest).to_generate_request(client_request_id="mine")

    assert request.model == "m"
    assert request.client_request_id == "mine"
    assert [(item.role, item.content) for item in request.prompt.messages.messages] == [("user", "hello")]
    assert request.sampling == generation_pb2.SamplingParams(
        max_tokens=7, temperature=0, top_p=0.5, seed=3, stop=["END"]
    )


def test_what_the_client_leaves_out_stays_unset_for_the_processor() -> None:
    request = parse_body(chat(), ChatRequest).to_generate_request(client_request_id="")

    assert request.sampling == generation_pb2.SamplingParams()
    assert not request.sampling.HasField("temperature")


def test_the_newer_name_of_the_token_limit_counts() -> None:
    asked = parse_body(chat(max_tokens=5, max_completion_tokens=9), ChatRequest)

    assert asked.to_generate_request(client_request_id="").sampling.max_tokens == 9


def test_a_negative_seed_is_a_seed() -> None:
    asked = parse_body(chat(seed=-1), ChatRequest)

    assert asked.to_generate_request(client_request_id="").sampling.seed == 2**64 - 1


def test_text_parts_are_joined_and_an_earlier_answer_may_be_passed_back() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
    ]

    request = parse_body(chat(messages=messages), ChatRequest).to_generate_request(client_request_id="")

    assert [item.content for item in request.prompt.messages.messages] == ["ab", ""]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("once", generation_pb2.Prompt(text="once")),
        (["once"], generation_pb2.Prompt(text="once")),
        ([1, 2], generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=[1, 2]))),
        ([[1, 2]], generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=[1, 2]))),
    ],
)
def test_a_completion_takes_text_or_tokens(prompt: object, expected: generation_pb2.Prompt) -> None:
    asked = parse_body({"model": "m", "prompt": prompt}, CompletionRequest)

    assert asked.to_generate_request(client_request_id="").prompt == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"n": None},
        {"logprobs": False},
        {"frequency_penalty": 0.0},
        {"response_format": {"type": "text"}},
        {"tools": []},
        {"user": "u", "metadata": {"k": "v"}},
        {"stop": None},
        {"stream_options": None},
    ],
)
def test_fields_that_ask_for_nothing_are_let_through(fields: dict[str, Any]) -> None:
    request = parse_body(chat(**fields), ChatRequest).to_generate_request(client_request_id="")

    assert request.sampling == generation_pb2.SamplingParams()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a", "é" * 513]}, "stop[1]"),
        ({"stop": "é" * 513}, "stop[0]"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream_options": {"no_such_field": 1}}, "stream_options.no_such_field"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [*HELLO, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        parse_body(chat(**fields), ChatRequest)

    assert refused.value.reason is Reason.INVALID_FIELD
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")


def test_a_field_called_as_a_type_is_named_too() -> None:
    with pytest.raises(FixRequestError) as refused:
        parse_body({"prompt": "a", "str": 1}, CompletionRequest)

    assert refused.value.message == "str: not supported: leave it out"


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], {"a": 1}, [1, -1], [1, "a"]])
def test_a_completion_refuses_other_prompts(prompt: object) -> None:
    with pytest.raises(FixRequestError) as refused:
        parse_body({"model": "m", "prompt": prompt}, CompletionRequest)

    assert refused.value.field is not None
    assert refused.value.field.startswith("prompt")


def test_empty_prompts_say_so() -> None:
    no_messages = parse_body(chat(messages=[]), ChatRequest)
    no_text = parse_body({"model": "m", "prompt": ""}, CompletionRequest)

    for asked, field in ((no_messages, "messages"), (no_text, "prompt")):
        with pytest.raises(FixRequestError) as refused:
            asked.to_generate_request(client_request_id="")
        assert (refused.value.reason, refused.value.field) == (Reason.EMPTY_PROMPT, field)
