"""OpenAI requests into the mesh's, and the refusals by field."""

import json
from typing import Any

import pytest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.gateway.openai_schema import MAX_CHOICES, ChatRequest, CompletionRequest, OpenAIRequest, parse_body
from kvmesh.v1 import frontend_pb2, generation_pb2

HELLO = [{"role": "user", "content": "hello"}]


def only_request(asked: OpenAIRequest, *, client_request_id: str = "") -> frontend_pb2.GenerateRequest:
    (request,) = asked.to_generate_requests(client_request_id=client_request_id)
    return request


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HELLO, **fields}


def test_a_chat_becomes_a_conversation_with_its_sampling() -> None:
    body = chat(temperature=0, top_p=0.5, max_tokens=7, seed=3, stop="END", stream=True)

    request = only_request(parse_body(body, ChatRequest), client_request_id="mine")

    assert request.model == "m"
    assert request.client_request_id == "mine"
    assert [(item.role, item.content) for item in request.prompt.messages.messages] == [("user", "hello")]
    assert request.sampling == generation_pb2.SamplingParams(
        max_tokens=7, temperature=0, top_p=0.5, seed=3, stop=["END"]
    )


def test_what_the_client_leaves_out_stays_unset_for_the_processor() -> None:
    request = only_request(parse_body(chat(), ChatRequest))

    assert request.sampling == generation_pb2.SamplingParams()
    assert not request.sampling.HasField("temperature")


def test_the_newer_name_of_the_token_limit_counts() -> None:
    asked = parse_body(chat(max_tokens=5, max_completion_tokens=9), ChatRequest)

    assert only_request(asked).sampling.max_tokens == 9


def test_a_negative_seed_is_a_seed() -> None:
    asked = parse_body(chat(seed=-1), ChatRequest)

    assert only_request(asked).sampling.seed == 2**64 - 1


def test_text_parts_are_joined_and_an_earlier_answer_may_be_passed_back() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
    ]

    request = only_request(parse_body(chat(messages=messages), ChatRequest))

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

    assert only_request(asked).prompt == expected


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
    request = only_request(parse_body(chat(**fields), ChatRequest))

    assert request.sampling == generation_pb2.SamplingParams()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"best_of": 1}, "best_of"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"schema": {}}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
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


@pytest.mark.parametrize("value", [0, True, {}])
def test_a_field_of_two_forms_is_told_by_both(value: object) -> None:
    for fields, told in (
        ({"stop": value}, "stop: must be text, or a list of up to 4 texts"),
        (
            {"messages": [*HELLO, {"role": "user", "content": value}]},
            'messages[1].content: must be text, or a list of parts of the form {"type": "text", "text": "..."}',
        ),
    ):
        with pytest.raises(FixRequestError) as refused:
            parse_body(chat(**fields), ChatRequest)
        assert refused.value.message == told


def test_a_field_called_as_a_type_is_named_too() -> None:
    with pytest.raises(FixRequestError) as refused:
        parse_body({"prompt": "a", "str": 1}, CompletionRequest)

    assert refused.value.message == "str: not supported: leave it out"


@pytest.mark.parametrize("prompt", [{"a": 1}, [1, -1], [1, "a"], ["a", 1], [[1], "a", None], None])
def test_a_completion_refuses_other_prompts(prompt: object) -> None:
    with pytest.raises(FixRequestError) as refused:
        parse_body({"model": "m", "prompt": prompt}, CompletionRequest)

    assert refused.value.field == "prompt"
    assert "token ids" in refused.value.message


def test_every_choice_is_a_request_with_a_seed_of_its_own() -> None:
    asked = parse_body({"model": "m", "prompt": ["a", "b"], "n": 2, "seed": 2**63 - 1}, CompletionRequest)

    requests = asked.to_generate_requests(client_request_id="mine")

    assert [request.prompt.text for request in requests] == ["a", "a", "b", "b"]
    assert [request.sampling.seed for request in requests] == [2**63 - 1, 2**63, 2**63 - 1, 2**63]
    assert {request.client_request_id for request in requests} == {"mine"}


def test_the_choices_of_all_prompts_together_are_bounded() -> None:
    asked = parse_body({"model": "m", "prompt": ["a"] * MAX_CHOICES, "n": 2}, CompletionRequest)

    with pytest.raises(FixRequestError) as refused:
        asked.to_generate_requests(client_request_id="")

    assert refused.value.field == "n"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_a_chat_asks_for_log_probabilities_by_two_fields(fields: dict[str, Any], expected: int | None) -> None:
    sampling = only_request(parse_body(chat(**fields), ChatRequest)).sampling

    assert (sampling.logprobs if sampling.HasField("logprobs") else None) == expected


@pytest.mark.parametrize(("value", "expected"), [(None, None), (False, None), (0, 0), (5, 5)])
def test_a_completion_asks_for_log_probabilities_by_their_number(value: object, expected: int | None) -> None:
    sampling = only_request(parse_body({"prompt": "a", "logprobs": value}, CompletionRequest)).sampling

    assert (sampling.logprobs if sampling.HasField("logprobs") else None) == expected


@pytest.mark.parametrize(
    ("kind", "fields", "field"),
    [
        (ChatRequest, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        (CompletionRequest, {"prompt": "a", "best_of": 2}, "best_of"),
        (CompletionRequest, {"prompt": "a", "best_of": 3, "n": 2}, "best_of"),
        (CompletionRequest, {"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        (CompletionRequest, {"prompt": [1, 2], "echo": True}, "echo"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(
    kind: type[OpenAIRequest], fields: dict[str, Any], field: str
) -> None:
    asked = parse_body(fields, kind)

    with pytest.raises(FixRequestError) as refused:
        asked.to_generate_requests(client_request_id="")

    assert (refused.value.reason, refused.value.field) == (Reason.INVALID_FIELD, field)


def test_a_response_format_is_passed_on_as_it_is() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}

    sampling = only_request(parse_body(chat(response_format=wanted), ChatRequest)).sampling

    assert json.loads(sampling.response_format) == wanted


def test_empty_prompts_say_so() -> None:
    no_messages = parse_body(chat(messages=[]), ChatRequest)
    no_text = parse_body({"model": "m", "prompt": ""}, CompletionRequest)

    for asked, field in ((no_messages, "messages"), (no_text, "prompt")):
        with pytest.raises(FixRequestError) as refused:
            only_request(asked)
        assert (refused.value.reason, refused.value.field) == (Reason.EMPTY_PROMPT, field)
