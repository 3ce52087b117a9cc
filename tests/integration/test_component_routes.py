"""What a gateway serves for components: by their records, in nobody's place, within bounds."""

import asyncio
import base64
import zlib
from collections.abc import AsyncIterator
from itertools import count

import grpc
import httpx
import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import BaseModel
from structlog.testing import capture_logs

from kvmesh import telemetry
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.discovery import Registration
from kvmesh.sdk import endpoint, service
from kvmesh.sdk.contract import contract_of
from kvmesh.sdk.definitions import definition_of
from kvmesh.testing.sdk import ServedComponents, serving
from kvmesh.v1 import frontend_pb2

BOUND_S = 10.0
NOWHERE = "127.0.0.1:9"


class Text(BaseModel):
    text: str = ""


class Gate:
    """Holds the calls of this module."""

    def __init__(self) -> None:
        self.entered = asyncio.Semaphore(0)
        self.opened = asyncio.Event()


GATE = Gate()


@service(namespace="held")
class Held:
    @endpoint()
    async def one(self, request: Text) -> Text:
        GATE.entered.release()
        await GATE.opened.wait()
        return request

    @endpoint()
    async def many(self, request: Text) -> AsyncIterator[Text]:
        yield request
        GATE.entered.release()
        await GATE.opened.wait()
        yield request


@service(namespace="a-b", name="W")
class Dashed:
    @endpoint()
    async def dashed(self, request: Text) -> Text:
        return request


@service(namespace="a_b", name="W")
class Underscored:
    @endpoint()
    async def underscored(self, request: Text) -> Text:
        return request


@service(namespace="later", name="V")
class Before:
    @endpoint()
    async def kept(self, request: Text) -> Text:
        return request

    @endpoint()
    async def dropped(self, request: Text) -> Text:
        return request


@service(namespace="later", name="V")
class After:
    @endpoint()
    async def kept(self, request: Text) -> Text:
        return request


@pytest.fixture
async def mesh() -> AsyncIterator[ServedComponents]:
    GATE.__init__()  # type: ignore[misc]  # of this test's loop
    async with serving(Held) as served:
        yield served


EPOCHS = count(1)


async def registered(mesh: ServedComponents, address: tuple[str, str], contract: str) -> Registration:
    """Put an instance in discovery that no process is behind."""
    namespace, component = address
    epoch = next(EPOCHS)
    metadata = {"sdk.namespace": namespace, "sdk.component": component, "sdk.contract": contract}
    return await mesh.graph.discovery.register(
        WorkerRecord(
            worker_id=WorkerId(f"elsewhere/{epoch}"), epoch=Epoch(epoch), role=WorkerRole.COMPONENT, models=(),
            namespace=mesh.runtime._namespace, block_size=1, address=NOWHERE, metadata=metadata,
        )
    )  # fmt: skip


def contract_text_of(cls: type) -> str:
    return contract_of(definition_of(cls)).encode()


def encoded(*files: FileDescriptorProto) -> str:
    return base64.b64encode(zlib.compress(FileDescriptorSet(file=files).SerializeToString())).decode()


def contract_with_path(path: str) -> str:
    """Return the contract of `Dashed` with another path."""
    file = FileDescriptorProto()
    file.CopyFrom(contract_of(definition_of(Dashed)).file)
    file.service[0].method[0].options.Extensions[annotations_pb2.http].post = path
    return encoded(file)


def contract_of_the_frontend() -> str:
    files: dict[str, FileDescriptorProto] = {}

    def add(file: FileDescriptor) -> None:
        if file.name not in files:
            for dependency in file.dependencies:
                add(dependency)
            files[file.name] = FileDescriptorProto()
            file.CopyToProto(files[file.name])

    add(frontend_pb2.DESCRIPTOR)
    return encoded(*files.values())


async def all_seen(mesh: ServedComponents) -> None:
    """Wait until the gateway has seen what discovery says so far: until what came last is served."""
    space = f"n{next(EPOCHS)}"

    @service(namespace=space)
    class Last:
        @endpoint()
        async def say(self, request: Text) -> Text:
            return request

    await registered(mesh, (space, "Last"), contract_text_of(Last))
    async with asyncio.timeout(BOUND_S):
        await mesh.graph._gateway.wait_routed([f"sdk.{space}.last.Last"])  # type: ignore[union-attr]  # it has doors


def unary(channel: grpc.aio.Channel, path: str) -> "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]":
    return channel.unary_unary(path)


async def code_of(mesh: ServedComponents, path: str) -> grpc.StatusCode:
    """Call a method at the gRPC door, with an empty request."""
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        return await unary(channel, path)(b"", timeout=BOUND_S).code()


async def reflected(mesh: ServedComponents) -> set[str]:
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        async for answer in call:
            return {one.name for one in answer.list_services_response.service}
    return set()


