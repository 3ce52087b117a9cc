"""JSON into messages: what is refused, and where it says the fault is."""

import json
import time

import pytest
from google.protobuf import struct_pb2

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.gateway.json_messages import in_one_line, load_json, merge_json, to_dict, to_json
from kvmesh.v1 import frontend_pb2, generation_pb2


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b'{"promt": {}}', "promt"),
        (b'{"prompt": {"texx": 1}}', "prompt.texx"),
        (b'{"prompt": {"messages": {"messages": [{"role": "a"}, {"rol": 3}]}}}', "prompt.messages.messages[1].rol"),
        (b'{"prompt": {"token_ids": {"token_ids": [1, 2, "b", 4]}}}', "prompt.token_ids.token_ids[2]"),
        (b'{"prompt": {"tokenIds": {"tokenIds": [1, null]}}}', "prompt.tokenIds.tokenIds[1]"),
        (b'{"prompt": {"text": "a", "token_ids": {}}}', "prompt"),
        (b'{"sampling": {"max_tokens": -1}}', "sampling.max_tokens"),
        (b'{"sampling": 3}', "sampling"),
        (b'{"sampling": {"stop": "x"}}', "sampling.stop"),
        (b'{"sampling": {"stop": ["x", 3]}}', "sampling.stop[1]"),
        (b'{"routing": {"required_labels": {"zone": "a", "rack": 1}}}', "routing.required_labels[rack]"),
        (b'{"routing": {"required_labels": []}}', "routing.required_labels"),
        (b'{"explain": "yes"}', "explain"),
    ],
)
def test_a_field_that_does_not_parse_is_named_by_its_path(text: bytes, field: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        merge_json(load_json(text), frontend_pb2.GenerateRequest())

    assert refused.value.field == field


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"prompt": {"text": 1}}, "prompt.text: must be text"),
        ({"sampling": {"stop": [[]]}}, "sampling.stop[0]: must be text"),
        ({"sampling": {"max_tokens": "x"}}, "sampling.max_tokens: must be a whole number, 0 to 4294967295"),
        ({"sampling": {"max_tokens": -1}}, "sampling.max_tokens: must be a whole number, 0 to 4294967295"),
        ({"sampling": {"temperature": {}}}, "sampling.temperature: must be a number"),
        ({"sampling": {"ignore_eos": "yes"}}, "sampling.ignore_eos: must be true or false"),
        ({"routing": {"required_labels": {"a": 1}}}, "routing.required_labels[a]: must be text"),
        ({"routing": {"required_labels": [1]}}, "routing.required_labels: must be a JSON object"),
        ({"prompt": {"text": "a", "tokenIds": {}}}, "prompt: set only one of text, token_ids"),
        ({"prompt": []}, "prompt: must be a JSON object"),
        ({"sampling": []}, "sampling: must be a JSON object"),
        ({"sampling": ""}, "sampling: must be a JSON object"),
        ({"sampling": 0}, "sampling: must be a JSON object"),
        ({"sampling": False}, "sampling: must be a JSON object"),
        ({"routing": {"cost": []}}, "routing.cost: must be a JSON object"),
        ({"routing": {"cost": ""}}, "routing.cost: must be a JSON object"),
        ({"prompt": {"tokenIds": []}}, "prompt.tokenIds: must be a JSON object"),
        ({"prompt": {"messages": {"messages": [{}, ""]}}}, "prompt.messages.messages[1]: must be a JSON object"),
        ({"sampling": {"temperature": True}}, "sampling.temperature: must be a number"),
        ({"sampling": {"topP": False}}, "sampling.topP: must be a number"),
        ({"routing": {"cost": {"overlap_credit": True}}}, "routing.cost.overlap_credit: must be a number"),
    ],
)
def test_what_a_field_takes_is_told_in_the_words_of_json(value: object, told: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        merge_json(value, frontend_pb2.GenerateRequest())

    assert refused.value.message == told


@pytest.mark.parametrize("interval", [5, {}, "5", "1e9s"])
def test_a_duration_is_told_by_an_example(interval: object) -> None:
    with pytest.raises(FixRequestError) as refused:
        merge_json({"interval": interval}, frontend_pb2.WatchTopologyRequest())

    assert refused.value.message == 'interval: must be seconds as text, e.g. "1.5s"'


@pytest.mark.parametrize(
    ("text", "position"),
    [(b'{"prompt":', "line 1 column 11"), (b'{\n  "a": nope}', "line 2 column 8"), (b"", "line 1 column 1")],
)
def test_malformed_json_is_refused_with_its_position(text: bytes, position: str) -> None:
    with pytest.raises(FixRequestError, match=position):
        load_json(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"a": %s}', "a: the number is out of range at line 1 column 7"),
        (b'{"a": 1e999}', "a: the number is out of range at line 1 column 7"),
        ('{"é": 1,\n "b": [0, {"c": -%s}]}'.encode(), "b[1].c: the number is out of range at line 2 column 17"),
        (b"%s", "body: the number is out of range at line 1 column 1"),
        (b"[1, %s]", "[1]: the number is out of range at line 1 column 5"),
        (b'{"a": %s', "body: the number is out of range at line 1 column 7"),
        (b'{"a": %s, "a": 1}', "body: the number is out of range at line 1 column 7"),
    ],
)
def test_a_number_beyond_what_is_read_is_told_as_that(text: bytes, told: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        load_json(text.replace(b"%s", b"9" * 400))

    assert (refused.value.reason, refused.value.message) == (Reason.INVALID_FIELD, told)


def test_a_number_out_of_range_deep_down_is_refused_without_its_path() -> None:
    with pytest.raises(FixRequestError, match="body: the number is out of range"):
        load_json(b"[" * 1000 + b"1e999" + b"]" * 1000)


@pytest.mark.parametrize("value", [[], "text", 3, None])
def test_a_body_that_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(FixRequestError, match="JSON object"):
        merge_json(value, frontend_pb2.GenerateRequest())


def test_the_bad_item_of_a_long_list_is_found_without_parsing_each() -> None:
    tokens: list[object] = list(range(200_000))
    tokens[123_456] = "x"
    began = time.perf_counter()

    with pytest.raises(FixRequestError) as refused:
        merge_json({"prompt": {"token_ids": {"token_ids": tokens}}}, frontend_pb2.GenerateRequest())

    assert refused.value.field == "prompt.token_ids.token_ids[123456]"
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("reason", [True, 1.5])
def test_a_value_of_an_enum_is_told_by_its_names(reason: object) -> None:
    with pytest.raises(FixRequestError, match="reason: must be one of FINISH_REASON_UNSPECIFIED, "):
        merge_json({"reason": reason}, generation_pb2.Finished())


def test_null_is_a_field_that_is_not_set() -> None:
    request = frontend_pb2.GenerateRequest()

    merge_json({"prompt": None, "sampling": {"temperature": None}, "routing": None}, request)

    assert request == frontend_pb2.GenerateRequest(sampling=generation_pb2.SamplingParams())


def test_messages_are_told_with_proto_names_and_defaults() -> None:
    finished = generation_pb2.Finished(
        reason=generation_pb2.FINISH_REASON_STOP, usage=generation_pb2.Usage(prompt_tokens=3, kv_bytes_moved=2**40)
    )

    assert to_dict(frontend_pb2.GenerateResponse(finished=finished)) == {
        "finished": {
            "reason": "FINISH_REASON_STOP",
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 0,
                "cached_tokens": 0,
                "remote_prefill_tokens": 0,
                "kv_bytes_moved": str(2**40),
            },
        }
    }


