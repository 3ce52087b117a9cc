"""The REST routes beside Envoy's grpc_json_transcoder: one servicer, one descriptor set, the same answers.

Envoy reads the descriptor set that the package ships, with a service of this file added whose routes use all that
google/api/http.proto offers. Where the two are known to differ, a test of our own says what we do instead.
"""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from google.api import annotations_pb2, http_pb2
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    field_mask_pb2,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import ServiceDescriptor

from kvmesh.gateway.app import create_app
from kvmesh.gateway.contract_comments import contract_path
from kvmesh.gateway.routes import HttpRule, rules_of
from kvmesh.gateway.server import HttpServer
from kvmesh.testing.canned_servicer import FAIL_KEY, CannedServicer
from kvmesh.testing.envoy import running_envoy
from kvmesh.testing.no_generator import NoGenerator
from kvmesh.v1 import frontend_pb2, prefill_queue_pb2, router_pb2, worker_control_pb2

ENVOY = Path(__file__).parents[2] / ".venv-judges" / "bin" / "envoy"

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not ENVOY.exists(), reason="Envoy is not installed: make install-judges"),
]

FIELD = descriptor_pb2.FieldDescriptorProto
IMPORTED = [duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2, wrappers_pb2, annotations_pb2]
CONTRACT = [frontend_pb2, router_pb2, prefill_queue_pb2, worker_control_pb2]
"""Files of the services that the gateway has routes of."""
PACKAGE = "kvmesh_judged"
FIELDS = {
    "id": FIELD.TYPE_STRING, "item": ".Item", "tags": [FIELD.TYPE_STRING], "is_dry": FIELD.TYPE_BOOL,
    "color": ":Color", "colors": [":Color"], "big": FIELD.TYPE_INT64, "ratio": FIELD.TYPE_DOUBLE,
    "data": FIELD.TYPE_BYTES, "numbers": [FIELD.TYPE_UINT32], "items": [".Item"], "fixed": FIELD.TYPE_FIXED64,
    "wait": "google.protobuf.Duration", "at": "google.protobuf.Timestamp", "name": "google.protobuf.StringValue",
    "count": "google.protobuf.Int32Value", "flag": "google.protobuf.BoolValue", "extra": "google.protobuf.Struct",
}  # fmt: skip
ROUTES = {
    "Get": http_pb2.HttpRule(
        get="/calls/{id}",
        additional_bindings=[
            http_pb2.HttpRule(get="/calls/{id}/items/{item.item_name}"),
            http_pb2.HttpRule(post="/calls", body="*"),
            http_pb2.HttpRule(delete="/calls/{id}"),
        ],
    ),
    "PutItem": http_pb2.HttpRule(put="/calls/{id}", body="item"),
    "PatchTags": http_pb2.HttpRule(patch="/calls/{id}/tags", body="tags"),
    "Stop": http_pb2.HttpRule(post="/calls/{id=**}:stop", body="*"),
    "GetBook": http_pb2.HttpRule(get="/{id=shelves/*/books/*}"),
    "Special": http_pb2.HttpRule(get="/calls/special"),
    "ByColor": http_pb2.HttpRule(get="/colors/{color}", additional_bindings=[http_pb2.HttpRule(get="/dry/{is_dry}")]),
    "Watch": http_pb2.HttpRule(get="/calls/{id}/watch", additional_bindings=[http_pb2.HttpRule(post="/w", body="*")]),
}
STREAMS = {"Watch"}


