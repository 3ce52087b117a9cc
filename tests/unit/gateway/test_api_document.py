"""The OpenAPI document: what it says of routes, parameters, bodies and messages."""

import re
from typing import Any

import pytest
from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, struct_pb2, wrappers_pb2
from google.protobuf.descriptor import ServiceDescriptor

from kvmesh.gateway.api_document import api_document
from kvmesh.gateway.contract_comments import contract_comments
from kvmesh.gateway.json_schemas import Schemas
from kvmesh.gateway.routes import rules_of
from kvmesh.v1 import frontend_pb2, worker_control_pb2
from kvmesh.wire.comments import comments_of

FIELD = descriptor_pb2.FieldDescriptorProto
PACKAGE = "documented"
IMPORTED = [struct_pb2, duration_pb2, wrappers_pb2]


def shop() -> ServiceDescriptor:
    """Return a service of a pool of its own, as one that joins at run time has."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{PACKAGE}.proto",
        package=PACKAGE,
        syntax="proto3",
        dependency=[module.DESCRIPTOR.name for module in IMPORTED],
    )
    item = file.message_type.add(name="Item")
    scalars = {
        "text": FIELD.TYPE_STRING, "count": FIELD.TYPE_INT32, "big": FIELD.TYPE_UINT64, "ratio": FIELD.TYPE_DOUBLE,
        "is_new": FIELD.TYPE_BOOL, "data": FIELD.TYPE_BYTES,
    }  # fmt: skip
    messages = {
        "inner": f"{PACKAGE}.Item", "wait": "google.protobuf.Duration", "extra": "google.protobuf.Struct",
        "anything": "google.protobuf.Value", "maybe": "google.protobuf.BoolValue",
    }  # fmt: skip
    for number, (name, kind) in enumerate(scalars.items(), start=1):
        item.field.add(name=name, number=number, type=kind, label=FIELD.LABEL_OPTIONAL)
    for number, (name, type_name) in enumerate(messages.items(), start=20):
        item.field.add(
            name=name, number=number, type=FIELD.TYPE_MESSAGE, type_name=f".{type_name}", label=FIELD.LABEL_OPTIONAL
        )
    item.field.add(name="tags", number=40, type=FIELD.TYPE_STRING, label=FIELD.LABEL_REPEATED)
    service = file.service.add(name="Shop")
    rule = http_pb2.HttpRule(
        get="/shop/{text}/{inner.count}",
        additional_bindings=[http_pb2.HttpRule(put="/shop/{text=**}:put", body="inner")],
    )
    method = service.method.add(name="Buy", input_type=f".{PACKAGE}.Item", output_type=f".{PACKAGE}.Item")
    method.options.Extensions[annotations_pb2.http].CopyFrom(rule)
    pool = descriptor_pool.DescriptorPool()
    for module in IMPORTED:
        imported = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(imported)
        pool.Add(imported)
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindServiceByName(f"{PACKAGE}.Shop")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    services = [frontend_pb2.DESCRIPTOR.services_by_name["Frontend"], shop()]
    services.append(worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"])
    return api_document(tuple(rules_of(services)), {f"{PACKAGE}.Shop.Buy": "Buy one. Not idempotent."})


def test_fields_have_the_types_that_json_gives_them(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"][f"{PACKAGE}.Item"]["properties"]

    assert properties["text"] == {"type": "string"}
    assert properties["count"] == {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
    assert (properties["big"]["type"], properties["big"]["format"]) == ("string", "uint64")
    assert properties["ratio"]["anyOf"] == [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]
    assert properties["is_new"] == {"type": "boolean"}
    assert properties["data"] == {"type": "string", "contentEncoding": "base64"}
    assert properties["inner"] == {"$ref": f"#/components/schemas/{PACKAGE}.Item"}
    assert properties["extra"] == {"type": "object"}
    assert properties["anything"] == {}
    assert properties["maybe"] == {"type": ["boolean", "null"]}
    assert properties["tags"] == {"type": "array", "items": {"type": "string"}}


def test_a_path_and_a_query_have_their_parameters(document: dict[str, Any]) -> None:
    parameters = document["paths"]["/shop/{text}/{inner.count}"]["get"]["parameters"]

    by_place = {
        place: [given["name"] for given in parameters if given.get("in") == place] for place in ("path", "query")
    }
    assert by_place["path"] == ["text", "inner.count"]
    assert by_place["query"] == ["count", "big", "ratio", "is_new", "data", "wait", "maybe", "tags"]


def test_a_body_of_one_field_is_that_field(document: dict[str, Any]) -> None:
    operation = document["paths"]["/shop/{text}:put"]["put"]

    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": f"#/components/schemas/{PACKAGE}.Item"}
    assert operation["operationId"] == f"{PACKAGE}.Shop.Buy.1"
    assert operation["parameters"][0]["x-spans-segments"] is True
    assert "inner.text" not in [given.get("name") for given in operation["parameters"]]


def test_words_are_those_of_the_contract_and_of_who_adds_a_service(document: dict[str, Any]) -> None:
    paths = document["paths"]

    assert paths["/mesh/v1/models"]["get"]["summary"] == "List the models that live workers serve"
    assert paths["/shop/{text}:put"]["put"]["description"] == "Buy one. Not idempotent."
    prompt = document["components"]["schemas"]["kvmesh.v1.GenerateRequest"]["properties"]["prompt"]
    assert prompt["description"] == "What to continue. Required."


def test_an_enum_is_its_names_and_says_what_they_mean(document: dict[str, Any]) -> None:
    reason = document["components"]["schemas"]["kvmesh.v1.FinishReason"]

    assert "FINISH_REASON_STOP" in reason["enum"]
    assert "- FINISH_REASON_STOP: " in reason["description"]


def test_of_a_oneof_at_most_one_may_be_set(document: dict[str, Any]) -> None:
    (choice,) = document["components"]["schemas"]["kvmesh.v1.Prompt"]["allOf"]

    required = [{"required": [name]} for name in ("text", "token_ids", "messages")]
    assert choice == {"oneOf": [*required, {"not": {"anyOf": required}}]}


def test_a_stream_is_lines_or_events_of_results_and_errors(document: dict[str, Any]) -> None:
    content = document["paths"]["/mesh/v1/generate"]["post"]["responses"]["200"]["content"]

    assert set(content) == {"application/x-ndjson", "text/event-stream"}
    assert content["text/event-stream"]["schema"]["properties"] == {
        "result": {"$ref": "#/components/schemas/kvmesh.v1.GenerateResponse"},
        "error": {"$ref": "#/components/schemas/google.rpc.Status"},
    }


def test_every_element_of_the_contract_that_is_served_has_its_comment(document: dict[str, Any]) -> None:
    schemas = {name: schema for name, schema in document["components"]["schemas"].items() if name.startswith("kvmesh.")}

    silent = [name for name, schema in schemas.items() if not schema.get("description")]
    silent += [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, described in schema.get("properties", {}).items()
        if not described.get("description")
    ]
    assert len(schemas) > 20
    assert silent == []


def test_comments_are_found_by_the_names_of_what_they_stand_before() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="said.proto", package="said")
    file.message_type.add(name="Outer").nested_type.add(name="Inner").field.add(name="field")
    file.service.add(name="Talk").method.add(name="Say").options.deprecated = True
    told = {
        (4, 0): "An outer\n one.",
        (4, 0, 3, 0, 2, 0): " A field. ",
        (6, 0, 2, 0): "Say it.",
        (6, 0, 2, 0, 4, 33): "No.",
    }
    for path, text in told.items():
        file.source_code_info.location.add(path=path, leading_comments=text)

    assert comments_of(file) == {
        "said.Outer": "An outer\n one.",
        "said.Outer.Inner.field": "A field.",
        "said.Talk.Say": "Say it.",
    }
    assert contract_comments()["kvmesh.v1.Frontend.ListModels"].startswith("List the models")


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**62, 0])
def test_the_pattern_of_an_int64_takes_all_of_them(value: int) -> None:
    pattern = Schemas({}).of_message(wrappers_pb2.Int64Value.DESCRIPTOR)["pattern"]

    assert re.search(pattern, str(value))
    assert not re.search(pattern, "1" * 20)
