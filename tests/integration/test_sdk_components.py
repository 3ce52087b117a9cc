"""Components over real servers: gRPC, REST, reflection, clients, errors, publications, and how they end."""

import asyncio
import warnings
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import BaseModel, Field

from kvmesh.core.errors import FixRequestError, MeshError, NotKnownError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.sdk import (
    KvEventPublisher,
    KvIndexer,
    KvMetricsAggregator,
    KvMetricsPublisher,
    Runtime,
    UnannotatedResultWarning,
    connect,
    context,
    depends,
    endpoint,
    on_shutdown,
    on_start,
    service,
    worker,
)
from kvmesh.sdk.client import Client
from kvmesh.testing.sdk import ServedComponents, serving
from kvmesh.v1 import generation_pb2, worker_control_pb2, worker_control_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

BOUND_S = 10.0
BLOCK = 4


class Text(BaseModel):
    text: str
    times: int = Field(default=1, ge=1, le=9)


class Told(BaseModel):
    greeting: str = "hello"


class Log:
    """What the served objects of this module did."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.cancelled = asyncio.Event()
        self.let_go = asyncio.Event()


LOG = Log()

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UnannotatedResultWarning)

    @service(dynamo={"namespace": "team-a"})
    class Loose:
        @endpoint()
        async def generate(self, request: Text):  # type: ignore[no-untyped-def]  # it is the subject
            for word in request.text.split():
                yield Text(text=word).model_dump_json()


@service(namespace="team-a", workers=2)
class Worker:
    """Answers, waits and fails as it is told."""

    def __init__(self) -> None:
        component = context["component"]
        self.metrics = KvMetricsPublisher()
        self.metrics.create_endpoint(component)
        self.metrics.publish(1, 8, 2, 16, 3, 0.125, 0.5)
        self.events = KvEventPublisher(component, BLOCK)
        self.greeting = context.config_as(Told).greeting

    @endpoint()
    async def say(self, request: Text) -> AsyncIterator[Text]:
        """Stream it."""
        for _ in range(request.times):
            yield Text(text=f"{self.greeting} {request.text} from {context.worker_id}")

    @endpoint()
    async def upper(self, request: Text) -> Text:
        return Text(text=request.text.upper())

    @endpoint()
    async def wait(self, request: Text) -> AsyncIterator[Text]:
        yield Text(text=f"{context.time_remaining()}")
        try:
            await LOG.let_go.wait()
        except asyncio.CancelledError:
            LOG.cancelled.set()
            raise
        yield request

    @endpoint()
    async def fail(self, request: Text) -> Text:
        if request.text == "foreseen":
            raise FixRequestError(Reason.INVALID_FIELD, "text: not this one", field="text")
        raise ZeroDivisionError("a secret")


@service(namespace="team-b")
class Entry:
    worker = depends(Worker)

    @on_start
    async def begin(self) -> None:
        LOG.done.append("start")

    @on_shutdown
    async def end(self) -> None:
        LOG.done.append("shutdown")

    @endpoint()
    async def relay(self, request: Text) -> AsyncIterator[Text]:
        upper = await self.worker.upper(request)
        async for answer in self.worker.say(Text(text=upper.text, times=request.times)):
            yield answer


@service(namespace="team-c")
class Typed:
    @endpoint()
    async def count(self, request: generation_pb2.TokenIds) -> AsyncIterator[generation_pb2.Usage]:
        for done in range(len(request.token_ids)):
            yield generation_pb2.Usage(completion_tokens=done + 1)

    @endpoint()
    async def forget(self, request: dict[str, Any]) -> None:
        LOG.done.append(str(sorted(request)))


@pytest.fixture
async def mesh() -> AsyncIterator[ServedComponents]:
    LOG.__init__()  # type: ignore[misc]  # events of this test's loop
    async with serving(Entry, Loose, config=("Worker.greeting=hi",)) as served:
        yield served


async def client_of(runtime: Runtime, address: str, **kwargs: Any) -> Client:
    namespace, component, name = address.split("/")
    return await runtime.namespace(namespace).component(component).endpoint(name).client(**kwargs)


async def everything(answers: Any) -> list[Any]:
    return [answer async for answer in answers]


async def test_a_client_chooses_in_turn_or_at_random_or_is_told(mesh: ServedComponents) -> None:
    client = await client_of(mesh.runtime, "team-a/Worker/say", answer=Text)
    first, second = await client.wait_for_workers(2)

    in_turn = [(await everything(await client.generate({"text": "x"})))[0].text for _ in range(4)]
    told = await everything(await client.direct(Text(text="y", times=2), second))
    anybody = await everything(await client.random('{"text": "z"}'))

    assert in_turn == [f"hi x from {first}", f"hi x from {second}"] * 2
    assert told == [Text(text=f"hi y from {second}")] * 2
    assert anybody[0].text in (f"hi z from {first}", f"hi z from {second}")
    with pytest.raises(TryElsewhereError, match="no worker 'nobody' is live"):
        await client.direct({"text": "x"}, "nobody")


async def test_a_dependency_is_called_as_its_methods_are(mesh: ServedComponents) -> None:
    client = await client_of(mesh.runtime, "team-b/Entry/relay")

    answers = await everything(await client.generate({"text": "x", "times": 2}))

    assert [answer["text"].partition(" from ")[0] for answer in answers] == ["hi X", "hi X"]


async def test_what_is_not_annotated_streams_plain_values(mesh: ServedComponents) -> None:
    client = await client_of(mesh.runtime, "team-a/Loose/generate")

    assert await everything(await client.generate({"text": "a b"})) == [
        '{"text":"a","times":1}',
        '{"text":"b","times":1}',
    ]


async def test_a_program_beside_the_mesh_needs_its_door_only(mesh: ServedComponents) -> None:
    async with connect(mesh.grpc_address) as runtime:
        client = await client_of(runtime, "team-a/Worker/upper")

        assert await everything(await client.generate({"text": "far"})) == [{"text": "FAR", "times": 1}]


async def test_a_declared_program_is_connected_to_what_is_served(mesh: ServedComponents) -> None:
    @worker()
    async def program(runtime: Runtime, text: str) -> Any:
        return await everything(await (await client_of(runtime, "team-a/Worker/upper")).generate({"text": text}))

    assert await program("near") == [{"text": "NEAR", "times": 1}]


async def test_rest_and_the_openapi_document_have_every_endpoint(mesh: ServedComponents) -> None:
    async with httpx.AsyncClient(base_url=mesh.http_url) as http:
        one = await http.post("/sdk/v1/team-a/Worker/upper", json={"text": "a"})
        many = await http.post("/sdk/v1/team-a/Worker/say", json={"text": "a", "times": 2})
        events = await http.post(
            "/sdk/v1/team-a/Loose/generate", json={"text": "a"}, headers={"accept": "text/event-stream"}
        )
        document = (await http.get("/openapi.json")).json()

    assert one.json() == {"text": "A", "times": 1}
    assert len(many.text.splitlines()) == 2
    assert events.text.startswith('data: {"result":"{')
    assert {path for path in document["paths"] if path.startswith("/sdk/")} == {
        "/sdk/v1/team-b/Entry/relay",
        "/sdk/v1/team-a/Loose/generate",
        *(f"/sdk/v1/team-a/Worker/{name}" for name in ("say", "upper", "wait", "fail")),
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [({}, "text"), ({"text": "a", "times": 12}, "times"), ({"text": "a", "tims": 1}, "tims"), ({"text": 5}, "text")],
)
async def test_a_wrong_shape_is_a_400_with_the_path_of_the_field(
    mesh: ServedComponents, body: dict[str, object], field: str
) -> None:
    async with httpx.AsyncClient(base_url=mesh.http_url) as http:
        refused = await http.post("/sdk/v1/team-a/Worker/upper", json=body)

    details = {detail["@type"].rpartition(".")[2]: detail for detail in refused.json()["details"]}
    assert (refused.status_code, refused.json()["code"]) == (400, 3)
    assert details["ErrorInfo"]["reason"] == "INVALID_FIELD"
    assert details["BadRequest"]["field_violations"][0]["field"] == field


async def test_both_doors_reflect_the_endpoints_with_their_messages(mesh: ServedComponents) -> None:
    (role,) = [role for role in mesh.graph.roles if role.name.endswith("Worker/0")]
    for address in (role.address, mesh.grpc_address):
        async with grpc.aio.insecure_channel(address) as channel:
            file = await reflected(channel, "sdk.team_a.worker.Worker")
            say: Any = channel.unary_stream("/sdk.team_a.worker.Worker/say", None, None)
            answers = [data async for data in say(b"\x0a\x01x", timeout=BOUND_S)]  # field 1 = "x", as any language says

        assert {method.name for method in file.service[0].method} == {"say", "upper", "wait", "fail"}
        assert [field.name for field in file.message_type[0].field] == ["text", "times"]
        assert b"hi x from" in answers[0]


async def reflected(channel: grpc.aio.Channel, symbol: str) -> descriptor_pb2.FileDescriptorProto:
    """Return the file that defines a name, after looking that it is listed."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
    ]
    listed, found = [answer async for answer in stub.ServerReflectionInfo(iter(requests), timeout=BOUND_S)]
    assert symbol in {one.name for one in listed.list_services_response.service}
    files = map(descriptor_pb2.FileDescriptorProto.FromString, found.file_descriptor_response.file_descriptor_proto)
    return next(file for file in files if file.service)