def judged_file() -> descriptor_pb2.FileDescriptorProto:
    """Return the service whose methods answer with their request."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{PACKAGE}/calls.proto", package=PACKAGE, syntax="proto3",
        dependency=[module.DESCRIPTOR.name for module in IMPORTED],
    )  # fmt: skip
    color = file.enum_type.add(name="Color")
    for number, name in enumerate(("COLOR_UNSPECIFIED", "COLOR_RED", "COLOR_BLUE")):
        color.value.add(name=name, number=number)
    item, call = file.message_type.add(name="Item"), file.message_type.add(name="Call")
    fields: dict[str, Any] = {"item_name": FIELD.TYPE_STRING, "size": FIELD.TYPE_UINT32, "child": ".Item"}
    for message, kinds in ((item, fields), (call, FIELDS)):
        for number, (name, kind) in enumerate(kinds.items(), start=1):
            is_repeated = isinstance(kind, list)
            label = FIELD.LABEL_REPEATED if is_repeated else FIELD.LABEL_OPTIONAL
            field = message.field.add(name=name, number=number, label=label)
            set_type(field, kind[0] if is_repeated else kind)
    service = file.service.add(name="Calls")
    for name, rule in ROUTES.items():
        method = service.method.add(name=name, input_type=f".{PACKAGE}.Call", output_type=f".{PACKAGE}.Call")
        method.server_streaming = name in STREAMS
        method.options.Extensions[annotations_pb2.http].CopyFrom(rule)
    return file


def set_type(field: FIELD, kind: Any) -> None:
    """Set a scalar's type, or that of a message or an enum by its name: .Message and :Enum are of this file."""
    if not isinstance(kind, str):
        field.type = kind
        return
    field.type = FIELD.TYPE_ENUM if kind[0] == ":" else FIELD.TYPE_MESSAGE
    field.type_name = f".{PACKAGE}.{kind[1:]}" if kind[0] in ".:" else f".{kind}"


def services() -> list[ServiceDescriptor]:
    """Return all that is judged: the contract's annotated services and the one of this file."""
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(judged_file().SerializeToString())
    contract = [service for module in CONTRACT for service in module.DESCRIPTOR.services_by_name.values()]
    return [*contract, pool.FindServiceByName(f"{PACKAGE}.Calls")]


