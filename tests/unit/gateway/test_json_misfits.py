"""JSON into messages of every kind of field that a component's contract may have: what is taken, what is refused."""

import pytest
from google.protobuf import (
    any_pb2,
    descriptor_pb2,
    descriptor_pool,
    empty_pb2,
    field_mask_pb2,
    json_format,
    message_factory,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from google.protobuf.message import Message

from kvmesh.core.errors import FixRequestError
from kvmesh.gateway.json_messages import load_json, merge_json

FIELD = descriptor_pb2.FieldDescriptorProto


@pytest.fixture(scope="module")
def odd() -> type[Message]:
    """Return a message with the kinds of fields that the mesh's own contract does not have, as a component's may."""
    kinds = {
        "value": ".google.protobuf.Value",
        "struct": ".google.protobuf.Struct",
        "list": ".google.protobuf.ListValue",
        "any": ".google.protobuf.Any",
        "mask": ".google.protobuf.FieldMask",
        "at": ".google.protobuf.Timestamp",
        "double": ".google.protobuf.DoubleValue",
        "flag": ".google.protobuf.BoolValue",
        "data": ".google.protobuf.BytesValue",
        "empty": ".google.protobuf.Empty",
        "odd": ".odd.Odd",
        "by_name": ".odd.Odd.ByNameEntry",
        "weights": ".odd.Odd.WeightsEntry",
    }
    kind = descriptor_pb2.DescriptorProto(name="Odd")
    for number, (name, type_name) in enumerate(kinds.items(), start=1):
        label = FIELD.LABEL_REPEATED if name in {"by_name", "weights"} else FIELD.LABEL_OPTIONAL
        kind.field.add(name=name, number=number, label=label, type=FIELD.TYPE_MESSAGE, type_name=type_name)
    kind.field.add(name="numbers", number=len(kinds) + 1, label=FIELD.LABEL_REPEATED, type=FIELD.TYPE_FLOAT)
    for entry_name in ("ByNameEntry", "WeightsEntry"):
        entry = kind.nested_type.add(name=entry_name, options={"map_entry": True})
        entry.field.add(name="key", number=1, label=FIELD.LABEL_OPTIONAL, type=FIELD.TYPE_STRING)
    kind.nested_type[0].field.add(
        name="value", number=2, label=FIELD.LABEL_OPTIONAL, type=FIELD.TYPE_MESSAGE, type_name=".odd.Odd"
    )
    kind.nested_type[1].field.add(name="value", number=2, label=FIELD.LABEL_OPTIONAL, type=FIELD.TYPE_DOUBLE)
    modules = (any_pb2, empty_pb2, field_mask_pb2, struct_pb2, timestamp_pb2, wrappers_pb2)
    pool = descriptor_pool.Default()
    file = descriptor_pb2.FileDescriptorProto(
        name="odd.proto",
        package="odd",
        syntax="proto3",
        dependency=[module.DESCRIPTOR.name for module in modules],
        message_type=[kind],
    )
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("odd.Odd"))


@pytest.mark.parametrize(
    "value",
    [
        {"value": []},
        {"value": ""},
        {"value": True},
        {"value": {"fields": [], "data": "%"}},
        {"struct": {"odd": [], "double": True, "fields": ""}},
        {"list": [[], "", True]},
        {"any": {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": "no base64!"}},
        {"mask": "a,b"},
        {"at": "2030-01-31T12:00:00Z"},
        {"double": 0.0, "flag": False, "data": ""},
        {"empty": {}, "odd": {}},
        {"by_name": {"a": {}, "b": {"odd": {"flag": True}}}, "weights": {"a": 0.0}, "numbers": [0.0, 1.0]},
    ],
)
def test_every_form_that_json_has_for_a_message_is_taken(odd: type[Message], value: dict[str, object]) -> None:
    message = odd()

    merge_json(value, message)

    assert json_format.MessageToDict(message, preserving_proto_field_name=True) == value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"empty": []}, "empty: must be a JSON object"),
        ({"odd": {"odd": ""}}, "odd.odd: must be a JSON object"),
        ({"by_name": {"a": {}, "b": []}}, "by_name[b]: must be a JSON object"),
        ({"byName": {"a": {"odd": 0}}}, "byName[a].odd: must be a JSON object"),
        ({"by_name": []}, "by_name: must be a JSON object"),
        ({"weights": {"a": 1, "b": True}}, "weights[b]: must be a number"),
        ({"numbers": [1, False]}, "numbers[1]: must be a number"),
        ({"numbers": ""}, "numbers: must be a JSON array"),
        ({"double": True}, "double: must be a number"),
        ({"flag": 0}, "flag: must be true or false"),
        ({"odd": {"data": "%"}}, "odd.data: must be base64 text"),
        ({"at": ""}, 'at: must be a time as text, e.g. "2030-01-31T12:00:00Z"'),
    ],
)
def test_the_wrong_form_is_refused_in_every_kind_of_field(odd: type[Message], value: object, told: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        merge_json(value, odd())

    assert refused.value.message == told


def test_a_message_within_itself_a_thousand_times_is_refused(odd: type[Message]) -> None:
    body = b'{"odd":' * 1000 + b"{}" + b"}" * 1000

    with pytest.raises(FixRequestError, match="odd: nested too deeply: up to 99 messages"):
        merge_json(load_json(body), odd())


def test_a_message_within_itself_as_often_as_is_parsed_is_taken(odd: type[Message]) -> None:
    body = b'{"odd":' * 99 + b"{}" + b"}" * 99

    merge_json(load_json(body), message := odd())

    assert len(message.SerializeToString()) > 99


@pytest.mark.parametrize("kind", [any_pb2.Any, wrappers_pb2.Int32Value, wrappers_pb2.DoubleValue])
def test_a_body_of_the_wrong_json_is_refused_where_the_message_has_a_form_of_its_own(kind: type[Message]) -> None:
    with pytest.raises(FixRequestError) as refused:
        merge_json([], kind())

    assert refused.value.field == "body"


def test_a_body_of_any_json_that_is_nested_too_deeply_is_refused() -> None:
    value = load_json(b"[" * 500 + b"]" * 500)

    with pytest.raises(FixRequestError, match=r"body: .*too deep"):
        merge_json(value, struct_pb2.Value())
