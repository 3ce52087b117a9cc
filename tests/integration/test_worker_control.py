"""WorkerControl of one worker, and forwarded by name, over real servers; and a worker's own beginning and end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.core.errors import ConflictError, Reason, TryElsewhereError
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord
from kvmesh.engines.echo import EchoEngine
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.channels import Channels
from kvmesh.services.worker_control import ForwardedWorkerControl
from kvmesh.testing.worker_group import (
    GENEROUS_S,
    NAMESPACE,
    WAITS,
    HeldSimulatedEngine,
    WorkerGroup,
    request,
    worker_group,
)
from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc, worker_events_pb2
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.validation import duration


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group() as group:
        yield group


@asynccontextmanager
async def forwarding(
    group: WorkerGroup,
) -> AsyncIterator["worker_control_pb2_grpc.WorkerControlAsyncStub"]:
    """Serve what the gateway serves: control of any worker by its name."""

    def find(worker_id: WorkerId) -> WorkerRecord | None:
        return next((record for record in group.discovery._of(NAMESPACE) if record.worker_id == worker_id), None)

    channels, server = Channels(), GrpcServer()
    server.add(
        ForwardedWorkerControl(find=find, channels=channels, drain_s=1.0),
        worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"],
        worker_control_pb2_grpc.add_WorkerControlServicer_to_server,
    )
    port = await server.start("127.0.0.1", 0)
    try:
        yield worker_control_pb2_grpc.WorkerControlStub(group.channel(f"127.0.0.1:{port}"))
    finally:
        await server.drain_and_stop(1.0)
        await channels.aclose()


async def test_info_is_what_the_worker_is_and_holds(group: WorkerGroup) -> None:
    engine = HeldSimulatedEngine()
    worker = await group.add_decode(engine)
    await group.generate(worker, request("r", max_tokens=3))

    info = await group.info(worker)

    assert (info.worker_id, info.epoch, info.role) == (worker.identity.worker_id, worker.identity.epoch, "decode")
    assert list(info.models) == ["m"]
    assert (info.engine, info.total_blocks, info.layout.block_size) == ("simulated", 64, 4)
    assert (info.used_blocks, info.pins, info.imports, info.requests) == (0, 0, 0, 0)
    assert info.cached_blocks == 5, "20 of the 21 tokens have KV"
    assert (info.counters["requests"], info.counters["local_prefills"]) == (1, 1)
    assert not info.draining


async def test_info_counts_what_runs(group: WorkerGroup) -> None:
    worker = await group.add_prefill(HeldSimulatedEngine())
    echo = await group.add_decode(EchoEngine(node_name="n"))

    assert (await group.info(worker)).role == "prefill"
    assert not (await group.info(echo)).HasField("layout")


async def test_drain_of_an_empty_worker_answers_at_once_and_again(group: WorkerGroup) -> None:
    worker = await group.add_decode()

    for _ in range(2):
        drained = await group.control(worker).Drain(worker_control_pb2.DrainRequest(), timeout=GENEROUS_S)
        assert (drained.finished, drained.cancelled) == (0, 0)

    assert (await group.info(worker)).draining
    assert [record.draining for record in group.discovery._of(NAMESPACE)] == [True]


async def test_draining_worker_says_so_in_its_health(group: WorkerGroup) -> None:
    worker = await group.add_decode()
    health = health_pb2_grpc.HealthStub(group.channel(worker.identity.address))
    question = health_pb2.HealthCheckRequest(service="kvmesh.v1.DecodeWorker")
    before = await health.Check(question, timeout=GENEROUS_S)

    await group.control(worker).Drain(worker_control_pb2.DrainRequest(), timeout=GENEROUS_S)
    after = await health.Check(question, timeout=GENEROUS_S)

    assert before.status == health_pb2.HealthCheckResponse.SERVING
    assert after.status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (worker_control_pb2.DrainRequest(worker_id="node/decode/9"), Reason.NOT_FOUND),
        (worker_control_pb2.DrainRequest(timeout=duration(86_401)), Reason.INVALID_FIELD),
    ],
)
async def test_bad_drain_changes_nothing(
    group: WorkerGroup, asked: worker_control_pb2.DrainRequest, reason: Reason
) -> None:
    worker = await group.add_decode()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.control(worker).Drain(asked, timeout=GENEROUS_S)

    assert from_rpc_error(caught.value).reason is reason
    assert not (await group.info(worker)).draining


async def test_drain_is_forwarded_to_the_worker_that_is_named(group: WorkerGroup) -> None:
    named, other = await group.add_decode(), await group.add_decode()
    async with forwarding(group) as control:
        await control.Drain(worker_control_pb2.DrainRequest(worker_id=named.identity.worker_id), timeout=GENEROUS_S)

    assert (await group.info(named)).draining
    assert not (await group.info(other)).draining


async def test_forwarded_drain_that_names_no_worker_is_told_to(group: WorkerGroup) -> None:
    async with forwarding(group) as control:
        with pytest.raises(grpc.aio.AioRpcError, match="name the worker") as caught:
            await control.Drain(worker_control_pb2.DrainRequest(), timeout=GENEROUS_S)

    error = from_rpc_error(caught.value)
    assert (error.reason, error.field) == (Reason.INVALID_FIELD, "worker_id")


async def test_forwarded_drain_of_an_unknown_worker_is_refused(group: WorkerGroup) -> None:
    async with forwarding(group) as control:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await control.Drain(worker_control_pb2.DrainRequest(worker_id="nobody"), timeout=GENEROUS_S)

    assert from_rpc_error(caught.value).reason is Reason.NOT_FOUND


async def test_a_question_is_forwarded_to_the_worker_that_is_named(group: WorkerGroup) -> None:
    named, _ = await group.add_decode(), await group.add_decode()
    async with forwarding(group) as control:
        info = await control.GetInfo(
            worker_control_pb2.GetInfoRequest(worker_id=named.identity.worker_id), timeout=GENEROUS_S
        )

    assert info.worker_id == named.identity.worker_id


async def test_a_forwarded_question_that_names_no_worker_is_told_to(group: WorkerGroup) -> None:
    async with forwarding(group) as control:
        with pytest.raises(grpc.aio.AioRpcError, match="name the worker") as caught:
            await control.GetInfo(worker_control_pb2.GetInfoRequest(), timeout=GENEROUS_S)

    error = from_rpc_error(caught.value)
    assert (error.reason, error.field) == (Reason.INVALID_FIELD, "worker_id")


async def test_a_question_to_another_worker_is_refused(group: WorkerGroup) -> None:
    worker = await group.add_decode()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.control(worker).GetInfo(
            worker_control_pb2.GetInfoRequest(worker_id="node/decode/9"), timeout=GENEROUS_S
        )

    assert from_rpc_error(caught.value).reason is Reason.NOT_FOUND


async def test_forwarded_drain_passes_the_workers_own_refusal_on(group: WorkerGroup) -> None:
    worker = await group.add_decode()
    async with forwarding(group) as control:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await control.Drain(
                worker_control_pb2.DrainRequest(worker_id=worker.identity.worker_id, timeout=duration(90_000)),
                timeout=GENEROUS_S,
            )

    assert from_rpc_error(caught.value).reason is Reason.INVALID_FIELD


async def test_an_undrained_worker_takes_requests_and_says_so_everywhere(group: WorkerGroup) -> None:
    worker = await group.add_decode()
    health = health_pb2_grpc.HealthStub(group.channel(worker.identity.address))
    loads = aiter(group.events(worker).WatchLoad(worker_events_pb2.WatchLoadRequest(), timeout=GENEROUS_S))
    await group.control(worker).Drain(worker_control_pb2.DrainRequest(), timeout=GENEROUS_S)

    answers = [
        await group.control(worker).Undrain(worker_control_pb2.UndrainRequest(), timeout=GENEROUS_S) for _ in range(2)
    ]
    answered = await group.generate(worker, request("r"))
    checked = await health.Check(health_pb2.HealthCheckRequest(service="kvmesh.v1.DecodeWorker"), timeout=GENEROUS_S)
    said = [(await anext(loads)).draining]
    while said[-1]:
        said.append((await anext(loads)).draining)

    assert [answer.was_draining for answer in answers] == [True, False]
    assert len(answered.token_ids) == 3
    assert checked.status == health_pb2.HealthCheckResponse.SERVING
    assert not (await group.info(worker)).draining
    assert [record.draining for record in group.discovery._of(NAMESPACE)] == [False]


async def test_undrain_ends_a_drain_that_waits_and_what_runs_goes_on(group: WorkerGroup) -> None:
    engine = HeldSimulatedEngine(held=True)
    worker = await group.add_decode(engine)
    running = asyncio.ensure_future(group.generate(worker, request("r")))
    await group.wait_until(worker, lambda info: info.requests == 1)
    drain = group.control(worker).Drain(worker_control_pb2.DrainRequest(timeout=duration(60)), timeout=GENEROUS_S)
    await group.wait_until(worker, lambda info: info.draining)

    answer = await group.control(worker).Undrain(worker_control_pb2.UndrainRequest(), timeout=GENEROUS_S)
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await drain
    engine.held = False
    answered = await running

    assert answer.was_draining
    assert from_rpc_error(ended.value).reason is Reason.CANCELLED
    assert len(answered.token_ids) == 3


@pytest.mark.parametrize("is_waiting", [False, True], ids=["a drain that has ended", "a drain that waits"])
async def test_an_undrained_prefill_worker_leases_again(group: WorkerGroup, is_waiting: bool) -> None:
    await group.add_queue()
    engine = HeldSimulatedEngine(held=is_waiting)
    prefill, decode = await group.add_prefill(engine), await group.add_decode()
    before = [asyncio.ensure_future(group.generate(decode, request("before")))] if is_waiting else []
    if is_waiting:
        await group.wait_until(prefill, lambda info: info.requests == 1)
    drain = group.control(prefill).Drain(worker_control_pb2.DrainRequest(timeout=duration(60)), timeout=GENEROUS_S)
    if is_waiting:
        await group.wait_until(prefill, lambda info: info.draining)
    else:
        await drain

    await group.control(prefill).Undrain(worker_control_pb2.UndrainRequest(), timeout=GENEROUS_S)
    engine.held = False
    for running in before:
        await running
    async with asyncio.timeout(GENEROUS_S):
        for number in count(1):  # until it is attached anew, whoever wants a prefill does it alone
            first = 100 * number
            await group.generate(decode, request(f"after{number}", tokens=tuple(range(first, first + 18))))
            if (await group.info(prefill)).counters["tasks"] > len(before):
                break

    assert (await group.info(prefill)).counters["tasks"] == len(before) + 1
    assert not (await group.info(prefill)).draining


async def test_a_worker_on_its_way_out_is_not_undrained(group: WorkerGroup) -> None:
    worker = await group.add_decode()
    await worker.stop()

    with pytest.raises(TryElsewhereError) as refused:
        await worker.undrain()

    assert refused.value.reason is Reason.DRAINING
    assert worker._is_draining


async def test_undrain_is_forwarded_to_the_worker_that_is_named(group: WorkerGroup) -> None:
    named, other = await group.add_decode(), await group.add_decode()
    for worker in (named, other):
        await group.control(worker).Drain(worker_control_pb2.DrainRequest(), timeout=GENEROUS_S)

    async with forwarding(group) as control:
        answer = await control.Undrain(
            worker_control_pb2.UndrainRequest(worker_id=named.identity.worker_id), timeout=GENEROUS_S
        )
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await control.Undrain(worker_control_pb2.UndrainRequest(worker_id="nobody"), timeout=GENEROUS_S)

    assert answer.was_draining
    assert not (await group.info(named)).draining
    assert (await group.info(other)).draining
    assert from_rpc_error(unknown.value).reason is Reason.NOT_FOUND


async def test_start_that_is_refused_leaves_nothing_running(group: WorkerGroup) -> None:
    newer = WorkerRecord(
        worker_id=WorkerId("node/decode/0"), epoch=Epoch(2**63), namespace=NAMESPACE, models=("m",), block_size=4
    )
    await group.discovery.register(newer)

    with pytest.raises(ConflictError) as caught:
        await group.add_decode()

    assert caught.value.reason is Reason.STALE_EPOCH
    assert group.discovery._of(NAMESPACE) == (newer,)


async def test_stop_takes_the_record_out_and_may_be_repeated(group: WorkerGroup) -> None:
    worker = await group.add_decode(waits=replace(WAITS, drain_s=0.1))

    await worker.stop()
    await worker.stop()

    assert group.discovery._of(NAMESPACE) == ()
    assert worker.identity.agent_name not in group.network.pools
