"""Every refusal names the field by its path; every default is resolved once."""

import math

import pytest
from google.protobuf import duration_pb2

from kvmesh.core.candidates import CostOverrides
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.v1 import frontend_pb2, generation_pb2
from kvmesh.wire import validation
from kvmesh.wire.routing import hints_from_proto

Message = generation_pb2.ChatMessage
Prompt = generation_pb2.Prompt
Sampling = generation_pb2.SamplingParams


def chat(*messages: generation_pb2.ChatMessage) -> generation_pb2.Prompt:
    return Prompt(messages=generation_pb2.ChatMessages(messages=messages))


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (Prompt(), "prompt"),
        (Prompt(text=""), "prompt.text"),
        (Prompt(token_ids=generation_pb2.TokenIds()), "prompt.token_ids"),
        (chat(), "prompt.messages"),
    ],
    ids=["none of the forms", "no text", "no tokens", "no messages"],
)
def test_empty_prompt_is_refused_by_its_form(prompt: generation_pb2.Prompt, field: str) -> None:
    with pytest.raises(FixRequestError) as caught:
        validation.check_prompt(prompt)

    assert (caught.value.reason, caught.value.field) == (Reason.EMPTY_PROMPT, field)


def test_message_without_a_role_is_refused_by_its_index() -> None:
    prompt = chat(Message(role="user", content="hi"), Message(content="who am I"))

    with pytest.raises(FixRequestError) as caught:
        validation.check_prompt(prompt)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "prompt.messages.messages[1].role")


@pytest.mark.parametrize(
    "prompt",
    [Prompt(text="a"), Prompt(token_ids=generation_pb2.TokenIds(token_ids=[0])), chat(Message(role="user"))],
    ids=["text", "token 0", "a message without content"],
)
def test_prompt_with_something_in_it_passes(prompt: generation_pb2.Prompt) -> None:
    validation.check_generate_request(frontend_pb2.GenerateRequest(prompt=prompt))


@pytest.mark.parametrize(
    ("sampling", "field", "text"),
    [
        (Sampling(max_tokens=0), "sampling.max_tokens", "0 is out of range: 1 or more"),
        (Sampling(temperature=-0.5), "sampling.temperature", "-0.5 is out of range: 0 to 2"),
        (Sampling(temperature=2.5), "sampling.temperature", "2.5 is out of range: 0 to 2"),
        (Sampling(temperature=math.nan), "sampling.temperature", "nan is out of range: 0 to 2"),
        (Sampling(top_p=0), "sampling.top_p", "0 is out of range: above 0 and up to 1"),
        (Sampling(top_p=1.5), "sampling.top_p", "1.5 is out of range: above 0 and up to 1"),
        (Sampling(top_p=math.nan), "sampling.top_p", "nan is out of range: above 0 and up to 1"),
        (Sampling(stop=["a", "b", "c", "d", "e"]), "sampling.stop", "5 entries are too many: up to 4"),
        (Sampling(stop=["a", ""]), "sampling.stop[1]", "must not be empty"),
        (Sampling(stop=["a", "é" * 513]), "sampling.stop[1]", "1026 bytes are too many: up to 1024"),
        (Sampling(logprobs=21), "sampling.logprobs", "21 is out of range: 0 to 20"),
        (
            Sampling(response_format="[]"),
            "sampling.response_format",
            'must be an object with a type, as in {"type": "json_object"}',
        ),
        (Sampling(response_format="é" * 32769), "sampling.response_format", "65538 bytes are too many: up to 65536"),
    ],
)
def test_sampling_out_of_range_is_refused_with_the_range(
    sampling: generation_pb2.SamplingParams, field: str, text: str
) -> None:
    with pytest.raises(FixRequestError) as caught:
        validation.check_sampling(sampling)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field)
    assert caught.value.message == f"{field}: {text}"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(max_tokens=1, temperature=0, top_p=1, top_k=0, seed=0),
        Sampling(temperature=2, stop=["a", "b", "c", "é" * 512], logprobs=20, response_format='{"type": "text"}'),
    ],
    ids=["unset", "lowest", "highest"],
)
def test_sampling_at_its_bounds_passes(sampling: generation_pb2.SamplingParams) -> None:
    validation.check_sampling(sampling)