async def test_health_names_the_component(mesh: ServedComponents) -> None:
    async with grpc.aio.insecure_channel(mesh.graph.roles[0].address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="sdk.team_a.worker.Worker"), timeout=BOUND_S
        )

    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_messages_of_a_contract_of_ones_own_and_plain_dicts_are_types_too() -> None:
    LOG.__init__()  # type: ignore[misc]  # events of this test's loop
    async with serving(Typed) as served, httpx.AsyncClient(base_url=served.http_url) as http:
        count = await client_of(served.runtime, "team-c/Typed/count", answer=generation_pb2.Usage)
        forget = await client_of(served.runtime, "team-c/Typed/forget")

        counted = await everything(await count.generate(generation_pb2.TokenIds(token_ids=[5, 6])))
        forgot = await everything(await forget.generate({"b": 1, "a": [2]}))
        by_http = await http.post("/sdk/v1/team-c/Typed/count", json={"token_ids": [7]})
        of_a_list = await http.post("/sdk/v1/team-c/Typed/forget", json=[])
        with pytest.raises(FixRequestError) as refused:
            await forget.generate([])

    assert counted == [generation_pb2.Usage(completion_tokens=1), generation_pb2.Usage(completion_tokens=2)]
    assert (forgot, LOG.done) == ([None], ["['a', 'b']"])
    assert by_http.json()["result"]["completion_tokens"] == 1
    assert (of_a_list.status_code, of_a_list.json()["message"]) == (
        400,
        "Invalid field: the body must be a JSON object",
    )
    assert refused.value.message == "request: must be a JSON object"


