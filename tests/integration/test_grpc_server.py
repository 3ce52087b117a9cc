"""The life of one server: what it lists, where it listens, and how it ends whatever its clients do."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from kvmesh.runtime import server as server_module
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.channels import PortTakenError
from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc

GENEROUS_S = 10.0
LOOPBACK = "127.0.0.1"
CONTROL = worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"]
INFO_REQUEST = worker_control_pb2.GetInfoRequest()

Info = worker_control_pb2.GetInfoResponse
Behaviour = Callable[[Any, Any], Awaitable[Info]]


class Control(worker_control_pb2_grpc.WorkerControlServicer):
    """GetInfo does what the test says; Drain answers at once."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    async def Undrain(self, request: Any, context: Any) -> worker_control_pb2.UndrainResponse:
        raise AssertionError("nobody asks")

    async def GetInfo(self, request: Any, context: Any) -> Info:
        return await self._behaviour(request, context)

    async def Drain(self, request: Any, context: Any) -> worker_control_pb2.DrainResponse:
        return worker_control_pb2.DrainResponse()


class Gate:
    """A handler that tells when it was entered and cleaned up, and waits to be let go."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.let_go = asyncio.Event()
        self.cleaned = asyncio.Event()

    async def __call__(self, _request: Any, _context: Any) -> Info:
        try:
            self.entered.set()
            await self.let_go.wait()
            return Info(worker_id="answered")
        finally:
            self.cleaned.set()


async def answer(_request: Any, _context: Any) -> Info:
    return Info(worker_id="answered")


def control_server(behaviour: Behaviour = answer) -> GrpcServer:
    server = GrpcServer()
    server.add(Control(behaviour), CONTROL, worker_control_pb2_grpc.add_WorkerControlServicer_to_server)
    return server


def control_stub(channel: grpc.aio.Channel) -> "worker_control_pb2_grpc.WorkerControlAsyncStub":
    return worker_control_pb2_grpc.WorkerControlStub(channel)


@asynccontextmanager
async def channel_to(server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    await server.start(LOOPBACK, 0)
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel
    await server.drain_and_stop(0.1)


def reasons(error: grpc.aio.AioRpcError) -> list[str]:
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    return [info.reason for detail in status.details if detail.Unpack(info)] if status else []


async def reflect(channel: grpc.aio.Channel, **request: str) -> Any:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(timeout=GENEROUS_S)
    await call.write(reflection_pb2.ServerReflectionRequest(**request))
    await call.done_writing()
    return await call.read()


async def test_reflection_lists_every_service_and_health() -> None:
    async with channel_to(control_server()) as channel:
        response = await reflect(channel, list_services="")

    assert [service.name for service in response.list_services_response.service] == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "kvmesh.v1.WorkerControl",
    ]


async def test_reflection_describes_a_service_by_its_name() -> None:
    async with channel_to(control_server()) as channel:
        response = await reflect(channel, file_containing_symbol="kvmesh.v1.WorkerControl")

    files = [FileDescriptorProto.FromString(data) for data in response.file_descriptor_response.file_descriptor_proto]
    (described,) = [file for file in files if file.name == "kvmesh/v1/worker_control.proto"]
    assert [method.name for method in described.service[0].method] == ["Drain", "Undrain", "GetInfo"]


async def test_message_beyond_the_default_limit_of_grpc_arrives() -> None:
    long_id = "w" * (8 * 1024 * 1024)

    async def answer_at_length(_request: Any, _context: Any) -> Info:
        return Info(worker_id=long_id)

    server = control_server(answer_at_length)
    await server.start(LOOPBACK, 0)
    async with grpc.aio.insecure_channel(
        server.address, options=(("grpc.max_receive_message_length", 16 * 1024 * 1024),)
    ) as channel:
        response = await control_stub(channel).GetInfo(INFO_REQUEST, timeout=GENEROUS_S)
    await server.drain_and_stop(GENEROUS_S)

    assert response.worker_id == long_id


async def test_start_returns_the_port_that_the_address_shows() -> None:
    server = control_server()

    port = await server.start(LOOPBACK, 0)

    assert server.address == f"127.0.0.1:{port}"
    await server.drain_and_stop(GENEROUS_S)


async def test_address_of_an_ipv6_host_is_in_brackets() -> None:
    server = control_server()
    try:
        port = await server.start("::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")

    async with grpc.aio.insecure_channel(server.address) as channel:
        response = await control_stub(channel).GetInfo(INFO_REQUEST, timeout=GENEROUS_S)

    assert (server.address, response.worker_id) == (f"[::1]:{port}", "answered")
    await server.drain_and_stop(GENEROUS_S)


async def test_address_before_the_start_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not started"):
        _ = GrpcServer().address


async def test_second_server_on_one_port_is_refused_and_may_take_another() -> None:
    first, second = control_server(), control_server()
    port = await first.start(LOOPBACK, 0)

    with pytest.raises(PortTakenError) as caught:
        await second.start(LOOPBACK, port, flag="--decode-port")
    other = await second.start(LOOPBACK, 0)

    assert (caught.value.host, caught.value.port) == (LOOPBACK, port)
    assert f"port {port} on 127.0.0.1 is taken" in str(caught.value)
    assert "--decode-port" in str(caught.value)
    assert other != port
    await asyncio.gather(first.drain_and_stop(GENEROUS_S), second.drain_and_stop(GENEROUS_S))


async def test_port_is_taken_when_only_one_address_of_the_name_is() -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as listener:
        port = listener.getsockname()[1]

        with pytest.raises(PortTakenError):
            await control_server().start("localhost", port)


async def test_port_is_not_shared_with_a_process_that_offers_to() -> None:
    server = control_server()
    port = await server.start(LOOPBACK, 0)

    with closing(socket.socket()) as sharer:
        sharer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            sharer.bind((LOOPBACK, port))

    await server.drain_and_stop(GENEROUS_S)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_host_that_is_not_this_machine_is_refused_by_name(host: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {host}") as caught:
        await control_server().start(host, 0)

    assert not isinstance(caught.value, PortTakenError)


async def test_service_is_added_once_and_before_the_start() -> None:
    server = control_server()

    with pytest.raises(ValueError, match="added already"):
        server.add(Control(answer), CONTROL, worker_control_pb2_grpc.add_WorkerControlServicer_to_server)
    await server.start(LOOPBACK, 0)
    with pytest.raises(RuntimeError, match="too late"):
        server.add(Control(answer), "kvmesh.v1.Other", worker_control_pb2_grpc.add_WorkerControlServicer_to_server)
    with pytest.raises(RuntimeError, match="started already"):
        await server.start(LOOPBACK, 0)

    await server.drain_and_stop(GENEROUS_S)


async def test_open_call_gets_its_grace_and_its_answer() -> None:
    gate = Gate()
    server = control_server(gate)
    async with channel_to(server) as channel:
        call = control_stub(channel).GetInfo(INFO_REQUEST, timeout=GENEROUS_S)
        await gate.entered.wait()

        async with asyncio.TaskGroup() as group:
            stop = group.create_task(server.drain_and_stop(GENEROUS_S))
            await control_stub(channel).Drain(worker_control_pb2.DrainRequest(), timeout=GENEROUS_S)
            was_waiting = not stop.done() and not gate.cleaned.is_set()
            gate.let_go.set()

        response = await call

    assert was_waiting
    assert response.worker_id == "answered"


async def test_call_that_outlasts_the_grace_is_cancelled_and_told_why() -> None:
    gate = Gate()
    server = control_server(gate)
    async with channel_to(server) as channel:
        call = control_stub(channel).GetInfo(INFO_REQUEST, timeout=GENEROUS_S)
        await gate.entered.wait()

        await server.drain_and_stop(0.05)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reasons(caught.value) == ["DRAINING"]
    assert gate.cleaned.is_set()
    assert server.open_calls == 0


async def test_most_impatient_stop_wins() -> None:
    gate = Gate()
    server = control_server(gate)
    async with channel_to(server) as channel:
        call = control_stub(channel).GetInfo(INFO_REQUEST, timeout=60)
        await gate.entered.wait()

        async with asyncio.timeout(GENEROUS_S), asyncio.TaskGroup() as group:
            group.create_task(server.drain_and_stop(60))
            group.create_task(server.drain_and_stop(0.05))

        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_watchers_hear_of_the_drain_and_do_not_delay_the_stop() -> None:
    server = control_server()
    async with channel_to(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=CONTROL.full_name))
        before = await watch.read()

        async with asyncio.timeout(GENEROUS_S):
            await server.drain_and_stop(60)
        after = await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()

    assert (before.status, after.status) == (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    assert reasons(caught.value) == ["DRAINING"]


async def test_idle_reflection_client_does_not_delay_the_stop() -> None:
    server = control_server()
    async with channel_to(server) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.read()

        async with asyncio.timeout(GENEROUS_S):
            await server.drain_and_stop(60)

        assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_handler_that_refuses_to_end_does_not_hold_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "CLEANUP_S", 0.1)
    entered, let_go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def refuse_to_end(_request: Any, _context: Any) -> Info:
        entered.set()
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        ended.set()
        return Info()

    server = control_server(refuse_to_end)
    async with channel_to(server) as channel:
        call = control_stub(channel).GetInfo(INFO_REQUEST, timeout=60)
        await entered.wait()

        async with asyncio.timeout(GENEROUS_S):
            await server.drain_and_stop(0.05)
        held_at_the_stop = server.open_calls

        with pytest.raises(grpc.aio.AioRpcError):
            await call
        let_go.set()
        await ended.wait()

    assert held_at_the_stop == 1


async def test_stop_is_idempotent_and_needs_no_start() -> None:
    never_started, server = control_server(), control_server()
    port = await server.start(LOOPBACK, 0)

    await never_started.drain_and_stop(GENEROUS_S)
    await server.drain_and_stop(GENEROUS_S)
    await server.drain_and_stop(GENEROUS_S)

    successor = control_server()
    assert await successor.start(LOOPBACK, port) == port
    await successor.drain_and_stop(GENEROUS_S)


async def test_a_request_longer_than_the_limit_is_refused() -> None:
    server = GrpcServer(max_request_bytes=1_024)
    server.add(Control(answer), CONTROL, worker_control_pb2_grpc.add_WorkerControlServicer_to_server)
    async with channel_to(server) as channel:
        await control_stub(channel).GetInfo(worker_control_pb2.GetInfoRequest(worker_id="w" * 900), timeout=GENEROUS_S)

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await control_stub(channel).GetInfo(
                worker_control_pb2.GetInfoRequest(worker_id="w" * 2_000), timeout=GENEROUS_S
            )

    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
