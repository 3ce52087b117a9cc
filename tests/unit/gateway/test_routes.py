"""Rules made from annotations: which path and verb reach which method, with which values."""

from typing import Any

import pytest
from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, json_format, struct_pb2, wrappers_pb2
from google.protobuf.descriptor import ServiceDescriptor

from kvmesh.core.errors import FixRequestError
from kvmesh.gateway.request_binding import bind_request
from kvmesh.gateway.routes import HttpRule, rules_of
from kvmesh.v1 import frontend_pb2, router_pb2, worker_control_pb2

Field = descriptor_pb2.FieldDescriptorProto
Value = descriptor_pb2.EnumValueDescriptorProto
EMPTY = {"id": "", "tags": [], "is_dry": False, "color": "COLOR_UNSPECIFIED", "data": ""}
"""A request of `service` with nothing in it, as JSON."""
IMPORTED = [duration_pb2, struct_pb2, wrappers_pb2]


def service(name: str, *rules: http_pb2.HttpRule) -> ServiceDescriptor:
    """Return a service whose methods M0, M1, ... have these annotations, all with one request type."""
    package = f"kvmesh_routes_test.{name}"
    file = descriptor_pb2.FileDescriptorProto(
        name=f"kvmesh_routes_test/{name}.proto",
        package=package,
        syntax="proto3",
        dependency=["google/api/annotations.proto", *(imported.DESCRIPTOR.name for imported in IMPORTED)],
    )
    item = file.message_type.add(name="Item")
    item.field.add(name="item_name", number=1, type=Field.TYPE_STRING, label=Field.LABEL_OPTIONAL)
    item.field.add(name="size", number=2, type=Field.TYPE_UINT32, label=Field.LABEL_OPTIONAL)
    call = file.message_type.add(name="Call")
    call.field.add(name="id", number=1, type=Field.TYPE_STRING, label=Field.LABEL_OPTIONAL)
    call.field.add(
        name="item", number=2, type=Field.TYPE_MESSAGE, type_name=f".{package}.Item", label=Field.LABEL_OPTIONAL
    )
    call.field.add(name="tags", number=3, type=Field.TYPE_STRING, label=Field.LABEL_REPEATED)
    call.field.add(name="is_dry", number=4, type=Field.TYPE_BOOL, label=Field.LABEL_OPTIONAL)
    call.field.add(
        name="wait",
        number=5,
        type=Field.TYPE_MESSAGE,
        type_name=".google.protobuf.Duration",
        label=Field.LABEL_OPTIONAL,
    )
    calls = file.service.add(name="Calls")
    for index, rule in enumerate(rules):
        method = calls.method.add(name=f"M{index}", input_type=f".{package}.Call", output_type=f".{package}.Item")
        method.options.Extensions[annotations_pb2.http].CopyFrom(rule)
    kinds = {"is_set": "BoolValue", "count": "Int32Value", "name": "StringValue", "extra": "Struct"}
    for number, (field_name, kind) in enumerate(kinds.items(), start=6):
        call.field.add(
            name=field_name,
            number=number,
            type=Field.TYPE_MESSAGE,
            type_name=f".google.protobuf.{kind}",
            label=Field.LABEL_OPTIONAL,
        )
    file.enum_type.add(name="Color").value.extend(
        [Value(name="COLOR_UNSPECIFIED", number=0), Value(name="COLOR_RED", number=1)]
    )
    call.field.add(
        name="color", number=10, type=Field.TYPE_ENUM, type_name=f".{package}.Color", label=Field.LABEL_OPTIONAL
    )
    call.field.add(name="data", number=11, type=Field.TYPE_BYTES, label=Field.LABEL_OPTIONAL)
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    return descriptor_pool.Default().FindServiceByName(f"{package}.Calls")


def only_rule(name: str, rule: http_pb2.HttpRule) -> HttpRule:
    (found,) = rules_of([service(name, rule)])
    return found


def called(rules: "list[HttpRule]", path: str) -> str | None:
    return next((rule.method.name for rule in rules if rule.match(path) is not None), None)