async def test_errors_keep_their_reason_and_secrets_stay_in_the_log(mesh: ServedComponents) -> None:
    client = await client_of(mesh.runtime, "team-a/Worker/fail")

    with pytest.raises(FixRequestError) as foreseen:
        await everything(await client.generate({"text": "foreseen"}))
    with pytest.raises(MeshError) as unforeseen:
        await everything(await client.generate({"text": "x"}))

    assert (foreseen.value.reason, foreseen.value.field) == (Reason.INVALID_FIELD, "text")
    assert unforeseen.value.reason is Reason.INTERNAL
    assert "secret" not in unforeseen.value.message


async def test_a_deadline_reaches_the_method_and_ends_it(mesh: ServedComponents) -> None:
    client = await client_of(mesh.runtime, "team-a/Worker/wait")
    answers = await client.generate({"text": "x"}, timeout_s=1.0)

    first = await anext(answers)
    with pytest.raises(OutOfTimeError):
        await anext(answers)

    assert 0 < float(first["text"]) <= 1.0
    async with asyncio.timeout(BOUND_S):
        await LOG.cancelled.wait()


async def test_a_caller_who_stops_reading_cancels_the_method(mesh: ServedComponents) -> None:
    client = await client_of(mesh.runtime, "team-a/Worker/wait")
    answers = await client.generate({"text": "x"})
    await anext(answers)

    await answers.aclose()

    async with asyncio.timeout(BOUND_S):
        await LOG.cancelled.wait()


async def test_what_nobody_serves_says_what_is_served(mesh: ServedComponents) -> None:
    nobody = await client_of(mesh.runtime, "team-a/Wroker/say")
    nothing = await client_of(mesh.runtime, "team-a/Worker/sya")

    with pytest.raises(TryElsewhereError, match=r"components that run: .*team-a/Worker"):
        await nobody.generate({"text": "x"})
    with pytest.raises(NotKnownError, match="the nearest is say"):
        await nothing.generate({"text": "x"})


async def test_hooks_run_at_the_start_and_after_the_end() -> None:
    LOG.__init__()  # type: ignore[misc]  # events of this test's loop
    async with serving(Entry):
        assert LOG.done == ["start"]

    assert LOG.done == ["start", "shutdown"]


