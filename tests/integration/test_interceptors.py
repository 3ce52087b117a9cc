"""What a client sees of a call, and what a handler sees of its end: real server, real channel, scripted handlers."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from prometheus_client import REGISTRY

from kvmesh import telemetry
from kvmesh.core.errors import BackOffError, FixRequestError, MeshError, NotKnownError, Reason, TryElsewhereError
from kvmesh.runtime.server import GrpcServer
from kvmesh.v1 import (
    decode_worker_pb2,
    decode_worker_pb2_grpc,
    generation_pb2,
    worker_control_pb2,
    worker_control_pb2_grpc,
    worker_events_pb2,
    worker_events_pb2_grpc,
)

GENEROUS_S = 10.0
SECRET = "the key under the mat"

Info = worker_control_pb2.GetInfoResponse
Load = worker_events_pb2.WatchLoadResponse
Unary = Callable[[Any, Any], Awaitable[Info]]
Stream = Callable[[Any, Any], Any]
Detail = TypeVar("Detail", error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)


class ScriptedControl(worker_control_pb2_grpc.WorkerControlServicer):
    def __init__(self, behaviour: Unary) -> None:
        self._behaviour = behaviour

    async def Undrain(self, request: Any, context: Any) -> worker_control_pb2.UndrainResponse:
        raise AssertionError("nobody asks")

    async def GetInfo(self, request: Any, context: Any) -> Info:
        return await self._behaviour(request, context)

    async def Drain(self, request: Any, context: Any) -> worker_control_pb2.DrainResponse:
        raise AssertionError("not scripted")


class ScriptedEvents(worker_events_pb2_grpc.WorkerEventsServicer):
    def __init__(self, behaviour: Stream) -> None:
        self._behaviour = behaviour

    def WatchLoad(self, request: Any, context: Any) -> Any:
        return self._behaviour(request, context)

    def WatchKvEvents(self, request: Any, context: Any) -> Any:
        raise AssertionError("not scripted")


class EchoExchange(decode_worker_pb2_grpc.DecodeWorkerServicer):
    def Generate(self, request: Any, context: Any) -> Any:
        raise AssertionError("not scripted")

    async def Exchange(self, requests: Any, context: Any) -> AsyncIterator[decode_worker_pb2.ExchangeResponse]:
        async for _ in requests:
            yield decode_worker_pb2.ExchangeResponse()


@asynccontextmanager
async def channel_to(server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    port = await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield channel
        finally:
            await server.drain_and_stop(GENEROUS_S)


class ScriptedDecode(decode_worker_pb2_grpc.DecodeWorkerServicer):
    def __init__(self, behaviour: Stream) -> None:
        self._behaviour = behaviour

    def Generate(self, request: Any, context: Any) -> Any:
        return self._behaviour(request, context)

    def Exchange(self, request_iterator: Any, context: Any) -> Any:
        raise AssertionError("not scripted")


@asynccontextmanager
async def unary(behaviour: Unary) -> AsyncIterator["worker_control_pb2_grpc.WorkerControlAsyncStub"]:
    server = GrpcServer()
    server.add(
        ScriptedControl(behaviour),
        "kvmesh.v1.WorkerControl",
        worker_control_pb2_grpc.add_WorkerControlServicer_to_server,
    )
    async with channel_to(server) as channel:
        yield worker_control_pb2_grpc.WorkerControlStub(channel)


@asynccontextmanager
async def stream(behaviour: Stream) -> AsyncIterator["worker_events_pb2_grpc.WorkerEventsAsyncStub"]:
    server = GrpcServer()
    server.add(
        ScriptedEvents(behaviour), "kvmesh.v1.WorkerEvents", worker_events_pb2_grpc.add_WorkerEventsServicer_to_server
    )
    async with channel_to(server) as channel:
        yield worker_events_pb2_grpc.WorkerEventsStub(channel)


def raising(error: Exception) -> Unary:
    async def behaviour(_request: Any, _context: Any) -> Info:
        raise error

    return behaviour


async def failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def failure_of(behaviour: Unary) -> grpc.aio.AioRpcError:
    async with unary(behaviour) as stub:
        return await failure(stub.GetInfo(worker_control_pb2.GetInfoRequest(), timeout=GENEROUS_S))


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    status = rpc_status.from_call(error)
    assert isinstance(status, status_pb2.Status)
    return status


def details_of(error: grpc.aio.AioRpcError, kind: type[Detail]) -> list[Detail]:
    found = []
    for packed in status_of(error).details:
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    return found


def raw(channel: grpc.aio.Channel, path: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
    return channel.unary_unary(path)


def finished(service: str, method: str, code: str) -> float:
    labels = {"service": service, "method": method, "code": code}
    return REGISTRY.get_sample_value("kvmesh_rpc_finished_total", labels) or 0.0


def waits_ended(wait: str) -> float:
    return REGISTRY.get_sample_value("kvmesh_wait_ended_total", {"wait": wait}) or 0.0


async def open_calls_end(server: GrpcServer) -> None:
    while server.open_calls:  # noqa: ASYNC110  # the server tells its number, not when it changes
        await asyncio.sleep(0.01)


BIG_CHUNK = decode_worker_pb2.DecodeWorkerGenerateResponse(chunk=generation_pb2.Chunk(text="x" * 100_000))
SENT_UNREAD = 200
"""Messages of 100 kB that are more than a connection takes in for a client that does not read."""
INFO_REQUEST = worker_control_pb2.GetInfoRequest()
LOAD_REQUEST = worker_events_pb2.WatchLoadRequest()


async def test_mesh_error_arrives_as_a_status_with_exactly_one_error_info() -> None:
    error = await failure_of(raising(NotKnownError(Reason.UNKNOWN_MODEL, "no llama here")))

    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert status_of(error).message == error.details()
    assert "no llama here" in status_of(error).message
    (info,) = details_of(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, info.metadata["retryable"]) == ("UNKNOWN_MODEL", "kvmesh", "false")


async def test_error_of_a_field_names_it_as_a_violation() -> None:
    refusal = FixRequestError(Reason.INVALID_FIELD, "sampling.top_p: 7 is out of range", field="sampling.top_p")

    error = await failure_of(raising(refusal))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (bad_request,) = details_of(error, error_details_pb2.BadRequest)
    (violation,) = bad_request.field_violations
    assert (violation.field, violation.description) == ("sampling.top_p", "sampling.top_p: 7 is out of range")


@pytest.mark.parametrize("reason", [Reason.OVERLOADED, Reason.QUEUE_FULL])
@pytest.mark.parametrize(("own_s", "told_s"), [(None, 1.0), (0.25, 0.25)])
async def test_error_of_being_full_says_when_to_come_back(reason: Reason, own_s: float | None, told_s: float) -> None:
    error = await failure_of(raising(BackOffError(reason, "full", retry_after_s=own_s)))

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (retry,) = details_of(error, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == told_s * 1000


async def test_error_in_mid_stream_arrives_after_the_messages_before_it() -> None:
    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[Load]:
        yield Load(worker_id="first")
        yield Load(worker_id="second")
        raise TryElsewhereError(Reason.DRAINING, "")

    async with stream(behaviour) as stub:
        call = stub.WatchLoad(LOAD_REQUEST, timeout=GENEROUS_S)
        received = [await call.read(), await call.read()]
        error = await failure(call.read())

    assert received == [Load(worker_id="first"), Load(worker_id="second")]
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert [info.reason for info in details_of(error, error_details_pb2.ErrorInfo)] == ["DRAINING"]


@pytest.mark.parametrize("error", [ValueError(SECRET), MeshError(Reason.INTERNAL, SECRET), KeyError(SECRET)])
async def test_unforeseen_exception_is_internal_and_tells_strangers_nothing(error: Exception) -> None:
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        received = await failure_of(raising(error))

    assert received.code() is grpc.StatusCode.INTERNAL
    assert SECRET.encode() not in status_of(received).SerializeToString()
    assert SECRET not in (received.details() or "")
    (line,) = [line for line in logs if line["event"] == "rpc.failed"]
    assert line["exc_info"] is error
    assert line["method"] == "kvmesh.v1.WorkerControl/GetInfo"
    assert ("x-request-id", line["request_id"]) in tuple(received.trailing_metadata())


async def test_foreseen_error_out_of_a_task_group_speaks_for_it() -> None:
    async def behaviour(_request: Any, _context: Any) -> Info:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.Event().wait())
            raise TryElsewhereError(Reason.NO_WORKERS, "none")

    error = await failure_of(behaviour)

    assert [info.reason for info in details_of(error, error_details_pb2.ErrorInfo)] == ["NO_WORKERS"]


async def test_unforeseen_error_beside_a_foreseen_one_makes_the_call_internal() -> None:
    error = await failure_of(
        raising(ExceptionGroup("two", [TryElsewhereError(Reason.NO_WORKERS, "none"), ValueError(SECRET)]))
    )

    assert [info.reason for info in details_of(error, error_details_pb2.ErrorInfo)] == ["INTERNAL"]
    assert SECRET.encode() not in status_of(error).SerializeToString()


async def test_long_message_is_cut_so_that_the_status_arrives() -> None:
    refusal = FixRequestError(Reason.INVALID_FIELD, "\N{LLAMA}" * 100_000, field="prompt")

    error = await failure_of(raising(refusal))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [info.reason for info in details_of(error, error_details_pb2.ErrorInfo)] == ["INVALID_FIELD"]


async def test_cancelled_call_ends_its_handler_promptly() -> None:
    entered, cleaned = asyncio.Event(), asyncio.Event()

    async def behaviour(_request: Any, _context: Any) -> Info:
        try:
            entered.set()
            await asyncio.Event().wait()
        finally:
            cleaned.set()
        raise AssertionError("unreachable")

    before = finished("kvmesh.v1.WorkerControl", "GetInfo", "CANCELLED")
    async with unary(behaviour) as stub:
        call = stub.GetInfo(INFO_REQUEST)
        await entered.wait()
        call.cancel()
        await asyncio.wait_for(cleaned.wait(), GENEROUS_S)

    assert finished("kvmesh.v1.WorkerControl", "GetInfo", "CANCELLED") == before + 1


async def test_cancelled_stream_ends_a_generator_that_is_busy_sending() -> None:
    cleaned = asyncio.Event()

    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[Load]:
        try:
            while True:
                yield Load(worker_id="w" * 10_000)
        finally:
            cleaned.set()

    async with stream(behaviour) as stub:
        call = stub.WatchLoad(LOAD_REQUEST)
        await call.read()
        call.cancel()
        await asyncio.wait_for(cleaned.wait(), GENEROUS_S)


async def test_deadline_ends_the_handler_and_is_counted_as_such() -> None:
    cleaned = asyncio.Event()

    async def behaviour(_request: Any, _context: Any) -> Info:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()
        raise AssertionError("unreachable")

    before = finished("kvmesh.v1.WorkerControl", "GetInfo", "DEADLINE_EXCEEDED")
    async with unary(behaviour) as stub:
        error = await failure(stub.GetInfo(INFO_REQUEST, timeout=0.2))
        await asyncio.wait_for(cleaned.wait(), GENEROUS_S)

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert finished("kvmesh.v1.WorkerControl", "GetInfo", "DEADLINE_EXCEEDED") == before + 1


async def test_cancellation_from_within_fails_the_call_where_it_would_hang() -> None:
    async def behaviour(_request: Any, _context: Any) -> Info:
        future: asyncio.Future[Info] = asyncio.get_running_loop().create_future()
        future.cancel()
        return await future

    error = await failure_of(behaviour)

    assert error.code() is grpc.StatusCode.INTERNAL


async def test_request_id_of_the_client_is_echoed() -> None:
    async def behaviour(_request: Any, _context: Any) -> Info:
        return Info()

    async with unary(behaviour) as stub:
        call = stub.GetInfo(INFO_REQUEST, metadata=(("x-request-id", "walk-through:1"),))
        echoed = dict(await call.trailing_metadata())["x-request-id"]
        await call

    assert echoed == "walk-through:1"


@pytest.mark.parametrize("metadata", [(), (("x-request-id", "two words"),), (("x-request-id", "x" * 129),)])
async def test_request_id_is_minted_where_none_fit_for_a_log_line_is_sent(
    metadata: tuple[tuple[str, str], ...],
) -> None:
    async def behaviour(_request: Any, _context: Any) -> Info:
        return Info()

    async with unary(behaviour) as stub:
        call = stub.GetInfo(INFO_REQUEST, metadata=metadata)
        minted = dict(await call.trailing_metadata())["x-request-id"]
        await call

    assert uuid.UUID(str(minted)).version == 7


async def test_log_lines_of_a_handler_carry_its_request_id() -> None:
    async def behaviour(_request: Any, _context: Any) -> Info:
        structlog.get_logger().info("thing.done")
        return Info()

    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        async with unary(behaviour) as stub:
            await asyncio.gather(
                *(stub.GetInfo(INFO_REQUEST, metadata=(("x-request-id", request_id),)) for request_id in ("a", "b"))
            )

    assert sorted(line["request_id"] for line in logs if line["event"] == "thing.done") == ["a", "b"]


async def test_methods_nobody_wrote_are_unimplemented() -> None:
    server = GrpcServer()
    server.add(
        worker_control_pb2_grpc.WorkerControlServicer(),  # type: ignore[abstract]  # the generated base is meant
        "kvmesh.v1.WorkerControl",
        worker_control_pb2_grpc.add_WorkerControlServicer_to_server,
    )
    server.add(
        worker_events_pb2_grpc.WorkerEventsServicer(),  # type: ignore[abstract]  # the generated base is meant
        "kvmesh.v1.WorkerEvents",
        worker_events_pb2_grpc.add_WorkerEventsServicer_to_server,
    )

    async with channel_to(server) as channel:
        control: worker_control_pb2_grpc.WorkerControlAsyncStub = worker_control_pb2_grpc.WorkerControlStub(channel)
        events: worker_events_pb2_grpc.WorkerEventsAsyncStub = worker_events_pb2_grpc.WorkerEventsStub(channel)
        errors = [
            await failure(control.GetInfo(INFO_REQUEST, timeout=GENEROUS_S)),
            await failure(events.WatchLoad(LOAD_REQUEST, timeout=GENEROUS_S).read()),
        ]

    for error in errors:
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert [info.reason for info in details_of(error, error_details_pb2.ErrorInfo)] == ["UNIMPLEMENTED"]


async def test_method_of_no_service_is_unimplemented_with_a_reason_and_counted_nowhere() -> None:
    path = "/kvmesh.v1.Nowhere/Nothing"
    async with channel_to(GrpcServer()) as channel:
        untyped: Any = channel
        errors = [
            await failure(untyped.unary_unary(path)(b"", timeout=GENEROUS_S)),
            await failure(untyped.unary_stream(path)(b"", timeout=GENEROUS_S).read()),
            await failure(untyped.stream_unary(path)(iter([b"", b""]), timeout=GENEROUS_S)),
        ]

    for error in errors:
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert [info.reason for info in details_of(error, error_details_pb2.ErrorInfo)] == ["UNIMPLEMENTED"]
    assert b"Nowhere" not in telemetry.exposition()


@pytest.mark.parametrize("path", ["/kvmesh.v1.WorkerControl/GetInfo", "/kvmesh.v1.WorkerEvents/WatchLoad"])
async def test_request_that_does_not_parse_is_the_clients_fault(path: str) -> None:
    async def unreachable(_request: Any, _context: Any) -> Any:
        raise AssertionError("unreachable")

    server = GrpcServer()
    server.add(
        ScriptedControl(unreachable),
        "kvmesh.v1.WorkerControl",
        worker_control_pb2_grpc.add_WorkerControlServicer_to_server,
    )
    server.add(
        ScriptedEvents(unreachable),
        "kvmesh.v1.WorkerEvents",
        worker_events_pb2_grpc.add_WorkerEventsServicer_to_server,
    )

    async with channel_to(server) as channel:
        error = await failure(raw(channel, path)(b"\xff\xff", timeout=GENEROUS_S))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [info.reason for info in details_of(error, error_details_pb2.ErrorInfo)] == ["INVALID_FIELD"]


async def test_status_that_a_handler_chooses_itself_is_left_alone() -> None:
    async def behaviour(_request: Any, context: Any) -> Info:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")
        raise AssertionError("unreachable")

    error = await failure_of(behaviour)

    assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, "not you")


async def test_handler_may_ask_for_the_initial_metadata_to_be_sent() -> None:
    async def behaviour(_request: Any, context: Any) -> AsyncIterator[Load]:
        await context.send_initial_metadata(())
        yield Load(worker_id="w")

    async with stream(behaviour) as stub:
        received = [load.worker_id async for load in stub.WatchLoad(LOAD_REQUEST, timeout=GENEROUS_S)]

    assert received == ["w"]


async def test_handler_may_write_its_stream_itself() -> None:
    async def behaviour(_request: Any, context: Any) -> None:
        await context.write(Load(worker_id="written"))

    async with stream(behaviour) as stub:
        received = [load.worker_id async for load in stub.WatchLoad(LOAD_REQUEST, timeout=GENEROUS_S)]

    assert received == ["written"]


async def test_messages_go_both_ways_on_one_stream() -> None:
    server = GrpcServer()
    server.add(EchoExchange(), "kvmesh.v1.DecodeWorker", decode_worker_pb2_grpc.add_DecodeWorkerServicer_to_server)

    async with channel_to(server) as channel:
        stub: decode_worker_pb2_grpc.DecodeWorkerAsyncStub = decode_worker_pb2_grpc.DecodeWorkerStub(channel)
        call = stub.Exchange(timeout=GENEROUS_S)
        for _ in range(3):
            await call.write(decode_worker_pb2.ExchangeRequest())
            assert await call.read() == decode_worker_pb2.ExchangeResponse()
        await call.done_writing()
        end = await call.read()
        code = await call.code()

    assert end is grpc.aio.EOF
    assert code is grpc.StatusCode.OK


@pytest.mark.parametrize("reads_late", [True, False], ids=["reads late", "never reads"])
async def test_request_whose_client_does_not_read_ends_as_slow_consumer(reads_late: bool) -> None:
    cleaned = asyncio.Event()

    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[decode_worker_pb2.DecodeWorkerGenerateResponse]:
        try:
            while True:
                yield BIG_CHUNK
        finally:
            cleaned.set()

    server = GrpcServer(client_write_s=0.1)
    server.add(
        ScriptedDecode(behaviour), "kvmesh.v1.DecodeWorker", decode_worker_pb2_grpc.add_DecodeWorkerServicer_to_server
    )
    before = waits_ended("client_write_s")
    async with channel_to(server) as channel:
        stub: decode_worker_pb2_grpc.DecodeWorkerAsyncStub = decode_worker_pb2_grpc.DecodeWorkerStub(channel)
        call = stub.Generate(decode_worker_pb2.DecodeWorkerGenerateRequest())
        await asyncio.wait_for(cleaned.wait(), GENEROUS_S)
        await asyncio.wait_for(open_calls_end(server), GENEROUS_S)
        if reads_late:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert [info.reason for info in details_of(caught.value, error_details_pb2.ErrorInfo)] == ["SLOW_CONSUMER"]

    assert waits_ended("client_write_s") == before + 1


async def test_client_that_reads_now_and_then_is_served_to_the_end() -> None:
    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[decode_worker_pb2.DecodeWorkerGenerateResponse]:
        for _ in range(100):
            await asyncio.sleep(0.02)  # longer altogether than one write may wait
            yield decode_worker_pb2.DecodeWorkerGenerateResponse()

    server = GrpcServer(client_write_s=1.0)
    server.add(
        ScriptedDecode(behaviour), "kvmesh.v1.DecodeWorker", decode_worker_pb2_grpc.add_DecodeWorkerServicer_to_server
    )
    async with channel_to(server) as channel:
        stub: decode_worker_pb2_grpc.DecodeWorkerAsyncStub = decode_worker_pb2_grpc.DecodeWorkerStub(channel)
        received = [response async for response in stub.Generate(decode_worker_pb2.DecodeWorkerGenerateRequest())]

    assert len(received) == 100


async def test_watch_that_is_not_read_stays_open() -> None:
    produced = 0

    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[Load]:
        nonlocal produced
        while produced < 2 * SENT_UNREAD:
            produced += 1
            yield Load(worker_id="w" * 100_000)

    server = GrpcServer(client_write_s=0.05)
    server.add(
        ScriptedEvents(behaviour), "kvmesh.v1.WorkerEvents", worker_events_pb2_grpc.add_WorkerEventsServicer_to_server
    )
    before = waits_ended("client_write_s")
    async with channel_to(server) as channel:
        stub: worker_events_pb2_grpc.WorkerEventsAsyncStub = worker_events_pb2_grpc.WorkerEventsStub(channel)
        call = stub.WatchLoad(LOAD_REQUEST, timeout=GENEROUS_S)
        await asyncio.sleep(0.5)  # ten times what a request's write may wait
        produced_unread = produced
        received = [load async for load in call]

    assert produced_unread < 2 * SENT_UNREAD, "the client's window was never full"
    assert len(received) == 2 * SENT_UNREAD
    assert waits_ended("client_write_s") == before


async def test_call_is_open_until_its_generator_has_cleaned_up() -> None:
    cleaning, let_go = asyncio.Event(), asyncio.Event()

    async def behaviour(_request: Any, _context: Any) -> AsyncIterator[Load]:
        try:
            while True:  # until the client's window is full: the generator is left at a yield
                yield Load(worker_id="w" * 100_000)
        finally:
            cleaning.set()
            await let_go.wait()

    server = GrpcServer()
    server.add(
        ScriptedEvents(behaviour), "kvmesh.v1.WorkerEvents", worker_events_pb2_grpc.add_WorkerEventsServicer_to_server
    )
    async with channel_to(server) as channel:
        stub: worker_events_pb2_grpc.WorkerEventsAsyncStub = worker_events_pb2_grpc.WorkerEventsStub(channel)
        call = stub.WatchLoad(LOAD_REQUEST)
        await call.read()
        call.cancel()
        await asyncio.wait_for(cleaning.wait(), GENEROUS_S)
        open_while_cleaning = server.open_calls
        let_go.set()

    assert open_while_cleaning == 1
    assert server.open_calls == 0
