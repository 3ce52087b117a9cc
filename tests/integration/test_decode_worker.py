"""DecodeWorker.Generate, the door for people and other languages, on a real worker."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from kvmesh.core.errors import Reason
from kvmesh.engines.echo import EchoEngine
from kvmesh.engines.engine import StepResult
from kvmesh.testing.worker_group import (
    GENEROUS_S,
    SMALL,
    WAITS,
    HeldSimulatedEngine,
    WorkerGroup,
    eventually,
    request,
    worker_group,
)
from kvmesh.v1 import decode_worker_pb2, generation_pb2, worker_control_pb2, worker_events_pb2
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.validation import duration


class BrokenEngine(HeldSimulatedEngine):
    """A held engine that crashes when it is let go."""

    def step(self) -> StepResult:
        if self.held:
            return super().step()
        raise RuntimeError("the device fell off the bus")


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group() as group:
        yield group


def text_request(request_id: str, text: str) -> decode_worker_pb2.DecodeRequest:
    return decode_worker_pb2.DecodeRequest(
        request_id=request_id, attempt=1, text=text, sampling=generation_pb2.SamplingParams(max_tokens=50)
    )


async def test_stream_is_accepted_prefill_chunks_finished(group: WorkerGroup) -> None:
    worker = await group.add_decode()

    answer = await group.generate(worker, request("r", max_tokens=6))

    assert answer.events == ["accepted", "prefill", "chunk", "finished"]
    assert len(answer.token_ids) == 6
    assert answer.finished is not None
    assert answer.finished.reason == generation_pb2.FINISH_REASON_LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (18, 6)
    await group.wait_idle()


async def test_text_worker_answers_in_text(group: WorkerGroup) -> None:
    worker = await group.add_decode(EchoEngine(node_name="n"))

    answer = await group.generate(worker, text_request("r", "hello  big world"))

    assert answer.text == "hello  big world_GeneratedBy_n"
    assert answer.finished is not None
    assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP
    assert answer.usage.prompt_tokens == len("hello  big world")


async def test_text_prompt_is_prefilled_remotely_without_moving_anything(group: WorkerGroup) -> None:
    await group.add_queue()
    prefill = await group.add_prefill(EchoEngine(node_name="p"))
    worker = await group.add_decode(EchoEngine(node_name="d"))

    answer = await group.generate(worker, text_request("r", "hello"))

    assert [decision.remote for decision in answer.decisions] == [True]
    assert answer.text == "hello_GeneratedBy_d"
    assert (answer.usage.remote_prefill_tokens, answer.usage.kv_bytes_moved) == (5, 0)
    assert (await group.info(prefill)).counters["tasks"] == 1
    await group.wait_idle()


@pytest.mark.parametrize(
    ("wanted", "reason", "code"),
    [
        (request("r", model="other"), Reason.UNKNOWN_MODEL, grpc.StatusCode.NOT_FOUND),
        (request("r", tokens=()), Reason.EMPTY_PROMPT, grpc.StatusCode.INVALID_ARGUMENT),
        (request("r", tokens=(1000,)), Reason.INVALID_FIELD, grpc.StatusCode.INVALID_ARGUMENT),
        (request("r", tokens=range(300)), Reason.INVALID_FIELD, grpc.StatusCode.INVALID_ARGUMENT),
        (text_request("r", "words"), Reason.INVALID_FIELD, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_bad_request_is_refused_by_reason(
    group: WorkerGroup, wanted: decode_worker_pb2.DecodeRequest, reason: Reason, code: grpc.StatusCode
) -> None:
    worker = await group.add_decode()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.generate(worker, wanted)

    assert from_rpc_error(caught.value).reason is reason
    assert caught.value.code() is code
    await group.wait_idle()


async def test_cancelled_call_frees_everything(group: WorkerGroup) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(replace(SMALL, speedup=1.0, step_base_s=0.01)))
    call = group.decode(worker).Generate(
        decode_worker_pb2.DecodeWorkerGenerateRequest(request=request("r", max_tokens=200)), timeout=GENEROUS_S
    )
    async for response in call:
        if response.HasField("chunk"):
            break

    call.cancel()

    await group.wait_idle()


async def test_deadline_of_the_call_frees_everything(group: WorkerGroup) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(held=True))
    call = group.decode(worker).Generate(
        decode_worker_pb2.DecodeWorkerGenerateRequest(request=request("r")), timeout=0.2
    )

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [response async for response in call]

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await group.wait_idle()


async def test_deadline_in_the_request_is_kept_by_the_worker(group: WorkerGroup) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(held=True))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.generate(worker, request("r", timeout=duration(0.1)))

    assert from_rpc_error(caught.value).reason is Reason.DEADLINE
    await group.wait_idle()


async def test_request_without_a_deadline_gets_the_workers(group: WorkerGroup) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(held=True), waits=replace(WAITS, request_s=0.1))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.generate(worker, request("r", timeout=duration(500)))

    assert from_rpc_error(caught.value).reason is Reason.DEADLINE


async def test_id_may_be_used_again_as_soon_as_its_request_has_finished(group: WorkerGroup) -> None:
    worker = await group.add_decode()

    answers = [await group.generate(worker, request("same", max_tokens=4)) for _ in range(20)]

    assert {tuple(answer.token_ids) for answer in answers} == {tuple(answers[0].token_ids)}
    assert all(answer.finished is not None for answer in answers)


async def test_worker_whose_engine_crashes_fails_its_requests_and_has_none_sent(group: WorkerGroup) -> None:
    engine = BrokenEngine(held=True)
    worker = await group.add_decode(engine)
    running = asyncio.ensure_future(group.generate(worker, request("r")))
    watch = group.events(worker).WatchLoad(worker_events_pb2.WatchLoadRequest(), timeout=GENEROUS_S)
    await group.wait_until(worker, lambda info: info.requests == 1)

    engine.held = False
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await group.generate(worker, request("late"))
    async for load in watch:
        if load.draining:
            break
    watch.cancel()

    assert from_rpc_error(caught.value).reason is Reason.WORKER_LOST
    assert from_rpc_error(late.value).reason in {Reason.WORKER_LOST, Reason.DRAINING}
    await eventually(lambda: [r.draining for r in group.discovery._of("test")] == [True])


async def test_drain_counts_what_finished_and_what_it_cancelled(group: WorkerGroup) -> None:
    worker = await group.add_decode(HeldSimulatedEngine(replace(SMALL, speedup=1.0, step_base_s=0.02)))
    short = asyncio.ensure_future(group.generate(worker, request("short", max_tokens=5)))
    long = asyncio.ensure_future(group.generate(worker, request("long", max_tokens=200)))
    await group.wait_until(worker, lambda info: info.requests == 2)

    drained = await group.control(worker).Drain(
        worker_control_pb2.DrainRequest(timeout=duration(1.0)), timeout=GENEROUS_S
    )
    with pytest.raises(grpc.aio.AioRpcError) as cancelled:
        await long
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await group.generate(worker, request("late"))

    assert (drained.finished, drained.cancelled) == (1, 1)
    assert (await short).finished is not None
    assert from_rpc_error(cancelled.value).reason is Reason.DRAINING
    assert from_rpc_error(late.value).reason is Reason.DRAINING
    await group.wait_idle()
