"""Who calls a component that nobody can reach, and who looks at a mesh that has nothing but components."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from pydantic import BaseModel

from kvmesh.cli.generate import generate
from kvmesh.cli.options import CommandFailed
from kvmesh.cli.status import status
from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.ids import Epoch
from kvmesh.core.roster import WorkerRecord
from kvmesh.sdk import connect, endpoint, service
from kvmesh.sdk.client import Client
from kvmesh.testing.remote_prefills import NOWHERE
from kvmesh.testing.sdk import ServedComponents, serving

BOUND_S = 20.0
ROUTE_S = 1.0


class Text(BaseModel):
    text: str = ""


@service(namespace="ns")
class Echo:
    @endpoint()
    async def say(self, request: Text) -> Text:
        return request


@pytest.fixture
async def mesh() -> AsyncIterator[ServedComponents]:
    async with serving(Echo, waits__route_s=str(ROUTE_S)) as served:
        yield served


async def client_of(mesh: ServedComponents) -> Client:
    client = await mesh.runtime.namespace("ns").component("Echo").endpoint("say").client()
    await client.wait_for_workers(timeout_s=BOUND_S)
    return client


async def move(mesh: ServedComponents, address: str) -> WorkerRecord:
    """Have discovery say that the instance is there; return the record before."""
    (before,) = mesh.runtime.workers("ns", "Echo")
    await mesh.graph.discovery.register(replace(before, epoch=Epoch(before.epoch + 1), address=address))
    async with asyncio.timeout(BOUND_S):
        while mesh.runtime.workers("ns", "Echo")[0].address != address:
            await mesh.runtime.changed()
    return before


async def answers_of(client: Client) -> list[Any]:
    async with asyncio.timeout(BOUND_S):
        return [answer async for answer in await client.generate({"text": "a"})]


async def test_a_call_waits_for_a_worker_where_none_can_be_reached(
    mesh: ServedComponents, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await client_of(mesh)
    alive = await move(mesh, NOWHERE)
    changed = mesh.runtime.changed
    came_back: list[WorkerRecord] = []

    async def comes_back_once_waited_for() -> None:
        if not came_back:
            came_back.append(replace(alive, epoch=Epoch(alive.epoch + 2)))
            await mesh.graph.discovery.register(came_back[0])
        await changed()

    monkeypatch.setattr(mesh.runtime, "changed", comes_back_once_waited_for)
    answers = await answers_of(client)

    assert answers == [{"text": "a"}]
    assert len(came_back) == 1


async def test_where_none_comes_back_the_wait_ends_with_no_workers(mesh: ServedComponents) -> None:
    client = await client_of(mesh)
    await move(mesh, NOWHERE)

    with pytest.raises(TryElsewhereError, match=r"no worker of ns/Echo can be reached: .* is not reached at") as failed:
        await answers_of(client)

    assert failed.value.reason is Reason.NO_WORKERS


async def test_an_endpoint_that_may_have_run_is_not_waited_for(mesh: ServedComponents) -> None:
    calls: list[bytes] = []

    async def lose(request: bytes, context: Any) -> bytes:
        calls.append(request)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return b""

    handlers: dict[str, Any] = {"say": grpc.unary_unary_rpc_method_handler(lose)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("sdk.ns.echo.Echo", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    client = await client_of(mesh)
    await move(mesh, address)

    with pytest.raises(TryElsewhereError) as failed:
        await answers_of(client)
    await server.stop(None)

    assert failed.value.reason is Reason.WORKER_LOST
    assert len(calls) == 1


async def test_a_door_where_nobody_listens_is_named_and_nothing_else_is_told() -> None:

    async with connect(NOWHERE) as runtime:
        client = await runtime.namespace("ns").component("Echo").endpoint("say").client()
        with pytest.raises(TryElsewhereError, match=f"^cannot reach {NOWHERE}: start a mesh there") as failed:
            await client.generate({}, timeout_s=0.5)

    assert failed.value.reason is Reason.NO_WORKERS
    assert failed.value.__suppress_context__
    assert failed.value.__cause__ is None


async def test_a_door_that_answers_is_not_blamed(mesh: ServedComponents) -> None:
    async with connect(mesh.grpc_address) as runtime:
        nobody = await runtime.namespace("ns").component("Nobody").endpoint("say").client()
        with pytest.raises(TryElsewhereError, match=r"components that run: .*ns/Echo"):
            await nobody.generate({}, timeout_s=2.0)


async def test_status_lists_components_and_not_that_there_are_no_workers(
    mesh: ServedComponents, capsys: pytest.CaptureFixture[str]
) -> None:
    await client_of(mesh)
    (record,) = mesh.runtime.workers("ns", "Echo")

    await asyncio.to_thread(status, as_json=False, target=mesh.grpc_address, timeout=BOUND_S)
    shown = capsys.readouterr().out
    await asyncio.to_thread(status, as_json=True, target=mesh.grpc_address, timeout=BOUND_S)
    told = json.loads(capsys.readouterr().out)

    assert shown.splitlines()[1].split() == ["ns/Echo", "NODE1/ns.Echo/0", record.address, "ready"]
    assert "no workers" not in shown
    assert told["workers"] == []
    assert told["components"] == [
        {
            "component": "ns/Echo",
            "instances": [
                {"id": "NODE1/ns.Echo/0", "epoch": record.epoch, "address": record.address, "state": "ready"}
            ],
        }
    ]


async def test_generate_on_components_alone_says_that_there_are_no_decode_workers(mesh: ServedComponents) -> None:
    with pytest.raises(CommandFailed, match="this mesh has no decode workers"):
        await asyncio.to_thread(
            generate,
            "hi",
            model="",
            max_tokens=None,
            temperature=None,
            no_stream=False,
            explain=False,
            target=mesh.grpc_address,
            timeout=BOUND_S,
        )