def waits_ended() -> float:
    return float(telemetry.WAIT_ENDED.labels(wait="request_s")._value.get())


@pytest.mark.parametrize(
    ("address", "contract", "why"),
    [
        pytest.param(("a", "Frontend"), contract_of_the_frontend(), "not the service of", id="another's service"),
        pytest.param(("a-c", "W"), contract_text_of(Dashed), "not the service of", id="another component's"),
        pytest.param(("a-b", "W"), contract_with_path("/mesh/v1/topology"), "not below", id="another's path"),
        pytest.param(("a-b", "W"), contract_with_path("/sdk/v1/held/Held/one"), "not below", id="another's endpoint"),
        pytest.param(("a-b", "W"), "bm90aGluZw==", "no contract", id="no contract at all"),
    ],
)
async def test_a_record_takes_nobody_s_place(
    mesh: ServedComponents, address: tuple[str, str], contract: str, why: str
) -> None:
    with capture_logs() as logs:
        stranger = await registered(mesh, address, contract)
        await all_seen(mesh)
        async with httpx.AsyncClient(base_url=mesh.http_url, trust_env=False) as client:
            while_there = await client.get("/mesh/v1/topology")
            await stranger.stop()
            await all_seen(mesh)
            after = await client.get("/mesh/v1/topology")

    refused = [line for line in logs if line["event"] == "component.refused"]
    assert (while_there.status_code, after.status_code) == (200, 200)
    assert [line["component"] for line in refused] == ["/".join(address)]
    assert why in refused[0]["detail"]
    assert "kvmesh.v1.Frontend" in await reflected(mesh)


async def test_of_two_components_of_one_name_who_has_it_keeps_it(mesh: ServedComponents) -> None:
    dashed, underscored = "/sdk.a_b.w.W/dashed", "/sdk.a_b.w.W/underscored"
    with capture_logs() as logs:
        first = await registered(mesh, ("a_b", "W"), contract_text_of(Underscored))
        await all_seen(mesh)
        await registered(mesh, ("a-b", "W"), contract_text_of(Dashed))
        for _ in range(3):  # every change has it looked at again
            await all_seen(mesh)
        while_both = [await code_of(mesh, path) for path in (underscored, dashed)]
        await first.stop()
        await all_seen(mesh)
        alone = [await code_of(mesh, path) for path in (underscored, dashed)]

    refused = [line for line in logs if line["event"] == "component.refused"]
    assert while_both == [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED]
    assert alone == [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE]
    assert [(line["component"], "that of a_b/W" in line["detail"]) for line in refused] == [("a-b/W", True)]


async def test_an_endpoint_that_a_newer_contract_has_not_is_gone(mesh: ServedComponents) -> None:
    await registered(mesh, ("later", "V"), contract_text_of(Before))
    await all_seen(mesh)
    before = [await code_of(mesh, f"/sdk.later.v.V/{name}") for name in ("kept", "dropped")]

    await registered(mesh, ("later", "V"), contract_text_of(After))
    await all_seen(mesh)
    after = [await code_of(mesh, f"/sdk.later.v.V/{name}") for name in ("kept", "dropped")]
    assert before == [grpc.StatusCode.UNAVAILABLE] * 2
    assert after == [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED]


async def test_a_call_without_a_deadline_has_that_of_any_request() -> None:
    GATE.__init__()  # type: ignore[misc]  # of this test's loop
    ended_before = waits_ended()
    async with (
        serving(Held, waits__request_s=0.3) as mesh,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
        asyncio.timeout(BOUND_S),
    ):
        one = unary(channel, "/sdk.held.held.Held/one")(b"")
        watch: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/sdk.held.held.Held/many")
        many = watch(b"")
        await many.read()
        codes = [await one.code(), await many.code()]
        GATE.opened.set()

    assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * 2
    assert waits_ended() == ended_before + 2


async def test_a_door_that_drains_lets_calls_of_components_end(mesh: ServedComponents) -> None:
    async with (
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
        httpx.AsyncClient(base_url=mesh.http_url, trust_env=False) as client,
        asyncio.timeout(BOUND_S),
    ):
        posted = asyncio.create_task(client.post("/sdk/v1/held/Held/many", json={"text": "a"}))
        one = unary(channel, "/sdk.held.held.Held/one")(b"")
        for _ in range(2):
            await GATE.entered.acquire()
        gateway = mesh.graph._gateway
        assert gateway is not None
        stopping = asyncio.create_task(gateway.stop())
        refused = await code_of(mesh, "/sdk.held.held.Held/one")
        is_held = not stopping.done() and not posted.done()
        GATE.opened.set()
        code, response = await one.code(), await posted
        await stopping

    assert refused is grpc.StatusCode.UNAVAILABLE
    assert is_held
    assert code is grpc.StatusCode.OK
    assert response.text.count("result") == 2