async def test_a_drained_worker_ends_what_runs_and_gets_nothing_new(mesh: ServedComponents) -> None:
    client = await client_of(mesh.runtime, "team-a/Worker/wait")
    first, second = await client.wait_for_workers(2)
    running = await client.direct({"text": "last"}, first)
    await anext(running)
    (role,) = [role for role in mesh.graph.roles if role.name == first]

    async with grpc.aio.insecure_channel(role.address) as channel:
        control = worker_control_pb2_grpc.WorkerControlStub(channel)
        drain = control.Drain(worker_control_pb2.DrainRequest(worker_id=first), timeout=BOUND_S)
        async with asyncio.timeout(BOUND_S):
            while client.worker_ids() != [second]:
                await mesh.runtime.changed()
        upper: Any = channel.unary_unary("/sdk.team_a.worker.Worker/upper", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await upper(b"\x0a\x01x", timeout=BOUND_S)
        LOG.let_go.set()
        answer = await drain

    assert (answer.finished, answer.cancelled) == (1, 0)
    assert (await anext(running))["text"] == "last"
    assert from_rpc_error(refused.value).reason is Reason.DRAINING


async def test_a_worker_that_is_gone_is_replaced_once_before_its_first_answer(mesh: ServedComponents) -> None:
    client = await client_of(mesh.runtime, "team-a/Worker/upper")
    first, _ = await client.wait_for_workers(2)
    (role,) = [role for role in mesh.graph.roles if role.name == first]

    await role._server.drain_and_stop(0)  # as a killed process: its record is still there
    answers = [await everything(await client.generate({"text": "a"})) for _ in range(2)]

    assert answers == [[{"text": "A", "times": 1}]] * 2


async def test_metrics_of_every_worker_are_collected(mesh: ServedComponents) -> None:
    component = mesh.runtime.namespace("team-a").component("Worker")
    await component.create_service()
    aggregator = KvMetricsAggregator(component)

    metrics = await aggregator.get_metrics()

    assert [one.worker_id for one in metrics.endpoints] == component.worker_ids()
    one = metrics.endpoints[0]
    assert (one.request_active_slots, one.request_total_slots, one.kv_active_blocks, one.kv_total_blocks) == (
        1,
        8,
        2,
        16,
    )
    assert (one.num_requests_waiting, one.gpu_cache_usage_perc, one.gpu_prefix_cache_hit_rate) == (3, 0.125, 0.5)


async def test_the_indexer_finds_who_holds_a_prefix(mesh: ServedComponents) -> None:
    indexer = KvIndexer(mesh.runtime.namespace("team-a").component("Worker"), BLOCK)
    first, second = mesh.instances(Worker)
    prompt = list(range(4 * BLOCK))

    hashes = first.events.stored(prompt)
    second.events.stored(prompt[: 2 * BLOCK])
    await until_scores(indexer, prompt, {"NODE1/team-a.Worker/0": 4, "NODE1/team-a.Worker/1": 2})
    first.events.removed(hashes[:0:-1])
    await until_scores(indexer, prompt, {"NODE1/team-a.Worker/0": 1, "NODE1/team-a.Worker/1": 2})
    second.events.cleared()
    await until_scores(indexer, prompt, {"NODE1/team-a.Worker/0": 1})

    assert (await indexer.find_matches_for_request(prompt, lora_id=5)).scores == {}
    assert indexer.block_size() == BLOCK
    with pytest.raises(FixRequestError, match="has blocks of 4 tokens"):
        await KvIndexer(mesh.runtime.namespace("team-a").component("Worker"), 8).find_matches_for_request(prompt)


async def until_scores(indexer: KvIndexer, prompt: list[int], expected: dict[str, int]) -> None:
    """Wait for what travels on a stream."""
    until = asyncio.get_running_loop().time() + BOUND_S
    while (scores := (await indexer.find_matches_for_request(prompt)).scores) != expected:
        assert asyncio.get_running_loop().time() < until, scores
        await indexer._watch._workers.news.wait(until)


async def test_only_who_is_served_publishes(mesh: ServedComponents) -> None:
    component = mesh.runtime.namespace("team-a").component("Worker")

    with pytest.raises(RuntimeError, match="publish from its own instance"):
        KvMetricsPublisher().create_endpoint(component)
    with pytest.raises(RuntimeError, match="call create_endpoint"):
        KvMetricsPublisher().publish(0, 0, 0, 0, 0, 0.0, 0.0)


async def test_a_config_that_does_not_fit_stops_the_start() -> None:
    with pytest.raises(FixRequestError, match="greeting: Input should be a valid string"):
        async with serving(Worker, config=("Worker.greeting=5",)):
            raise AssertionError("it started")