class Judges:
    """The same servicers behind both."""

    def __init__(self, ours: httpx.AsyncClient, envoy: httpx.AsyncClient) -> None:
        self.ours = ours
        self.envoy = envoy

    async def ask(self, verb: str, path: str, body: Any, **headers: str) -> tuple[httpx.Response, httpx.Response]:
        """Return what we answer and what Envoy answers; `body` is JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if content is not None:
            headers["content-type"] = "application/json"
        ours = await self.ours.request(verb, path, content=content, headers=headers)
        envoy = await self.envoy.request(verb, path, content=content, headers=headers)
        return ours, envoy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def judges(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Judges]:
    judged = services()
    files = descriptor_pb2.FileDescriptorSet.FromString(contract_path().read_bytes())
    known = {file.name for file in files.file}
    for module in IMPORTED:
        if module.DESCRIPTOR.name not in known:
            module.DESCRIPTOR.CopyToProto(files.file.add())
    files.file.append(judged_file())
    served = [(descriptor, CannedServicer(descriptor)) for descriptor in judged]
    upstream = grpc.aio.server()
    upstream.add_generic_rpc_handlers([servicer.handlers() for _, servicer in served])
    port = upstream.add_insecure_port("127.0.0.1:0")
    await upstream.start()
    app = create_app(services=served, generator=NoGenerator(), unready_reason=lambda: None)
    server = HttpServer(app, host="127.0.0.1", port=0)
    await server.start()
    try:
        async with (
            running_envoy(
                ENVOY,
                descriptor_set=files.SerializeToString(),
                services=[descriptor.full_name for descriptor in judged],
                upstream=f"127.0.0.1:{port}",
                folder=tmp_path_factory.mktemp("envoy"),
            ) as address,
            httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False, timeout=20) as ours,
            httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=20) as envoy,
        ):
            yield Judges(ours, envoy)
    finally:
        await server.stop(0)
        await upstream.stop(0)


def messages_of(response: httpx.Response, *, is_stream: bool, wraps: bool) -> list[Any]:
    """Return the JSON of every message; `wraps`: take what is in {"result": ...}."""
    values = [json.loads(line) for line in response.text.splitlines()] if is_stream else [response.json()]
    return [value["result"] for value in values] if wraps else values


WITH = {
    "/mesh/v1/generate": ("", {"prompt": {"token_ids": {"tokenIds": [1, 2]}}, "sampling": {"temperature": 0}}),
    "/generate": ("", {"prompt": "Tell me a joke", "request_id": "id_number"}),
    "/mesh/v1/topology:watch": ("?interval=0.5s", None),
    "/mesh/v1/router:select": ("", {"query": {"model": "m"}}),
    "/mesh/v1/router/index": ("?worker_id=NODE1/decode/0", None),
    "/mesh/v1/queue/dead": ("?limit=3", None),
    "/mesh/v1/workers/{worker_id}:drain": ("", {"timeout": "5s"}),
}
"""Query and body of the routes that are to get some."""
CONTRACT_RULES = rules_of(
    service
    for module in CONTRACT
    for service in module.DESCRIPTOR.services_by_name.values()
)  # fmt: skip
each_rule = pytest.mark.parametrize("rule", CONTRACT_RULES, ids=lambda rule: f"{rule.verb} {rule.template}")


def call_of(rule: HttpRule) -> tuple[str, str, Any]:
    query, body = WITH.get(rule.openapi_path, ("", {} if rule.body else None))
    return rule.verb, rule.openapi_path.replace("{worker_id}", "NODE1/decode/0") + query, body


async def test_what_is_called_with_something_exists() -> None:
    assert set(WITH) <= {rule.openapi_path for rule in CONTRACT_RULES}


@each_rule
async def test_a_route_of_the_contract_answers_as_envoy_does(judges: Judges, rule: HttpRule) -> None:
    ours, envoy = await judges.ask(*call_of(rule))

    is_stream = rule.method.server_streaming
    assert (ours.status_code, envoy.status_code) == (200, 200)
    answers = messages_of(ours, is_stream=is_stream, wraps=is_stream)
    assert answers == messages_of(envoy, is_stream=is_stream, wraps=False)
    assert len(answers) == 1 + is_stream


@each_rule
async def test_a_failed_route_of_the_contract_answers_as_envoy_does(judges: Judges, rule: HttpRule) -> None:
    ours, envoy = await judges.ask(*call_of(rule), **{FAIL_KEY: "9"})

    assert (ours.status_code, envoy.status_code) == (400, 400)
    assert ours.json() == envoy.json()
    assert ours.json()["details"][0]["reason"] == "WHY"


@pytest.mark.parametrize("code", [code.value[0] for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_every_code_has_the_status_and_body_of_envoy(judges: Judges, code: int) -> None:
    ours, envoy = await judges.ask("GET", "/mesh/v1/models", None, **{FAIL_KEY: str(code)})

    assert ours.status_code == envoy.status_code
    assert ours.json() == envoy.json()


AGREED = [
    ("GET", "/calls/c1", None),
    ("GET", "/calls/a%20b%2Fc%C3%BC", None),
    ("GET", "/calls/c1?tags=a&tags=b&is_dry=true&color=COLOR_RED&colors=COLOR_RED&colors=COLOR_BLUE", None),
    ("GET", "/calls/c1?item.item_name=n%C3%A4me&item.size=3&item.child.child.size=4", None),
    ("GET", "/calls/c1?item.itemName=json&isDry=false", None),
    ("GET", "/calls/c1?big=-9007199254740993&fixed=18446744073709551615&ratio=-1.5e3&numbers=1&numbers=2", None),
    ("GET", "/calls/c1?wait=1.5s&at=2030-01-31T12:00:00Z", None),
    ("GET", "/calls/c1?name=wrapped&count=0", None),
    ("GET", "/calls/c1?data=AP/%2B", None),
    ("GET", "/calls/c1?tags=a%26b%3Dc%20d%2B", None),
    ("GET", "/calls/special", None),
    ("GET", "/calls/c1/items/i%2F2?item.size=3", None),
    ("POST", "/calls", {"id": "x", "item": {"itemName": "json", "child": {"size": 2}}, "tags": []}),
    ("POST", "/calls", {"big": "5", "fixed": 6, "color": "COLOR_BLUE", "colors": [1, "COLOR_RED"], "data": "AP8="}),
    ("POST", "/calls", {"wait": "0.25s", "name": "w", "count": 3, "flag": False, "extra": {"a": [1, None, {"b": ""}]}}),
    ("POST", "/calls", {"id": None, "item": None, "ratio": "NaN"}),
    ("POST", "/calls", {"ratio": "Infinity", "numbers": [4294967295]}),
    ("DELETE", "/calls/c1?tags=x", None),
    ("PUT", "/calls/c1?tags=a", {"item_name": "n", "size": 3}),
    ("PATCH", "/calls/c1/tags?is_dry=true", ["a", "b"]),
    ("POST", "/calls/a/b/c:stop", {"tags": ["x"]}),
    ("POST", "/calls/a%2Fb/c%20d:stop", {}),
    ("GET", "/shelves/1/books/b%20c?item.size=1", None),
    ("GET", "/colors/COLOR_BLUE", None),
    ("GET", "/dry/true", None),
    ("GET", "/calls/c1/watch?tags=a", None),
    ("POST", "/w", {"id": "x"}),
]


@pytest.mark.parametrize(("verb", "path", "body"), AGREED, ids=lambda value: str(value)[:60])
async def test_a_request_means_what_it_means_to_envoy(judges: Judges, verb: str, path: str, body: Any) -> None:
    ours, envoy = await judges.ask(verb, path, body)

    is_stream = ours.headers["content-type"] == "application/x-ndjson"
    assert (ours.status_code, envoy.status_code) == (200, 200)
    answers = messages_of(ours, is_stream=is_stream, wraps=is_stream)
    assert answers == messages_of(envoy, is_stream=is_stream, wraps=False)


REFUSED = [
    ("GET", "/nowhere", None, 404),
    ("GET", "/calls/a/b/c", None, 404),
    ("GET", "/shelves/1/books", None, 404),
    ("GET", "/calls/c1?nothing=1", None, 400),
    ("GET", "/calls/c1?item.nothing=1", None, 400),
    ("GET", "/calls/c1?item=1", None, 400),
    ("GET", "/calls/c1?count=x", None, 400),
    ("GET", "/calls/c1?is_dry=maybe", None, 400),
    ("GET", "/calls/c1?item.size=-1", None, 400),
    ("GET", "/calls/c1?wait=soon", None, 400),
    ("GET", "/dry/perhaps", None, 400),
    ("POST", "/calls", b"{", 400),
    ("POST", "/calls", b'{"id": nope}', 400),
    ("POST", "/calls", {"numbers": [-1]}, 400),
    ("POST", "/calls", {"data": "%"}, 400),
    ("POST", "/calls", {"wait": "soon"}, 400),
]


@pytest.mark.parametrize(("verb", "path", "body", "status"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_envoy_refuses_is_refused(judges: Judges, verb: str, path: str, body: Any, status: int) -> None:
    ours, envoy = await judges.ask(verb, path, body)

    assert (ours.status_code, envoy.status_code) == (status, status)


DIFFERENT = [
    ("GET", "/calls", None, (405, 404)),  # we name the verb that is served
    ("POST", "/calls", {"nothing": 1}, (400, 200)),  # we refuse what nobody would read
    ("POST", "/calls?id=c1", {"tags": ["x"]}, (400, 200)),  # as http.proto has it: the body is everything
]


@pytest.mark.parametrize(("verb", "path", "body", "statuses"), DIFFERENT, ids=lambda value: str(value)[:60])
async def test_where_we_are_stricter_than_envoy_it_is_on_purpose(
    judges: Judges, verb: str, path: str, body: Any, statuses: tuple[int, int]
) -> None:
    ours, envoy = await judges.ask(verb, path, body)

    assert (ours.status_code, envoy.status_code) == statuses


async def test_a_plus_in_a_query_is_a_blank_as_html_forms_write_it(judges: Judges) -> None:
    ours, envoy = await judges.ask("GET", "/calls/c1?tags=a+b", None)

    assert (ours.json()["tags"], envoy.json()["tags"]) == (["a b"], ["a+b"])
