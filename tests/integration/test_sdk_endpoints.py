"""Endpoints that block, the id that a request keeps from component to component, and when instances are found."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
import structlog
from pydantic import BaseModel

from kvmesh.core.errors import FixRequestError, MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.roster import WorkerRecord
from kvmesh.discovery.memory import MemoryDiscovery, MemoryRegistration
from kvmesh.runtime.component_config import read_config
from kvmesh.runtime.component_graph import ComponentGraph
from kvmesh.runtime.settings import load_settings
from kvmesh.sdk import context, depends, endpoint, service
from kvmesh.sdk.client import Client
from kvmesh.sdk.dependencies import graph_of
from kvmesh.testing.sdk import ServedComponents, serving
from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc

if TYPE_CHECKING:
    from kvmesh.v1.worker_control_pb2_grpc import WorkerControlAsyncStub

BOUND_S = 10.0


class Text(BaseModel):
    text: str = ""


class Gate:
    """Where blocked requests of this module's classes wait."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()


GATE = Gate()


@service(namespace="ns")
class Blocking:
    @endpoint()
    def hold(self, request: Text) -> Text:
        """Hold the thread until the gate opens."""
        GATE.entered.release()
        GATE.open.wait(BOUND_S)
        return Text(text=f"{context.worker_id} {request.text}")

    @endpoint()
    def fail(self, request: Text) -> Text:
        if request.text == "foreseen":
            raise FixRequestError(Reason.INVALID_FIELD, "text: not this one", field="text")
        return next(iter(()))

    @endpoint()
    async def answer(self, request: Text) -> Text:
        return request


@service(namespace="ns")
class Named:
    @endpoint()
    async def name(self, request: Text) -> Text:
        structlog.get_logger().info("test.named")
        return Text(text=context.request_id)

    @endpoint()
    def name_in_a_thread(self, request: Text) -> Text:
        return Text(text=context.request_id)


@service(namespace="ns")
class Caller:
    named = depends(Named)

    @endpoint()
    async def name(self, request: Text) -> AsyncIterator[Text]:
        yield Text(text=context.request_id)
        yield await self.named.name(request)
        yield await self.named.name_in_a_thread(request)


@pytest.fixture
async def mesh() -> AsyncIterator[ServedComponents]:
    GATE.__init__()  # type: ignore[misc]  # closed again, for this test
    async with serving(Blocking, Caller) as served:
        try:
            yield served
        finally:
            GATE.open.set()


async def client_of(mesh: ServedComponents, address: str) -> Client:
    component, name = address.split("/")
    return await mesh.runtime.namespace("ns").component(component).endpoint(name).client(answer=Text)


async def texts_of(client: Client, text: str = "", **kwargs: Any) -> list[str]:
    return [answer.text async for answer in await client.generate({"text": text}, **kwargs)]


async def test_a_plain_function_blocks_neither_the_others_nor_itself(mesh: ServedComponents) -> None:
    hold, answer = await client_of(mesh, "Blocking/hold"), await client_of(mesh, "Blocking/answer")
    held = [asyncio.create_task(texts_of(hold, text)) for text in "ab"]
    for _ in held:
        assert await asyncio.to_thread(GATE.entered.acquire, timeout=BOUND_S)

    meanwhile = await texts_of(answer, "c", timeout_s=BOUND_S)
    GATE.open.set()
    found = [await one for one in held]

    assert meanwhile == ["c"]
    assert found == [["NODE1/ns.Blocking/0 a"], ["NODE1/ns.Blocking/0 b"]]


async def test_the_caller_of_a_plain_function_waits_no_longer_than_it_said(mesh: ServedComponents) -> None:
    hold = await client_of(mesh, "Blocking/hold")

    with pytest.raises(OutOfTimeError):
        await texts_of(hold, timeout_s=0.2)


