"""What a router counts, asked over gRPC."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvmesh.core.ids import RouterId
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.router import Router
from kvmesh.telemetry import exposition
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.v1 import generation_pb2, router_pb2, router_pb2_grpc

if TYPE_CHECKING:
    from kvmesh.v1.router_pb2_grpc import RouterAsyncStub

WAIT_S = 20.0
QUERY = router_pb2.RoutingQuery(model="m", token_ids=generation_pb2.TokenIds(token_ids=range(64)))
STAGES = ("hash", "match", "load", "select", "total")


@pytest.fixture
async def stub() -> AsyncIterator["RouterAsyncStub"]:
    """A router over one worker that has the whole prompt of QUERY cached."""
    discovery = MemoryDiscovery()
    worker = await ScriptedWorker.start(discovery, 0)
    worker.cache(range(64))
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
        while not (states := router.workers()) or states[0].indexed_blocks != 4 or not states[0].report:
            await router.changed()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield router_pb2_grpc.RouterStub(channel)
    service.close()
    await server.stop(None)
    await router.aclose()
    await worker.aclose()


def value(name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(exposition().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return 0.0


async def test_each_decision_is_timed_by_stage(stub: "RouterAsyncStub") -> None:
    before = {stage: value("kvmesh_routing_stage_seconds_count", stage=stage) for stage in STAGES}

    for _ in range(3):
        await stub.Select(router_pb2.SelectRequest(query=QUERY), timeout=WAIT_S)

    after = {stage: value("kvmesh_routing_stage_seconds_count", stage=stage) for stage in STAGES}
    assert {stage: after[stage] - before[stage] for stage in STAGES} == dict.fromkeys(STAGES, 3.0)


async def test_decisions_are_counted_by_what_came_of_them(stub: "RouterAsyncStub") -> None:
    outcomes = ("booked", "selected", "unknown_model", "no_matching_worker")
    before = {outcome: value("kvmesh_routing_outcomes_total", outcome=outcome) for outcome in outcomes}
    nobody = generation_pb2.RoutingHints(pinned_worker_id="nobody")
    pinned = router_pb2.RoutingQuery(model="m", prompt_tokens=1, hints=nobody)
    unknown = router_pb2.RoutingQuery(model="other", prompt_tokens=1)

    reserve = router_pb2.ReserveRequest(request_id="r", attempt=1, query=QUERY)
    await stub.Reserve(reserve, timeout=WAIT_S)
    await stub.Reserve(reserve, timeout=WAIT_S)  # the same again is no new decision
    await stub.Select(router_pb2.SelectRequest(query=QUERY), timeout=WAIT_S)
    await stub.Explain(router_pb2.ExplainRequest(query=QUERY), timeout=WAIT_S)  # nor is this one
    for refused in (pinned, unknown):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Select(router_pb2.SelectRequest(query=refused), timeout=WAIT_S)

    after = {outcome: value("kvmesh_routing_outcomes_total", outcome=outcome) for outcome in outcomes}
    assert {outcome: after[outcome] - before[outcome] for outcome in outcomes} == dict.fromkeys(outcomes, 1.0)


async def test_the_predicted_hit_rate_counts_tokens_of_booked_requests(stub: "RouterAsyncStub") -> None:
    names = ("kvmesh_routed_prompt_tokens_total", "kvmesh_routed_cached_tokens_total")
    before = [value(name) for name in names]

    await stub.Reserve(router_pb2.ReserveRequest(request_id="r", attempt=1, query=QUERY), timeout=WAIT_S)

    assert [value(name) - start for name, start in zip(names, before, strict=True)] == [64.0, 48.0]


async def reserve_and_release(stub: "RouterAsyncStub", request_id: str, *, cached_tokens: int | None) -> None:
    key = router_pb2.ReservationKey(request_id=request_id, attempt=1)
    await stub.Reserve(router_pb2.ReserveRequest(request_id=request_id, attempt=1, query=QUERY), timeout=WAIT_S)
    await stub.Release(router_pb2.RouterReleaseRequest(key=key, cached_tokens=cached_tokens), timeout=WAIT_S)


@pytest.mark.parametrize(("cached_tokens", "overpredicted"), [(48, 0), (16, 2)])
async def test_what_a_release_says_was_cached_is_held_against_the_prediction(
    stub: "RouterAsyncStub", cached_tokens: int, overpredicted: int
) -> None:
    names = ("kvmesh_index_predicted_blocks_total", "kvmesh_index_overpredicted_blocks_total")
    before = [value(name) for name in names]

    await reserve_and_release(stub, "never said", cached_tokens=None)
    await reserve_and_release(stub, "said", cached_tokens=cached_tokens)
    async with asyncio.timeout(WAIT_S):
        while value(names[0]) == before[0]:  # it is judged when events of before must have come
            await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=WAIT_S)

    assert [value(name) - start for name, start in zip(names, before, strict=True)] == [3, overpredicted]


async def test_the_size_of_the_index_is_shown(stub: "RouterAsyncStub") -> None:
    async with asyncio.timeout(WAIT_S):
        while value("kvmesh_index_pairs") != 4:  # looked at once a second
            await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=WAIT_S)

    assert value("kvmesh_index_blocks") == 4
    assert value("kvmesh_index_mode", mode="events") == 1
