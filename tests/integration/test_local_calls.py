"""Streams within one process: what a client and a handler see is what they would see over gRPC."""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from kvmesh.core.errors import NotKnownError, Reason
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.local_calls import LocalServers
from kvmesh.v1 import decode_worker_pb2, decode_worker_pb2_grpc, worker_events_pb2, worker_events_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

BOUND_S = 10.0
ADDRESS = "127.0.0.1:1"

Load = worker_events_pb2.WatchLoadResponse
Frame = decode_worker_pb2.ExchangeResponse
Command = decode_worker_pb2.ExchangeRequest
Behaviour = Callable[[Any, Any], Any]


class ScriptedEvents(worker_events_pb2_grpc.WorkerEventsServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    def WatchLoad(self, request: Any, context: Any) -> Any:
        return self._behaviour(request, context)

    def WatchKvEvents(self, request: Any, context: Any) -> Any:
        raise AssertionError("not scripted")


class ScriptedExchange(decode_worker_pb2_grpc.DecodeWorkerServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    def Generate(self, request: Any, context: Any) -> Any:
        raise AssertionError("not scripted")

    def Exchange(self, request_iterator: Any, context: Any) -> Any:
        return self._behaviour(request_iterator, context)


def watch(server: GrpcServer, behaviour: Behaviour) -> Any:
    server.add(
        ScriptedEvents(behaviour), "kvmesh.v1.WorkerEvents", worker_events_pb2_grpc.add_WorkerEventsServicer_to_server
    )
    return worker_events_pb2_grpc.WorkerEventsStub(local_channel(server)).WatchLoad(
        worker_events_pb2.WatchLoadRequest(router_id="router-1"), wait_for_ready=True
    )


def exchange(server: GrpcServer, behaviour: Behaviour) -> Any:
    server.add(
        ScriptedExchange(behaviour), "kvmesh.v1.DecodeWorker", decode_worker_pb2_grpc.add_DecodeWorkerServicer_to_server
    )
    return decode_worker_pb2_grpc.DecodeWorkerStub(local_channel(server)).Exchange()


def local_channel(server: GrpcServer) -> Any:
    servers = LocalServers()
    servers.add(ADDRESS, server.stream_handler)
    return servers.channel(ADDRESS)


def command(stream_id: int) -> Command:
    return Command(cancel=decode_worker_pb2.ExchangeCancel(stream_id=stream_id))


async def test_a_handler_gets_the_request_and_its_responses_arrive_in_order() -> None:
    async def behaviour(request: Any, _context: Any) -> AsyncIterator[Load]:
        for sequence in range(3):
            yield Load(worker_id=request.router_id, sequence=sequence)

    call = watch(GrpcServer(), behaviour)

    async with asyncio.timeout(BOUND_S):
        heard = [(load.worker_id, load.sequence) async for load in call]

    assert heard == [("router-1", 0), ("router-1", 1), ("router-1", 2)]


async def test_both_directions_flow_and_the_end_follows_the_last_message() -> None:
    async def behaviour(commands: Any, context: Any) -> None:
        for _ in range(2):
            taken = await anext(commands)
            frame = Frame()
            frame.accepted.add(stream_id=taken.cancel.stream_id)
            await context.write(frame)

    call = exchange(GrpcServer(), behaviour)

    async with asyncio.timeout(BOUND_S):
        await call.write(command(7))
        await call.write(command(8))
        frames = [await call.read(), await call.read()]
        end = await call.read()

    assert [frame.accepted[0].stream_id for frame in frames] == [7, 8]
    assert end is grpc.aio.EOF
    with pytest.raises(asyncio.InvalidStateError):
        await call.write(command(9))


async def test_a_writer_is_one_message_ahead_of_its_reader() -> None:
    written: list[int] = []
    wrote = asyncio.Event()

    async def behaviour(_commands: Any, context: Any) -> None:
        for number in range(3):
            await context.write(Frame())
            written.append(number)
            wrote.set()

    call = exchange(GrpcServer(), behaviour)

    async with asyncio.timeout(BOUND_S):
        await wrote.wait()
        before_the_read = list(written)
        wrote.clear()
        await call.read()
        await wrote.wait()
        after_the_read = list(written)

    assert before_the_read == [0]
    assert after_the_read == [0, 1]
    call.cancel()


async def test_an_error_arrives_as_the_catalog_has_it_after_what_was_said_before() -> None:
    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[Load]:
        yield Load(sequence=1)
        raise NotKnownError(Reason.NOT_FOUND, "no such worker: w-1")

    call = watch(GrpcServer(), behaviour)

    async with asyncio.timeout(BOUND_S):
        first = await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()

    assert first.sequence == 1
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert from_rpc_error(caught.value).reason is Reason.NOT_FOUND


async def test_a_cancelled_call_ends_its_handler_and_counts_no_more() -> None:
    server = GrpcServer()
    ended = asyncio.Event()

    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[Load]:
        try:
            yield Load()
            await asyncio.Event().wait()
        finally:
            ended.set()

    call = watch(server, behaviour)
    await server.start("127.0.0.1", 0)

    async with asyncio.timeout(BOUND_S):
        await call.read()
        open_before = server.open_calls
        call.cancel()
        await ended.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        await server.drain_and_stop(BOUND_S)

    assert open_before == 1
    assert server.open_calls == 0
    assert caught.value.code() is grpc.StatusCode.CANCELLED


async def test_a_server_that_stops_ends_its_local_calls_with_draining() -> None:
    server = GrpcServer()

    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[Load]:
        yield Load()
        await asyncio.Event().wait()

    call = watch(server, behaviour)
    await server.start("127.0.0.1", 0)

    async with asyncio.timeout(BOUND_S):
        await call.read()
        await server.drain_and_stop(0.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()

    assert from_rpc_error(caught.value).reason is Reason.DRAINING


async def test_a_handler_does_not_inherit_the_log_context_of_who_opened_the_call() -> None:
    of_the_opener: contextvars.ContextVar[str] = contextvars.ContextVar("of_the_opener", default="none")
    of_the_opener.set("the opener's")

    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[Load]:
        yield Load(worker_id=of_the_opener.get())

    call = watch(GrpcServer(), behaviour)

    async with asyncio.timeout(BOUND_S):
        heard = await call.read()

    assert heard.worker_id == "none"


def test_a_server_that_left_is_not_found() -> None:
    servers = LocalServers()
    servers.add(ADDRESS, GrpcServer().stream_handler)

    servers.remove(ADDRESS)
    servers.remove(ADDRESS)

    assert servers.channel(ADDRESS) is None


def test_a_method_that_no_service_has_is_refused() -> None:
    with pytest.raises(LookupError):
        GrpcServer().stream_handler("/kvmesh.v1.DecodeWorker/Exchange")
