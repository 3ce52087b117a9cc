"""The doors Frontend and Processor over real gRPC, in front of a generator that follows a script."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING
from uuid import UUID

import grpc
import pytest
import uuid_utils
from google.protobuf import duration_pb2

from kvmesh.core.errors import MeshError, Reason, TryElsewhereError
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.frontend import Frontend
from kvmesh.services.processor_service import Processor
from kvmesh.services.request_totals import RequestTotals
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2, processor_pb2, processor_pb2_grpc
from kvmesh.wire import error_catalog
from kvmesh.wire.generation import Delta, DeltaWriter, Event

if TYPE_CHECKING:
    from kvmesh.v1.frontend_pb2_grpc import FrontendAsyncStub
    from kvmesh.v1.processor_pb2_grpc import ProcessorAsyncStub

GENEROUS_S = 10.0
REQUEST_TIMEOUT_S = 123.0

STARTED = frontend_pb2.Started(request_id="the-mesh-id", client_request_id="mine", model="m", worker_id="n/decode/0")
FINISHED = generation_pb2.Finished(
    reason=generation_pb2.FINISH_REASON_STOP, usage=generation_pb2.Usage(prompt_tokens=3, completion_tokens=2)
)
GOOD_RUN = (STARTED, Delta(["Hel", "lo"], [7, 8]), Delta(["", " 🙂"], [9, 10]), FINISHED)
MODELS = frontend_pb2.ListModelsResponse(models=[frontend_pb2.Model(name="m", workers=2, max_context_tokens=512)])


@dataclass
class ScriptedGenerator:
    """Yields its events, then raises its error, or waits for ever if it is to hang; keeps what it was asked."""

    events: Sequence[Event] = GOOD_RUN
    error: MeshError | None = None
    hangs: bool = False
    requests: list[frontend_pb2.GenerateRequest] = field(default_factory=list)
    timeouts_s: list[float | None] = field(default_factory=list)
    request_ids: list[str | None] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(
        self,
        request: frontend_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        writer: DeltaWriter | None = None,
    ) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.timeouts_s.append(timeout_s)
        self.request_ids.append(request_id)
        try:
            for event in self.events:
                yield event
            if self.error is not None:
                raise self.error
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.closed.set()

    def models(self) -> frontend_pb2.ListModelsResponse:
        return MODELS


def numbered_topologies() -> Callable[[], Awaitable[frontend_pb2.Topology]]:
    looks = count(1)

    async def look() -> frontend_pb2.Topology:
        return frontend_pb2.Topology(policy=f"look {next(looks)}")

    return look


@dataclass(frozen=True)
class Doors:
    frontend: "FrontendAsyncStub"
    processor: "ProcessorAsyncStub"
    frontend_servicer: Frontend


@asynccontextmanager
async def serve(generator: ScriptedGenerator) -> AsyncIterator[Doors]:
    frontend = Frontend(generator=generator, topology=numbered_topologies(), request_timeout_s=REQUEST_TIMEOUT_S)
    server = grpc.aio.server(interceptors=(CallInterceptor(),))
    frontend_pb2_grpc.add_FrontendServicer_to_server(frontend, server)
    processor_pb2_grpc.add_ProcessorServicer_to_server(Processor(generator, totals=RequestTotals()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Doors(frontend_pb2_grpc.FrontendStub(channel), processor_pb2_grpc.ProcessorStub(channel), frontend)
    finally:
        frontend.close()
        await server.stop(None)


def ask(text: str = "Hi") -> frontend_pb2.GenerateRequest:
    return frontend_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text=text), client_request_id="mine")


async def error_of(call: Awaitable[object]) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_catalog.from_rpc_error(caught.value)


# --- Frontend.Generate


async def test_stream_has_started_then_chunks_then_finished() -> None:
    async with serve(ScriptedGenerator()) as doors:
        responses = [response async for response in doors.frontend.Generate(ask(), timeout=GENEROUS_S)]

    assert responses == [
        frontend_pb2.GenerateResponse(started=STARTED),
        frontend_pb2.GenerateResponse(chunk=generation_pb2.Chunk(text="Hello", token_ids=[7, 8])),
        frontend_pb2.GenerateResponse(chunk=generation_pb2.Chunk(text=" 🙂", token_ids=[9, 10])),
        frontend_pb2.GenerateResponse(finished=FINISHED),
    ]


async def test_request_reaches_the_generator_as_it_was_sent_and_without_an_id_of_the_mesh() -> None:
    generator = ScriptedGenerator()
    request = ask()
    request.sampling.temperature = 0.0
    request.explain = True

    async with serve(generator) as doors:
        call = doors.frontend.Generate(request, timeout=GENEROUS_S, metadata=(("x-request-id", "a-name-for-logs"),))
        async for _ in call:
            pass

    assert generator.requests == [request]
    assert generator.requests[0].sampling.HasField("temperature")
    assert generator.request_ids == [None]


async def test_request_runs_under_the_id_that_its_call_is_logged_under() -> None:
    generator = ScriptedGenerator()

    async with serve(generator) as doors:
        call = doors.frontend.Generate(ask(), timeout=GENEROUS_S)
        logged_as = dict(await call.initial_metadata())["x-request-id"]
        async for _ in call:
            pass

    assert generator.request_ids == [logged_as]


async def test_clients_deadline_bounds_the_request() -> None:
    generator = ScriptedGenerator()

    async with serve(generator) as doors:
        await doors.frontend.GenerateText(frontend_pb2.GenerateTextRequest(prompt="Hi"), timeout=GENEROUS_S)

    timeout_s = generator.timeouts_s[0]
    assert timeout_s is not None
    assert 0 < timeout_s < 1.5 * GENEROUS_S  # gRPC rounds a deadline up on the wire


async def test_a_client_without_a_deadline_gets_the_settings() -> None:
    generator = ScriptedGenerator()

    async with serve(generator) as doors:
        await doors.frontend.GenerateText(frontend_pb2.GenerateTextRequest(prompt="Hi"))

    assert generator.timeouts_s == [REQUEST_TIMEOUT_S]


async def test_an_error_between_two_chunks_ends_the_stream_with_its_reason_and_no_finished() -> None:
    lost = TryElsewhereError(Reason.WORKER_LOST, "gone")

    async with serve(ScriptedGenerator(events=GOOD_RUN[:2], error=lost)) as doors:
        call = doors.frontend.Generate(ask(), timeout=GENEROUS_S)
        started = await call.read()
        chunk = await call.read()
        error = await error_of(call.read())

    assert started == frontend_pb2.GenerateResponse(started=STARTED)
    assert chunk == frontend_pb2.GenerateResponse(chunk=generation_pb2.Chunk(text="Hello", token_ids=[7, 8]))
    assert error.reason is Reason.WORKER_LOST


async def test_cancelling_the_call_closes_the_generator() -> None:
    generator = ScriptedGenerator(events=GOOD_RUN[:1], hangs=True)

    async with serve(generator) as doors:
        call = doors.frontend.Generate(ask(), timeout=GENEROUS_S)
        first = await call.read()
        call.cancel()
        async with asyncio.timeout(GENEROUS_S):
            await generator.closed.wait()

    assert isinstance(first, frontend_pb2.GenerateResponse)
    assert first.started == STARTED


async def test_a_passed_deadline_closes_the_generator() -> None:
    generator = ScriptedGenerator(events=GOOD_RUN[:1], hangs=True)

    async with serve(generator) as doors:
        error = await error_of(doors.frontend.GenerateText(frontend_pb2.GenerateTextRequest(prompt="Hi"), timeout=0.2))
        async with asyncio.timeout(GENEROUS_S):
            await generator.closed.wait()

    assert error.reason is Reason.DEADLINE


# --- Frontend.GenerateText


async def test_text_is_the_whole_output_under_the_clients_own_id() -> None:
    generator = ScriptedGenerator()
    request = frontend_pb2.GenerateTextRequest(prompt="Tell me a joke", request_id="id_number", model="m")
    request.sampling.max_tokens = 5
    request.routing.session_id = "s"

    async with serve(generator) as doors:
        response = await doors.frontend.GenerateText(request, timeout=GENEROUS_S)

    assert response == frontend_pb2.GenerateTextResponse(worker_output="Hello 🙂", request_id="id_number")
    assert generator.requests == [
        frontend_pb2.GenerateRequest(
            prompt=generation_pb2.Prompt(text="Tell me a joke"),
            model="m",
            sampling=generation_pb2.SamplingParams(max_tokens=5),
            routing=generation_pb2.RoutingHints(session_id="s"),
            client_request_id="id_number",
        )
    ]
    assert [UUID(request_id or "").version for request_id in generator.request_ids] == [7]


@pytest.mark.parametrize(
    ("request_", "reason", "path"),
    [
        (frontend_pb2.GenerateTextRequest(), Reason.EMPTY_PROMPT, "prompt"),
        (frontend_pb2.GenerateTextRequest(prompt="Hi", request_id="é" * 129), Reason.INVALID_FIELD, "request_id"),
        (
            frontend_pb2.GenerateTextRequest(prompt="Hi", sampling=generation_pb2.SamplingParams(logprobs=0)),
            Reason.INVALID_FIELD,
            "sampling.logprobs",
        ),
    ],
)
async def test_a_bad_text_request_is_refused_by_its_own_field_names(
    request_: frontend_pb2.GenerateTextRequest, reason: Reason, path: str
) -> None:
    generator = ScriptedGenerator()

    async with serve(generator) as doors:
        error = await error_of(doors.frontend.GenerateText(request_, timeout=GENEROUS_S))

    assert (error.reason, error.field) == (reason, path)
    assert generator.requests == []


async def test_a_part_of_the_output_never_passes_for_the_whole() -> None:
    async with serve(ScriptedGenerator(events=GOOD_RUN[:-1])) as doors:
        error = await error_of(
            doors.frontend.GenerateText(frontend_pb2.GenerateTextRequest(prompt="Hi"), timeout=GENEROUS_S)
        )

    assert error.reason is Reason.INTERNAL


# --- Frontend: the mesh


async def test_models_are_the_generators() -> None:
    async with serve(ScriptedGenerator()) as doors:
        response = await doors.frontend.ListModels(frontend_pb2.ListModelsRequest(), timeout=GENEROUS_S)

    assert response == MODELS


async def test_topology_is_looked_at_anew_each_time() -> None:
    async with serve(ScriptedGenerator()) as doors:
        request = frontend_pb2.GetTopologyRequest()
        responses = [await doors.frontend.GetTopology(request, timeout=GENEROUS_S) for _ in range(2)]

    assert [response.topology.policy for response in responses] == ["look 1", "look 2"]


async def test_watch_shows_the_topology_at_once_and_then_at_the_interval() -> None:
    loop = asyncio.get_running_loop()
    arrivals = []
    request = frontend_pb2.WatchTopologyRequest(interval=duration_pb2.Duration(nanos=100_000_000))

    async with serve(ScriptedGenerator()) as doors:
        async for response in doors.frontend.WatchTopology(request, timeout=GENEROUS_S):
            arrivals.append((response.topology.policy, loop.time()))
            if len(arrivals) == 3:
                break

    assert [policy for policy, _ in arrivals] == ["look 1", "look 2", "look 3"]
    assert arrivals[2][1] - arrivals[0][1] >= 0.1  # two intervals, less what the first message was late


@pytest.mark.parametrize("interval", [duration_pb2.Duration(), duration_pb2.Duration(nanos=99_000_000)])
async def test_a_watch_closer_than_100_ms_is_refused(interval: duration_pb2.Duration) -> None:
    async with serve(ScriptedGenerator()) as doors:
        call = doors.frontend.WatchTopology(frontend_pb2.WatchTopologyRequest(interval=interval), timeout=GENEROUS_S)
        error = await error_of(call.read())

    assert (error.reason, error.field) == (Reason.INVALID_FIELD, "interval")


async def test_closing_the_frontend_ends_its_watches_well() -> None:
    async with serve(ScriptedGenerator()) as doors:
        call = doors.frontend.WatchTopology(
            frontend_pb2.WatchTopologyRequest(interval=duration_pb2.Duration(seconds=3600)), timeout=GENEROUS_S
        )
        await call.read()

        doors.frontend_servicer.close()
        code = await call.code()

    assert code is grpc.StatusCode.OK


# --- Processor.Generate


async def test_processor_streams_the_same_events_under_the_frontends_id() -> None:
    generator = ScriptedGenerator()
    request_id = str(uuid_utils.uuid7())
    request = processor_pb2.ProcessorGenerateRequest(request_id=request_id, request=ask())

    async with serve(generator) as doors:
        responses = [response async for response in doors.processor.Generate(request, timeout=GENEROUS_S)]

    assert [response.WhichOneof("event") for response in responses] == ["started", "chunk", "chunk", "finished"]
    assert (responses[1].chunk, list(responses[1].pieces)) == (
        generation_pb2.Chunk(text="Hello", token_ids=[7, 8]),
        ["Hel", "lo"],
    )
    assert generator.requests == [ask()]
    assert generator.request_ids == [request_id]


async def test_processor_writes_the_id_in_its_one_spelling() -> None:
    generator = ScriptedGenerator()
    request_id = str(uuid_utils.uuid7())
    request = processor_pb2.ProcessorGenerateRequest(request_id=request_id.upper(), request=ask())

    async with serve(generator) as doors:
        async for _ in doors.processor.Generate(request):
            pass

    assert generator.request_ids == [request_id]
    assert generator.timeouts_s == [None]  # the generator's own setting


@pytest.mark.parametrize("request_id", ["", "id_number", str(UUID(int=0)), "0b0f6f50-5f6e-4d0e-9d5e-2f9f6a3f0c11"])
async def test_processor_refuses_an_id_that_is_no_uuid7(request_id: str) -> None:
    generator = ScriptedGenerator()
    request = processor_pb2.ProcessorGenerateRequest(request_id=request_id, request=ask())

    async with serve(generator) as doors:
        error = await error_of(doors.processor.Generate(request, timeout=GENEROUS_S).read())

    assert (error.reason, error.field) == (Reason.INVALID_FIELD, "request_id")
    assert generator.requests == []


async def test_cancelling_a_processors_call_closes_the_generator() -> None:
    generator = ScriptedGenerator(events=GOOD_RUN[:1], hangs=True)
    request = processor_pb2.ProcessorGenerateRequest(request_id=str(uuid_utils.uuid7()), request=ask())

    async with serve(generator) as doors:
        call = doors.processor.Generate(request, timeout=GENEROUS_S)
        await call.read()
        call.cancel()
        async with asyncio.timeout(GENEROUS_S):
            await generator.closed.wait()

    assert call.cancelled()
