"""The mesh's REST routes over a real server: messages, errors, streams, deadlines and disconnects."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest
from google.protobuf import any_pb2
from google.rpc import status_pb2
from grpc_status import rpc_status

from kvmesh.core.errors import BackOffError, MeshError, Reason, TryElsewhereError
from kvmesh.gateway.app import create_app
from kvmesh.gateway.rest_context import RestContext
from kvmesh.gateway.server import HttpServer
from kvmesh.testing.no_generator import NoGenerator
from kvmesh.v1 import (
    frontend_pb2,
    frontend_pb2_grpc,
    generation_pb2,
    worker_control_pb2,
    worker_control_pb2_grpc,
)
from kvmesh.wire import validation

CLEANUP_BOUND_S = 5.0
"""Generous: what must happen at once happens in milliseconds."""

Behaviour = Callable[[RestContext], Awaitable[None]]


class Frontend(frontend_pb2_grpc.FrontendServicer):
    """A front door whose streams yield what the test asks for."""

    def __init__(self) -> None:
        self.calls: list[frontend_pb2.GenerateRequest] = []
        self.chunks = ["a", "b"]
        self.error_before: Exception | None = None
        self.error_after: Exception | None = None
        self.hangs = False
        self.closed = asyncio.Event()
        self.models: Behaviour | None = None
        self.watched_interval_s = 0.0
        self.unready: str | None = None

    async def Generate(  # type: ignore[override]  # the context is ours, as gRPC's is in the other door
        self, request: frontend_pb2.GenerateRequest, context: RestContext
    ) -> AsyncIterator[frontend_pb2.GenerateResponse]:
        validation.check_generate_request(request)
        self.calls.append(request)
        try:
            if self.error_before:
                raise self.error_before
            for text in self.chunks:
                yield frontend_pb2.GenerateResponse(chunk=generation_pb2.Chunk(text=text))
            if self.hangs:
                await asyncio.Event().wait()
            if self.error_after:
                raise self.error_after
            yield frontend_pb2.GenerateResponse(finished=generation_pb2.Finished())
        finally:
            self.closed.set()

    async def GenerateText(  # type: ignore[override]  # as above
        self, request: frontend_pb2.GenerateTextRequest, context: RestContext
    ) -> frontend_pb2.GenerateTextResponse:
        try:
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.closed.set()
        text = f"{request.prompt}_GeneratedBy_NODE1"
        return frontend_pb2.GenerateTextResponse(worker_output=text, request_id=request.request_id)

    async def ListModels(  # type: ignore[override]  # as above
        self, request: frontend_pb2.ListModelsRequest, context: RestContext
    ) -> frontend_pb2.ListModelsResponse:
        if self.models:
            await self.models(context)
        return frontend_pb2.ListModelsResponse(models=[frontend_pb2.Model(name="m")])

    async def WatchTopology(  # type: ignore[override]  # as above
        self, request: frontend_pb2.WatchTopologyRequest, context: RestContext
    ) -> AsyncIterator[frontend_pb2.WatchTopologyResponse]:
        self.watched_interval_s = validation.seconds(request.interval, path="interval")
        yield frontend_pb2.WatchTopologyResponse()


class WorkerControl(worker_control_pb2_grpc.WorkerControlServicer):
    """Remembers whom it was asked to drain."""

    def __init__(self) -> None:
        self.drained: list[str] = []

    async def Drain(  # type: ignore[override]  # as above
        self, request: worker_control_pb2.DrainRequest, context: RestContext
    ) -> worker_control_pb2.DrainResponse:
        self.drained.append(request.worker_id)
        return worker_control_pb2.DrainResponse(finished=request.timeout.seconds)


class Door:
    """A running HTTP server, its servicers, and a client."""

    def __init__(self, frontend: Frontend, control: WorkerControl, client: httpx.AsyncClient) -> None:
        self.frontend = frontend
        self.control = control
        self.client = client


@asynccontextmanager
async def open_door(*, max_body_bytes: int = 64 * 1024) -> AsyncIterator[Door]:
    frontend = Frontend()  # type: ignore[abstract]  # GetTopology is left to the generated class
    control = WorkerControl()  # type: ignore[abstract]  # and GetInfo
    app = create_app(
        services=[
            (frontend_pb2.DESCRIPTOR.services_by_name["Frontend"], frontend),
            (worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"], control),
        ],
        generator=NoGenerator(),
        unready_reason=lambda: frontend.unready,
        max_body_bytes=max_body_bytes,
    )
    server = HttpServer(app, host="127.0.0.1", port=0)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False, timeout=30) as client:
        yield Door(frontend, control, client)
    await server.stop(0)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as opened:
        yield opened


PROMPT = {"prompt": {"text": "hello"}}


def lines_of(response: httpx.Response) -> list[dict[str, object]]:
    return [json.loads(line) for line in response.text.splitlines()]


async def test_hello_world_answers_json_even_where_events_are_accepted(door: Door) -> None:
    response = await door.client.post(
        "/generate",
        content=b'{"prompt":"Tell me a joke","request_id":"id_number"}',
        headers={"accept": "text/event-stream", "content-type": "application/json"},
    )

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"worker_output": "Tell me a joke_GeneratedBy_NODE1", "request_id": "id_number"}


async def test_fields_at_their_defaults_are_told(door: Door) -> None:
    response = await door.client.get("/mesh/v1/models")

    assert response.json() == {"models": [{"name": "m", "workers": 0, "max_context_tokens": 0}]}


async def test_the_worker_named_in_the_path_is_the_one_asked_for(door: Door) -> None:
    response = await door.client.post("/mesh/v1/workers/NODE1/decode/0:drain", json={"timeout": "7s"})

    assert response.json() == {"finished": 7, "cancelled": 0}
    assert door.control.drained == ["NODE1/decode/0"]


async def test_a_query_parameter_reaches_a_watch(door: Door) -> None:
    response = await door.client.get("/mesh/v1/topology:watch?interval=0.25s")

    assert response.status_code == 200
    assert door.frontend.watched_interval_s == 0.25


@pytest.mark.parametrize("path", ["/generate", "/mesh/v1/models", "/nowhere"])
async def test_the_client_s_own_id_comes_back_beside_the_mesh_s(door: Door, path: str) -> None:
    named = await door.client.get(path, headers={"x-request-id": "mine"})
    unnamed = await door.client.get(path)
    misnamed = await door.client.get(path, headers={"x-request-id": "two words"})

    assert named.headers["x-client-request-id"] == "mine"
    assert "x-client-request-id" not in unnamed.headers
    assert "x-client-request-id" not in misnamed.headers


async def test_every_reply_has_an_id_of_its_own(door: Door) -> None:
    paths = ["/mesh/v1/models", "/nowhere", "/healthz"]

    ids = {(await door.client.get(path, headers={"x-request-id": "mine"})).headers["x-request-id"] for path in paths}

    assert len(ids) == 3
    assert "mine" not in ids


HTTP_BY_CODE = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "UNAUTHENTICATED": 401,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
}


@pytest.mark.parametrize(("name", "http_status"), HTTP_BY_CODE.items())
async def test_every_grpc_code_has_its_http_status(door: Door, name: str, http_status: int) -> None:
    code = grpc.StatusCode[name]

    async def abort(context: RestContext) -> None:
        await context.abort(code, "why")

    door.frontend.models = abort

    response = await door.client.get("/mesh/v1/models")

    assert response.status_code == http_status
    assert response.json() == {"code": code.value[0], "message": "why", "details": []}
    assert ("www-authenticate" in response.headers) == (http_status == 401)


async def test_every_grpc_code_but_ok_is_tested() -> None:
    assert set(HTTP_BY_CODE) == {code.name for code in grpc.StatusCode} - {"OK"}


async def test_errors_of_the_mesh_carry_typed_details(door: Door) -> None:
    door.frontend.error_before = BackOffError(Reason.OVERLOADED, "", retry_after_s=1.25)

    response = await door.client.post("/mesh/v1/generate", json=PROMPT)

    assert response.status_code == 429
    assert response.headers["retry-after-ms"] == "1250"
    assert response.headers["retry-after"] == "2"
    info, retry = response.json()["details"]
    assert info["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
    assert (info["reason"], info["domain"]) == ("OVERLOADED", "kvmesh")
    assert retry == {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retry_delay": "1.250s"}


async def test_a_detail_of_an_unknown_type_is_passed_on_as_bytes(door: Door) -> None:
    detail = any_pb2.Any(type_url="type.googleapis.com/other.Thing", value=b"\x01")
    status = status_pb2.Status(code=5, message="gone", details=[detail])

    async def abort(context: RestContext) -> None:
        await context.abort_with_status(rpc_status.to_status(status))

    door.frontend.models = abort

    response = await door.client.get("/mesh/v1/models")

    assert response.status_code == 404
    assert response.json()["details"] == [{"@type": "type.googleapis.com/other.Thing", "value": "AQ=="}]


async def test_what_nobody_foresaw_is_an_internal_error_without_its_text(door: Door) -> None:
    door.frontend.error_before = RuntimeError("secret")

    response = await door.client.post("/mesh/v1/generate", json=PROMPT)

    assert response.status_code == 500
    assert response.json()["code"] == 13
    assert "secret" not in response.text


async def test_a_method_nobody_wrote_is_unimplemented(door: Door) -> None:
    response = await door.client.get("/mesh/v1/topology")

    assert response.status_code == 501
    assert response.json()["code"] == 12


async def test_a_stream_is_a_line_of_json_per_message(door: Door) -> None:
    response = await door.client.post("/mesh/v1/generate", json=PROMPT)

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    first, second, last = lines_of(response)
    assert first == {"result": {"chunk": {"text": "a", "token_ids": [], "logprobs": []}}}
    assert second == {"result": {"chunk": {"text": "b", "token_ids": [], "logprobs": []}}}
    assert last == {"result": {"finished": {"reason": "FINISH_REASON_UNSPECIFIED"}}}


async def test_a_stream_is_events_where_they_are_accepted(door: Door) -> None:
    response = await door.client.post("/mesh/v1/generate", json=PROMPT, headers={"accept": "text/event-stream"})

    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["result"]["chunk"]["text"] == "a"
    assert events[3:] == [""]


@pytest.mark.parametrize(
    ("error", "http_status"),
    [
        (TryElsewhereError(Reason.WORKER_LOST, ""), 503),
        (MeshError(Reason.DEADLINE, ""), 504),
    ],
)
async def test_an_error_before_the_first_message_is_a_status(door: Door, error: Exception, http_status: int) -> None:
    door.frontend.error_before = error

    response = await door.client.post("/mesh/v1/generate", json=PROMPT)

    assert response.status_code == http_status
    assert response.json()["details"][0]["reason"] == error.reason.value  # type: ignore[attr-defined]  # a MeshError


async def test_an_error_after_the_first_message_is_the_last_line(door: Door) -> None:
    door.frontend.error_after = TryElsewhereError(Reason.WORKER_LOST, "")

    response = await door.client.post("/mesh/v1/generate", json=PROMPT)

    assert response.status_code == 200
    *results, last = lines_of(response)
    assert [list(line) for line in results] == [["result"], ["result"]]
    error = last["error"]
    assert isinstance(error, dict)
    assert error["code"] == 14
    assert error["details"][0]["reason"] == "WORKER_LOST"


@pytest.mark.parametrize("path", ["/generate", "/mesh/v1/generate"])
async def test_a_deadline_of_the_client_is_kept_and_frees_the_call(door: Door, path: str) -> None:
    door.frontend.hangs = True
    door.frontend.chunks = []
    body = {"prompt": "hello"} if path == "/generate" else PROMPT

    response = await door.client.post(path, json=body, headers={"grpc-timeout": "50m"})

    assert response.status_code == 504
    assert response.json()["details"][0]["reason"] == "DEADLINE"
    assert door.frontend.closed.is_set()


async def test_a_deadline_within_a_stream_is_its_last_line(door: Door) -> None:
    door.frontend.hangs = True

    response = await door.client.post("/mesh/v1/generate", json=PROMPT, headers={"grpc-timeout": "50m"})

    assert response.status_code == 200
    assert "DEADLINE" in response.text.splitlines()[-1]


@pytest.mark.parametrize("text", ["", "200", "m", "1.5S", "123456789S", "5x"])
async def test_a_timeout_of_another_form_is_refused(door: Door, text: str) -> None:
    response = await door.client.get("/mesh/v1/models", headers={"grpc-timeout": text})

    assert response.status_code == 400
    assert response.json()["details"][0]["metadata"]["field"] == "grpc-timeout"


async def test_a_servicer_sees_the_headers_and_the_time_that_is_left(door: Door) -> None:
    seen: dict[str, object] = {}

    async def look(context: RestContext) -> None:
        seen.update(dict(context.invocation_metadata()), left=context.time_remaining(), peer=context.peer())

    door.frontend.models = look

    response = await door.client.get("/mesh/v1/models", headers={"grpc-timeout": "20S", "x-tenant": "a"})

    assert seen["x-tenant"] == "a"
    assert seen["x-request-id"] == response.headers["x-request-id"]
    assert isinstance(seen["left"], float)
    assert 0 < seen["left"] <= 20
    assert str(seen["peer"]).startswith("ipv4:127.0.0.1:")


async def test_a_client_that_leaves_a_stream_ends_the_call(door: Door) -> None:
    door.frontend.hangs = True

    async with door.client.stream("POST", "/mesh/v1/generate", json=PROMPT) as response:
        async for _ in response.aiter_lines():
            break

    await asyncio.wait_for(door.frontend.closed.wait(), CLEANUP_BOUND_S)


async def test_a_client_that_leaves_a_unary_call_ends_it(door: Door) -> None:
    door.frontend.hangs = True

    with pytest.raises(httpx.ReadTimeout):
        await door.client.post("/generate", json={"prompt": "x"}, timeout=httpx.Timeout(10, read=0.2))

    await asyncio.wait_for(door.frontend.closed.wait(), CLEANUP_BOUND_S)


async def test_an_unknown_path_is_not_found(door: Door) -> None:
    response = await door.client.get("/mesh/v1/nothing")

    assert response.status_code == 404
    assert response.json()["code"] == 5


@pytest.mark.parametrize(
    ("verb", "path", "allowed"),
    [
        ("GET", "/generate", "POST"),
        ("POST", "/mesh/v1/models", "GET, HEAD"),
        ("DELETE", "/mesh/v1/workers/a:drain", "GET, HEAD, POST"),
    ],
)
async def test_a_wrong_verb_is_refused_with_the_right_one(door: Door, verb: str, path: str, allowed: str) -> None:
    response = await door.client.request(verb, path)

    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert response.json()["code"] == 12


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/mesh/v1/models", "application/json"),
        ("/mesh/v1/topology:watch", "application/x-ndjson"),
        ("/healthz", "text/plain; charset=utf-8"),
    ],
)
async def test_head_is_a_get_without_its_body(door: Door, path: str, content_type: str) -> None:
    response = await door.client.head(path)

    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == content_type


async def test_malformed_json_is_refused_with_its_position(door: Door) -> None:
    response = await door.client.post("/generate", content=b'{"prompt":\n nope}')

    assert response.status_code == 400
    assert "line 2 column 2" in response.json()["message"]


async def test_an_unknown_field_is_refused_with_its_path(door: Door) -> None:
    response = await door.client.post("/mesh/v1/generate", json={**PROMPT, "sampling": {"temprature": 0}})

    assert response.status_code == 400
    info, violations = response.json()["details"]
    assert info["metadata"]["field"] == "sampling.temprature"
    assert violations["field_violations"][0]["field"] == "sampling.temprature"


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"prompt": []}, "prompt", "must be a JSON object"),
        ({"sampling": []}, "sampling", "must be a JSON object"),
        ({"routing": ""}, "routing", "must be a JSON object"),
        ({"routing": {"cost": []}}, "routing.cost", "must be a JSON object"),
        ({"sampling": {"temperature": True}}, "sampling.temperature", "must be a number"),
        ({"sampling": {"top_p": True}}, "sampling.top_p", "must be a number"),
    ],
)
async def test_a_value_of_the_wrong_type_is_refused_where_it_is_false_to_python_or_a_boolean(
    door: Door, fields: dict[str, object], field: str, problem: str
) -> None:
    response = await door.client.post("/mesh/v1/generate", json={**PROMPT, **fields})

    assert response.status_code == 400
    info = response.json()["details"][0]
    assert (info["reason"], info["metadata"]["field"]) == ("INVALID_FIELD", field)
    assert response.json()["message"] == f"Invalid field: {field}: {problem}"
    assert door.frontend.calls == []


async def test_a_number_out_of_range_is_refused_by_its_path(door: Door) -> None:
    body = b'{"prompt": {"text": "a"}, "sampling": {"temperature": ' + b"9" * 400 + b"}}"

    response = await door.client.post("/mesh/v1/generate", content=body)

    assert response.status_code == 400
    assert response.json()["details"][0]["metadata"]["field"] == "sampling.temperature"
    assert "out of range" in response.json()["message"]


async def test_a_servicers_own_refusal_names_the_field(door: Door) -> None:
    response = await door.client.post("/mesh/v1/generate", json={**PROMPT, "sampling": {"temperature": 9}})

    assert response.status_code == 400
    assert response.json()["details"][0]["metadata"]["field"] == "sampling.temperature"


async def test_a_large_body_below_the_limit_is_taken() -> None:
    async with open_door(max_body_bytes=1024 * 1024) as door:
        prompt = {"prompt": {"token_ids": {"token_ids": list(range(100_000, 140_000))}}}

        response = await door.client.post("/mesh/v1/generate", json=prompt)

        assert response.status_code == 200
        assert len(door.frontend.calls[0].prompt.token_ids.token_ids) == 40_000


async def test_a_body_beyond_the_limit_is_refused_declared_or_not(door: Door) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(9):
            yield b" " * 8192

    declared = await door.client.post("/generate", content=b" " * 65537)
    undeclared = await door.client.post("/generate", content=chunks())

    assert [declared.status_code, undeclared.status_code] == [413, 413]
    assert "65536 bytes" in declared.json()["message"]


async def test_probes_and_metrics(door: Door) -> None:
    alive, ready = await door.client.get("/healthz"), await door.client.get("/readyz")
    door.frontend.unready = "no decode worker"
    still_alive, unready = await door.client.get("/healthz"), await door.client.get("/readyz")
    metrics = await door.client.get("/metrics")

    assert [alive.status_code, ready.status_code, still_alive.status_code, unready.status_code] == [200, 200, 200, 503]
    assert unready.text == "no decode worker\n"
    assert 'kvmesh_http_requests_total{route="/readyz",status="503"}' in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain; version=")