def test_every_annotated_method_of_the_frontend_has_its_rule() -> None:
    rules = rules_of([frontend_pb2.DESCRIPTOR.services_by_name["Frontend"]])

    assert {(rule.verb, rule.template, rule.method.name) for rule in rules} == {
        ("POST", "/mesh/v1/generate", "Generate"),
        ("POST", "/generate", "GenerateText"),
        ("GET", "/mesh/v1/models", "ListModels"),
        ("GET", "/mesh/v1/topology", "GetTopology"),
        ("GET", "/mesh/v1/topology:watch", "WatchTopology"),
    }


def test_methods_without_annotation_have_no_rule() -> None:
    rules = rules_of([router_pb2.DESCRIPTOR.services_by_name["Router"]])

    assert not {rule.method.name for rule in rules} & {"Reserve", "ReportProgress", "Release"}


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("/mesh/v1/workers/NODE1/decode/0:drain", {"worker_id": "NODE1/decode/0"}),
        ("/mesh/v1/workers/a%20b:drain", {"worker_id": "a b"}),
        ("/mesh/v1/workers/a%2Fb/c:drain", {"worker_id": "a%2Fb/c"}),  # http.proto: stays encoded in `**`
        ("/mesh/v1/workers/NODE1:drain:drain", {"worker_id": "NODE1:drain"}),
        ("/mesh/v1/workers/NODE1", None),
        ("/mesh/v1/workers/:drain", None),
        ("/mesh/v1/workers/NODE1:drain/", None),
    ],
)
def test_a_variable_of_many_segments_ends_at_the_verb(path: str, values: dict[str, str] | None) -> None:
    rules = rules_of([worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"]])
    rule = next(rule for rule in rules if rule.method.name == "Drain")

    assert rule.match(path) == values


def test_a_variable_of_one_segment_decodes_all_of_it() -> None:
    rule = only_rule("one_segment", http_pb2.HttpRule(get="/calls/{id}/x"))

    assert rule.match("/calls/a%2Fb/x") == {"id": "a/b"}
    assert rule.match("/calls/a/b/x") is None


def test_the_more_specific_path_is_asked_first() -> None:
    rules = rules_of(
        [
            service(
                "specific",
                http_pb2.HttpRule(get="/calls/{id}"),
                http_pb2.HttpRule(get="/calls/{id}:stop"),
                http_pb2.HttpRule(get="/calls/dead"),
                http_pb2.HttpRule(get="/{id=calls/**}"),
            )
        ]
    )

    paths = ["/calls/7", "/calls/7:stop", "/calls/dead", "/calls/7/more"]
    assert [called(list(rules), path) for path in paths] == ["M0", "M1", "M2", "M3"]


def test_additional_bindings_are_rules_of_their_own() -> None:
    rule = http_pb2.HttpRule(get="/a/{id}", additional_bindings=[http_pb2.HttpRule(post="/b", body="*")])

    rules = rules_of([service("additional", rule)])

    assert {(rule.verb, rule.template) for rule in rules} == {("GET", "/a/{id}"), ("POST", "/b")}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("bad_variable", http_pb2.HttpRule(get="/calls/{nothing}")),
        ("repeated_variable", http_pb2.HttpRule(get="/calls/{tags}")),
        ("message_variable", http_pb2.HttpRule(get="/calls/{item}")),
        ("bad_body", http_pb2.HttpRule(post="/calls", body="nothing")),
        ("response_body", http_pb2.HttpRule(get="/calls", response_body="size")),
        ("custom", http_pb2.HttpRule(custom=http_pb2.CustomHttpPattern(kind="HEAD", path="/calls"))),
    ],
)
def test_an_annotation_that_cannot_be_served_fails_at_the_start(name: str, rule: http_pb2.HttpRule) -> None:
    with pytest.raises(ValueError, match="M0"):
        rules_of([service(name, rule)])


def test_two_methods_on_one_path_fail_at_the_start() -> None:
    same = service("same", http_pb2.HttpRule(get="/calls/{id}"), http_pb2.HttpRule(get="/calls/{item.item_name}"))

    with pytest.raises(ValueError, match=r"M1 and .*M0 share GET"):
        rules_of([same])