@pytest.mark.parametrize("text", ["", "AP8=", "AP8", "-_8=", "+/8="])
def test_bytes_are_base64_of_either_alphabet_padded_or_not(text: str) -> None:
    message = generation_pb2.TokenLogprobs()

    merge_json({"top": [{"output_bytes": text}]}, message)

    assert len(message.top[0].output_bytes) == (2 if text else 0)


@pytest.mark.parametrize("text", ["%", "A", "AP8=A", "A P8", "AP8===", "é"])
def test_text_that_is_no_base64_is_refused_and_not_read_in_part(text: str) -> None:
    with pytest.raises(FixRequestError, match="must be base64 text") as refused:
        merge_json({"top": [{}, {"outputBytes": text}]}, generation_pb2.TokenLogprobs())

    assert refused.value.field == "top[1].outputBytes"


def test_a_message_is_one_line_to_readers_that_know_other_line_ends() -> None:
    text = "a\u2028b\u2029c\x85d\né"

    line = in_one_line(to_json(generation_pb2.Chunk(text=text)))

    assert len(line.decode().splitlines()) == 1
    assert json.loads(line)["text"] == text


@pytest.mark.parametrize("value", [None, 3.0, "a", [1.0, {"b": []}], {"number_value": 1.0, "string_value": "x"}])
def test_a_body_of_any_json_is_taken_where_the_message_is_any_json(value: object) -> None:
    message = struct_pb2.Value()

    merge_json(value, message)

    assert json.loads(to_json(message)) == value


def test_a_body_of_the_wrong_json_is_refused_where_the_message_is_a_list() -> None:
    with pytest.raises(FixRequestError) as refused:
        merge_json("text", struct_pb2.ListValue())

    assert refused.value.field == "body"