async def test_errors_of_a_plain_function_are_those_of_an_async_one(mesh: ServedComponents) -> None:
    fail = await client_of(mesh, "Blocking/fail")

    with pytest.raises(FixRequestError) as foreseen:
        await texts_of(fail, "foreseen")
    with pytest.raises(MeshError) as unforeseen:
        await texts_of(fail, "StopIteration", timeout_s=BOUND_S)

    assert foreseen.value.field == "text"
    assert unforeseen.value.reason is Reason.INTERNAL


async def test_a_request_keeps_its_id_from_component_to_component(mesh: ServedComponents) -> None:
    client = await client_of(mesh, "Caller/name")

    first, second = await texts_of(client), await texts_of(client)

    assert len(set(first)) == len(set(second)) == 1
    assert "" not in first
    assert first[0] != second[0]


async def test_a_request_of_a_door_keeps_its_id_to_the_last_component(mesh: ServedComponents) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        async with httpx.AsyncClient(base_url=mesh.http_url, trust_env=False) as http:
            by_rest = await http.post("/sdk/v1/ns/Caller/name", json={})
        async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
            name: Any = channel.unary_stream("/sdk.ns.caller.Caller/name", None, None)
            call = name(b"", timeout=BOUND_S)
            told = dict(await call.initial_metadata())["x-request-id"]
            by_grpc = [answer async for answer in call]

    logged = [line["request_id"] for line in logs if line["event"] == "test.named"]
    assert by_rest.text.count(by_rest.headers["x-request-id"]) == 3
    assert [told.encode() in answer for answer in by_grpc] == [True] * 3
    assert logged == [by_rest.headers["x-request-id"], told]


async def test_a_drained_instance_is_told_of_and_an_undrained_one_is_called_again(
    mesh: ServedComponents,
) -> None:
    client = await client_of(mesh, "Blocking/answer")
    (worker_id,) = await client.wait_for_workers()
    (role,) = [role for role in mesh.graph.roles if role.name == worker_id]
    async with grpc.aio.insecure_channel(role.address) as channel:
        control: WorkerControlAsyncStub = worker_control_pb2_grpc.WorkerControlStub(channel)
        await control.Drain(worker_control_pb2.DrainRequest(), timeout=BOUND_S)
        async with asyncio.timeout(BOUND_S):
            while client.worker_ids():
                await mesh.runtime.changed()
        with pytest.raises(TryElsewhereError) as refused:
            await client.generate({}, timeout_s=0.1)
        answer = await control.Undrain(worker_control_pb2.UndrainRequest(), timeout=BOUND_S)

    assert refused.value.reason is Reason.NO_WORKERS
    assert "0 workers of ns/Blocking take requests, 1 are wanted; draining: 1;" in refused.value.message
    assert f"`kvmesh undrain {worker_id}`" in refused.value.message
    assert answer.was_draining
    assert await client.wait_for_workers() == [worker_id]
    assert await texts_of(client, "again") == ["again"]


class SlowStore(MemoryDiscovery):
    """Holds a record only once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = asyncio.Event()

    async def register(self, record: WorkerRecord) -> MemoryRegistration:
        registration = await super().register(record)
        setattr(registration, "wait_registered", self.holds.wait)  # noqa: B010  # as a store that is away does
        return registration


async def test_a_graph_is_ready_once_the_store_has_its_records() -> None:
    settings = load_settings(overrides={"http.port": 0, "grpc.port": 0}).settings
    graph = ComponentGraph(read_config(graph_of(Named), file=None, flags=()), settings)
    store = SlowStore()
    for role in graph.roles:
        role._discovery = store
    for role in graph.roles:
        await role.start()
    ready = asyncio.ensure_future(graph.wait_ready())
    await asyncio.wait({ready}, timeout=0.05)
    was_ready = ready.done()

    store.holds.set()
    async with asyncio.timeout(BOUND_S):
        await ready
    for role in graph.roles:
        await role.stop()
    await graph.stop()

    assert not was_ready
