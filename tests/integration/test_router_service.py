"""The Router service over gRPC, in front of a router that follows real workers."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from kvmesh.core.ids import RouterId
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.router import Router
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.v1 import generation_pb2, router_pb2, router_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.validation import duration

if TYPE_CHECKING:
    from kvmesh.v1.router_pb2_grpc import RouterAsyncStub

WAIT_S = 20.0
QUERY = router_pb2.RoutingQuery(model="m", token_ids=generation_pb2.TokenIds(token_ids=range(64)))


@pytest.fixture
def discovery() -> MemoryDiscovery:
    return MemoryDiscovery()


@pytest.fixture
async def workers(discovery: MemoryDiscovery) -> AsyncIterator[list[ScriptedWorker]]:
    workers = [await ScriptedWorker.start(discovery, number) for number in range(2)]
    workers[1].cache(range(64))
    yield workers
    for worker in workers:
        await worker.aclose()


@pytest.fixture
async def stub(discovery: MemoryDiscovery, workers: list[ScriptedWorker]) -> AsyncIterator["RouterAsyncStub"]:
    router = LocalRouter(
        discovery=discovery,
        namespace="default",
        router_id=RouterId("router-1"),
        policy=build_policy("kv_aware"),
        rng=random.Random(3),
    )
    router.start()
    service = Router(router, waits=Waits(route_s=0.05))
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    router_pb2_grpc.add_RouterServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.timeout(WAIT_S):
        while not _knows_all(router):
            await router.changed()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield router_pb2_grpc.RouterStub(channel)
        service.close()
    await server.stop(None)
    await router.aclose()


def _knows_all(router: LocalRouter) -> bool:
    states = router.workers()
    return len(states) == 2 and all(state.report for state in states) and states[1].indexed_blocks == 4


def reserve(request_id: str = "r", attempt: int = 1, **fields: Any) -> router_pb2.ReserveRequest:
    return router_pb2.ReserveRequest(request_id=request_id, attempt=attempt, **{"query": QUERY, **fields})


def query_with(**hints: Any) -> router_pb2.RoutingQuery:
    return router_pb2.RoutingQuery(model="m", text="x", hints=generation_pb2.RoutingHints(**hints))


async def reason_of(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value).reason.value


async def test_reserve_names_the_worker_and_the_booking(workers: list[ScriptedWorker], stub: "RouterAsyncStub") -> None:
    response = await stub.Reserve(reserve(explain=True), timeout=WAIT_S)

    worker = response.worker
    assert (worker.worker_id, worker.epoch, worker.address) == (workers[1].worker_id, 1, workers[1].record.address)
    assert (worker.overlap_blocks, worker.block_size) == (3, 16)
    assert response.router_id == "router-1"
    assert response.reservation_id > 0
    assert [candidate.worker_id for candidate in response.explanation.candidates] == [
        workers[1].worker_id, workers[0].worker_id,
    ]  # fmt: skip


async def test_reserving_again_gives_the_same_answer_and_other_content_is_refused(stub: "RouterAsyncStub") -> None:
    first = await stub.Reserve(reserve(), timeout=WAIT_S)
    again = await stub.Reserve(reserve(), timeout=WAIT_S)
    other = router_pb2.RoutingQuery(model="m", text="something else")

    assert again == first
    assert await reason_of(stub.Reserve(reserve(query=other), timeout=WAIT_S)) == "ALREADY_EXISTS"


async def test_reservation_lives_from_reserve_to_release(stub: "RouterAsyncStub") -> None:
    await stub.Reserve(reserve(), timeout=WAIT_S)
    progress = router_pb2.ReportProgressRequest(
        progress=[
            router_pb2.ReservationProgress(request_id="r", attempt=1, prefill_complete=True, output_blocks=2),
            router_pb2.ReservationProgress(request_id="never", attempt=1),
        ]
    )
    release = router_pb2.RouterReleaseRequest(key=router_pb2.ReservationKey(request_id="r", attempt=1))
    never = router_pb2.RouterReleaseRequest(key=router_pb2.ReservationKey(request_id="never", attempt=1))

    booked = await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=WAIT_S)
    reported = await stub.ReportProgress(progress, timeout=WAIT_S)
    running = await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=WAIT_S)
    await stub.Release(release, timeout=WAIT_S)
    await stub.Release(release, timeout=WAIT_S)
    released = await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=WAIT_S)

    loads = [
        (worker.reservations, worker.active_prefill_tokens, worker.active_blocks)
        for worker in (booked.workers[1], running.workers[1], released.workers[1])
    ]
    assert loads == [(1, 16, 4), (1, 0, 6), (0, 0, 0)]
    assert [(key.request_id, key.attempt) for key in reported.unknown] == [("never", 1)]
    assert await reason_of(stub.Release(never, timeout=WAIT_S)) == "NOT_FOUND"


async def test_select_and_explain_book_nothing(workers: list[ScriptedWorker], stub: "RouterAsyncStub") -> None:
    selected = await stub.Select(router_pb2.SelectRequest(query=QUERY), timeout=WAIT_S)
    explained = await stub.Explain(router_pb2.ExplainRequest(query=QUERY), timeout=WAIT_S)
    listed = await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=WAIT_S)

    assert selected.worker.worker_id == explained.explanation.worker_id == workers[1].worker_id
    assert explained.explanation.candidates[0].terms["overlap_blocks"] == 3
    assert explained.explanation.candidates[0].HasField("kv_age")
    assert [worker.reservations for worker in listed.workers] == [0, 0]
    assert [worker.indexed_blocks for worker in listed.workers] == [0, 4]
    assert all(worker.HasField("load_age") and worker.total_blocks == 1000 for worker in listed.workers)


async def test_overlaps_are_not_capped_and_leave_out_who_holds_nothing(
    workers: list[ScriptedWorker], stub: "RouterAsyncStub"
) -> None:
    response = await stub.GetOverlaps(router_pb2.GetOverlapsRequest(query=QUERY), timeout=WAIT_S)

    assert list(response.overlaps) == [
        router_pb2.Overlap(worker_id=workers[1].worker_id, rank=0, blocks=4, block_size=16)
    ]


async def test_potential_loads_count_uncached_tokens_and_all_blocks(stub: "RouterAsyncStub") -> None:
    response = await stub.GetPotentialLoads(router_pb2.GetPotentialLoadsRequest(query=QUERY), timeout=WAIT_S)

    assert [(load.prefill_tokens, load.decode_blocks) for load in response.loads] == [(64, 4), (16, 4)]


async def test_metrics_are_sent_at_once_and_again(stub: "RouterAsyncStub") -> None:
    call = stub.WatchMetrics(router_pb2.WatchMetricsRequest(interval=duration(0.1)), timeout=WAIT_S)
    messages = aiter(call)
    first = await anext(messages)
    await stub.Reserve(reserve(), timeout=WAIT_S)

    async with asyncio.timeout(WAIT_S):
        while not sum(worker.reservations for worker in (await anext(messages)).workers):
            pass

    assert [worker.reservations for worker in first.workers] == [0, 0]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (reserve(request_id=""), "INVALID_FIELD"),
        (reserve(attempt=0), "INVALID_FIELD"),
        (reserve(query=router_pb2.RoutingQuery(model="other", text="x")), "UNKNOWN_MODEL"),
        (reserve(query=router_pb2.RoutingQuery(model="m", text="")), "EMPTY_PROMPT"),
        (
            reserve(
                query=router_pb2.RoutingQuery(
                    model="m", text="x", hints=generation_pb2.RoutingHints(pinned_worker_id="nobody")
                )
            ),
            "NO_MATCHING_WORKER",
        ),
    ],
)
async def test_refusals_carry_their_reason(
    stub: "RouterAsyncStub", request_: router_pb2.ReserveRequest, reason: str
) -> None:
    assert await reason_of(stub.Reserve(request_, timeout=WAIT_S)) == reason


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (router_pb2.RoutingQuery(model="other", text="x"), "query.model"),
        (query_with(pinned_worker_id="nobody"), "query.hints.pinned_worker_id"),
        (query_with(required_labels={"zone": "x"}), "query.hints.required_labels"),
        (query_with(cost=generation_pb2.CostOverrides(overlap_credit=1e308)), "query.hints.cost.overlap_credit"),
    ],
)
async def test_refusals_name_the_field_by_its_path_in_the_callers_message(
    stub: "RouterAsyncStub", query: router_pb2.RoutingQuery, field: str
) -> None:
    for call in (
        stub.Select(router_pb2.SelectRequest(query=query), timeout=WAIT_S),
        stub.Reserve(reserve(query=query), timeout=WAIT_S),
        stub.Explain(router_pb2.ExplainRequest(query=query), timeout=WAIT_S),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert from_rpc_error(caught.value).field == field


async def test_progress_that_cannot_be_is_refused_and_changes_no_load(stub: "RouterAsyncStub") -> None:
    await stub.Reserve(reserve(), timeout=WAIT_S)
    lines = [router_pb2.ReservationProgress(request_id="r", attempt=1, output_blocks=n) for n in (1, 2**32 - 1)]

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ReportProgress(router_pb2.ReportProgressRequest(progress=lines), timeout=WAIT_S)
    listed = await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=WAIT_S)

    assert from_rpc_error(caught.value).field == "progress[1].output_blocks"
    assert listed.workers[1].active_blocks == 4


async def test_nobody_there_is_told_after_the_wait(workers: list[ScriptedWorker], stub: "RouterAsyncStub") -> None:
    for worker in workers:
        await worker.stop()
    async with asyncio.timeout(WAIT_S):
        while (await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=WAIT_S)).workers:
            pass

    assert await reason_of(stub.Reserve(reserve(), timeout=WAIT_S)) == "NO_WORKERS"


async def test_interval_below_the_least_is_refused(stub: "RouterAsyncStub") -> None:
    watch = stub.WatchMetrics(router_pb2.WatchMetricsRequest(interval=duration(0.05)), timeout=WAIT_S)

    assert await reason_of(watch.read()) == "INVALID_FIELD"


async def test_the_index_is_dumped_parents_first(workers: list[ScriptedWorker], stub: "RouterAsyncStub") -> None:
    everybody = [response async for response in stub.DumpIndex(router_pb2.DumpIndexRequest(), timeout=WAIT_S)]
    cold = router_pb2.DumpIndexRequest(worker_id=workers[0].worker_id)
    nothing = [response async for response in stub.DumpIndex(cold, timeout=WAIT_S)]

    entries = [entry for response in everybody for entry in response.entries]
    chain = [entry.block_hash for entry in entries]
    assert {entry.worker_id for entry in entries} == {workers[1].worker_id}
    assert chain == [15310707395893867146, 13769157705258532664, 11879827756109914528, 3888788807566526800]
    assert [entry.parent_hash if entry.HasField("parent_hash") else None for entry in entries] == [None, *chain[:-1]]
    assert nothing == []