async def test_query_parameters_reach_nested_repeated_and_well_known_fields() -> None:
    rule = only_rule("query", http_pb2.HttpRule(get="/calls/{id}"))

    message = await bind_request(
        rule,
        path_values={"id": "c1"},
        query=b"item.itemName=n%C3%A4me&item.size=3&tags=a&tags=b&is_dry=true&wait=1.5s"
        b"&is_set=false&count=0&name=n&color=COLOR_RED&data=AP8",
        body=b"",
    )

    request = _json(message)
    assert request == {
        "id": "c1",
        "item": {"item_name": "näme", "size": 3},
        "tags": ["a", "b"],
        "is_dry": True,
        "wait": "1.500s",
        "is_set": False,
        "count": 0,
        "name": "n",
        "color": "COLOR_RED",
        "data": "AP8=",
    }


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False)])
async def test_a_path_may_hold_a_boolean(text: str, value: bool) -> None:
    rule = only_rule(f"boolean_{text}", http_pb2.HttpRule(get="/calls/{is_dry}"))

    message = await bind_request(rule, path_values={"is_dry": text}, query=b"", body=b"")

    assert _json(message)["is_dry"] is value


async def test_more_query_parameters_than_anybody_needs_are_refused() -> None:
    rule = only_rule("many", http_pb2.HttpRule(get="/calls"))
    some = await bind_request(rule, path_values={}, query=b"&".join([b"tags=a"] * 1000), body=b"")

    with pytest.raises(FixRequestError, match="1000 query parameters"):
        await bind_request(rule, path_values={}, query=b"&".join([b"tags=a"] * 1001), body=b"")

    assert len(_json(some)["tags"]) == 1000


async def test_a_body_of_one_field_leaves_the_others_to_path_and_query() -> None:
    rule = only_rule("body_field", http_pb2.HttpRule(put="/calls/{id}", body="item"))

    message = await bind_request(rule, path_values={"id": "c1"}, query=b"tags=a", body=b'{"size": 3}')

    assert _json(message) == {**EMPTY, "id": "c1", "item": {"item_name": "", "size": 3}, "tags": ["a"]}


async def test_the_path_wins_over_the_body() -> None:
    rule = only_rule("path_wins", http_pb2.HttpRule(post="/calls/{id}", body="*"))

    message = await bind_request(rule, path_values={"id": "path"}, query=b"", body=b'{"id": "body", "tags": ["a"]}')

    assert _json(message) == {**EMPTY, "id": "path", "tags": ["a"]}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (b"nothing=1", "nothing"),
        (b"item.nothing=1", "item.nothing"),
        (b"item=1", "item"),
        (b"item.size=-1", "item.size"),
        (b"is_dry=maybe", "is_dry"),
        (b"id=other", "id"),
        (b"item.size=1&item.size=2", "item.size"),
        (b"tags.x=1", "tags.x"),
        (b"wait=1s&wait.seconds=1", "wait.seconds"),
        (b"wait.seconds=1&wait=1s", "wait"),
        (b"is_set=maybe", "is_set"),
        (b"color=COLOR_GREEN", "color"),
        (b"extra=1", "extra"),
        (b"data=%25", "data"),
    ],
)
async def test_a_bad_query_parameter_is_named(query: bytes, field: str) -> None:
    rule = only_rule("bad_query_" + field.replace(".", "_") + str(len(query)), http_pb2.HttpRule(get="/calls/{id}"))

    with pytest.raises(FixRequestError) as refused:
        await bind_request(rule, path_values={"id": "c1"}, query=query, body=b"")

    assert refused.value.field == field


async def test_query_parameters_beside_a_whole_body_are_refused() -> None:
    rule = only_rule("query_and_body", http_pb2.HttpRule(post="/calls", body="*"))

    with pytest.raises(FixRequestError) as refused:
        await bind_request(rule, path_values={}, query=b"id=1", body=b"{}")

    assert refused.value.field == "id"


def _json(message: object) -> dict[str, Any]:
    return json_format.MessageToDict(
        message,  # type: ignore[arg-type]  # a class made at run time
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )
