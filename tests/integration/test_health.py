"""grpc.health.v1 as a stock client sees it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.runtime.server import GrpcServer
from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc

GENEROUS_S = 10.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class SilentControl(worker_control_pb2_grpc.WorkerControlServicer):
    async def Undrain(self, request: Any, context: Any) -> worker_control_pb2.UndrainResponse:
        raise AssertionError("nobody asks")

    async def GetInfo(self, request: Any, context: Any) -> worker_control_pb2.GetInfoResponse:
        return worker_control_pb2.GetInfoResponse()

    async def Drain(self, request: Any, context: Any) -> worker_control_pb2.DrainResponse:
        return worker_control_pb2.DrainResponse()


def add_control(server: GrpcServer, *, serving: bool = True) -> None:
    server.add(
        SilentControl(),
        "kvmesh.v1.WorkerControl",
        worker_control_pb2_grpc.add_WorkerControlServicer_to_server,
        serving=serving,
    )


@pytest.fixture
async def server() -> AsyncIterator[GrpcServer]:
    server = GrpcServer()
    add_control(server)
    await server.start("127.0.0.1", 0)
    yield server
    await server.drain_and_stop(GENEROUS_S)


@pytest.fixture
async def stub(server: GrpcServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def check(stub: Any, service: str) -> Any:
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=GENEROUS_S)).status


def watch(stub: Any, service: str) -> Any:
    return stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=GENEROUS_S)


@pytest.mark.parametrize("service", ["", "kvmesh.v1.WorkerControl"])
async def test_started_server_serves_its_services_and_is_alive(stub: Any, service: str) -> None:
    assert await check(stub, service) == SERVING


async def test_check_of_an_unknown_service_is_not_found(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(stub, "kvmesh.v1.Nowhere")

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_of_an_unknown_service_stays_open_until_it_is_known(server: GrpcServer, stub: Any) -> None:
    call = watch(stub, "kvmesh.v1.Late")
    first = (await call.read()).status

    server.health.set_serving("kvmesh.v1.Late", True)
    second = (await call.read()).status

    assert (first, second) == (SERVICE_UNKNOWN, SERVING)
    call.cancel()


async def test_watch_sends_changes_and_nothing_twice(server: GrpcServer, stub: Any) -> None:
    call = watch(stub, "kvmesh.v1.WorkerControl")
    seen = [(await call.read()).status]

    server.health.set_serving("kvmesh.v1.WorkerControl", True)
    server.health.set_serving("kvmesh.v1.Other", False)
    server.health.set_serving("kvmesh.v1.WorkerControl", False)
    seen.append((await call.read()).status)
    server.health.set_serving("kvmesh.v1.WorkerControl", True)
    seen.append((await call.read()).status)

    assert seen == [SERVING, NOT_SERVING, SERVING]
    call.cancel()


async def test_service_that_lost_what_it_needs_does_not_take_liveness_along(server: GrpcServer, stub: Any) -> None:
    server.health.set_serving("kvmesh.v1.WorkerControl", False)

    assert await check(stub, "kvmesh.v1.WorkerControl") == NOT_SERVING
    assert await check(stub, "") == SERVING


async def test_service_that_is_not_ready_at_the_start_waits_to_be_set() -> None:
    server = GrpcServer()
    add_control(server, serving=False)
    await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        before = await check(stub, "kvmesh.v1.WorkerControl")
        server.health.set_serving("kvmesh.v1.WorkerControl", True)
        after = await check(stub, "kvmesh.v1.WorkerControl")
    await server.drain_and_stop(GENEROUS_S)

    assert (before, after) == (NOT_SERVING, SERVING)


async def test_draining_is_not_serving_whatever_is_told_until_it_is_undone(server: GrpcServer, stub: Any) -> None:
    watched = watch(stub, "kvmesh.v1.WorkerControl")
    await watched.read()

    server.health.drain()
    server.health.set_serving("kvmesh.v1.WorkerControl", True)
    server.health.set_serving("kvmesh.v1.Late", True)

    while_draining = [await check(stub, name) for name in ("", "kvmesh.v1.WorkerControl", "kvmesh.v1.Late")]
    told = (await watched.read()).status
    server.health.set_serving("kvmesh.v1.Late", False)
    server.health.undrain()

    assert (told, while_draining) == (NOT_SERVING, [NOT_SERVING] * 3)
    assert (await watched.read()).status == SERVING
    assert [await check(stub, name) for name in ("", "kvmesh.v1.WorkerControl")] == [SERVING] * 2
    assert await check(stub, "kvmesh.v1.Late") == NOT_SERVING
    watched.cancel()


async def test_list_shows_every_service(server: GrpcServer, stub: Any) -> None:
    server.health.set_serving("kvmesh.v1.Other", False)

    listed = (await stub.List(health_pb2.HealthListRequest(), timeout=GENEROUS_S)).statuses

    assert {name: response.status for name, response in listed.items()} == {
        "liveness": SERVING,
        "": SERVING,
        "kvmesh.v1.WorkerControl": SERVING,
        "kvmesh.v1.Other": NOT_SERVING,
    }


async def test_many_watchers_all_hear_of_one_change(server: GrpcServer, stub: Any) -> None:
    calls = [watch(stub, "kvmesh.v1.WorkerControl") for _ in range(20)]
    await asyncio.gather(*(call.read() for call in calls))

    server.health.set_serving("kvmesh.v1.WorkerControl", False)
    seen = await asyncio.gather(*(call.read() for call in calls))

    assert [response.status for response in seen] == [NOT_SERVING] * 20
    for call in calls:
        call.cancel()