@pytest.mark.parametrize("name", ["overlap_credit", "prefill_scale", "request_weight", "temperature"])
@pytest.mark.parametrize("value", [-1.0, 1_000_001.0, 1e308, math.inf, math.nan])
def test_weight_of_the_cost_that_is_no_weight_is_refused(name: str, value: float) -> None:
    hints = generation_pb2.RoutingHints()
    setattr(hints.cost, name, value)

    with pytest.raises(FixRequestError) as caught:
        validation.check_hints(hints)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, f"routing.cost.{name}")


def test_weights_of_the_cost_at_their_bounds_pass_and_the_core_takes_them() -> None:
    for value in (0.0, 1_000_000.0):
        hints = generation_pb2.RoutingHints()
        hints.cost.overlap_credit = hints.cost.temperature = value

        validation.check_hints(hints)

        assert hints_from_proto(hints).overrides == CostOverrides(overlap_credit=value, temperature=value)


def test_client_id_is_bounded_in_bytes() -> None:
    fits = frontend_pb2.GenerateRequest(prompt=Prompt(text="a"), client_request_id="\N{LLAMA}" * 64)
    validation.check_generate_request(fits)
    too_long = frontend_pb2.GenerateRequest(prompt=Prompt(text="a"), client_request_id="\N{LLAMA}" * 64 + "x")

    with pytest.raises(FixRequestError) as caught:
        validation.check_generate_request(too_long)

    assert caught.value.field == "client_request_id"


def test_unset_sampling_is_resolved_to_its_defaults() -> None:
    resolved = validation.resolve_sampling(Sampling(), prompt_tokens=10, max_context_tokens=0)

    assert resolved == Sampling(max_tokens=128, temperature=1, top_p=1, top_k=0)
    assert not resolved.HasField("seed")


def test_zeroes_that_were_set_are_no_defaults() -> None:
    resolved = validation.resolve_sampling(Sampling(temperature=0, seed=0), prompt_tokens=1, max_context_tokens=0)

    assert resolved.temperature == 0
    assert resolved.HasField("seed")


@pytest.mark.parametrize(
    ("wanted", "resolved"), [(5, 5), (24, 24), (25, 24), (None, 24)], ids=["less", "all", "too many", "default"]
)
def test_max_tokens_is_cut_to_what_the_context_leaves(wanted: int | None, resolved: int) -> None:
    sampling = Sampling(max_tokens=wanted, stop=["."], ignore_eos=True)

    result = validation.resolve_sampling(sampling, prompt_tokens=1000, max_context_tokens=1024)

    assert (result.max_tokens, list(result.stop), result.ignore_eos) == (resolved, ["."], True)


def test_resolving_leaves_the_clients_message_alone() -> None:
    sampling = Sampling(stop=["."])

    validation.resolve_sampling(sampling, prompt_tokens=1, max_context_tokens=0)

    assert sampling == Sampling(stop=["."])


def test_prompt_that_fills_the_context_is_refused_with_both_sizes() -> None:
    with pytest.raises(FixRequestError, match="1024 tokens leave no room in a context of 1024") as caught:
        validation.resolve_sampling(Sampling(), prompt_tokens=1024, max_context_tokens=1024)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "prompt")


@pytest.mark.parametrize("value_s", [-0.1, 60.1])
def test_span_out_of_range_is_refused_by_its_path(value_s: float) -> None:
    with pytest.raises(FixRequestError, match="out of range: 0 to 60 s") as caught:
        validation.seconds(validation.duration(value_s), path="wait", high=60)

    assert caught.value.field == "wait"


@pytest.mark.parametrize(
    ("value_s", "message"),
    [
        (0, duration_pb2.Duration()),
        (1.5, duration_pb2.Duration(seconds=1, nanos=500_000_000)),
        (60, duration_pb2.Duration(seconds=60)),
    ],
)
def test_span_goes_to_the_wire_and_back(value_s: float, message: duration_pb2.Duration) -> None:
    assert validation.duration(value_s) == message
    assert validation.seconds(message, path="wait", high=60) == value_s


def test_what_else_an_answer_should_have_is_kept_where_it_is_set() -> None:
    asked = Sampling(logprobs=0, response_format='{"type": "json_object"}')

    resolved = validation.resolve_sampling(asked, prompt_tokens=1, max_context_tokens=0)
    unset = validation.resolve_sampling(Sampling(), prompt_tokens=1, max_context_tokens=0)

    assert resolved.HasField("logprobs")
    assert resolved.response_format == asked.response_format
    assert not unset.HasField("logprobs")
