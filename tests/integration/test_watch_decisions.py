"""Router.WatchDecisions: what a router decided lately, bounded, over gRPC and over REST."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf import duration_pb2

from kvmesh.core.candidates import Candidate, RoutingQuery, Selection
from kvmesh.core.ids import AttemptKey, RequestId, WorkerId, WorkerRank
from kvmesh.runtime.mesh import Mesh
from kvmesh.services.recent_decisions import RecentDecisions
from kvmesh.testing.mesh import generate, open_frontend, running_mesh
from kvmesh.v1 import router_pb2, router_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

if TYPE_CHECKING:
    from kvmesh.v1.router_pb2_grpc import RouterAsyncStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAIT_S = 20.0
OFTEN = duration_pb2.Duration(nanos=100_000_000)
WORKERS = [WorkerRank(WorkerId(f"n/decode/{number}")) for number in range(3)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    async with running_mesh(mesh__decode=3, mesh__prefill=0) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def stub(mesh: Mesh) -> AsyncIterator["RouterAsyncStub"]:
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        yield router_pb2_grpc.RouterStub(channel)


def selection(chosen: int = 0, *, candidates: int = 3) -> Selection:
    fleet = [Candidate(worker=worker, block_size=16) for worker in WORKERS[:candidates]]
    query = RoutingQuery(model="m", prompt_tokens=10, prompt_text="a secret")
    return Selection(worker=WORKERS[chosen], policy="p", candidates=fleet, query=query, overlap_blocks=2)


async def first_of(decisions: RecentDecisions, **bounds: Any) -> router_pb2.WatchDecisionsResponse:
    given = {"interval_s": 0.1, "max_decisions": 16, "max_candidates": 8, **bounds}
    watch = decisions.watch(**given)
    response = await anext(watch)
    await watch.aclose()
    return response


async def test_a_watch_begins_with_what_was_decided_before_and_goes_on(mesh: Mesh, stub: "RouterAsyncStub") -> None:
    async with open_frontend(mesh) as frontend:
        first = await generate(frontend, "one")
        watch = stub.WatchDecisions(router_pb2.WatchDecisionsRequest(interval=OFTEN), timeout=WAIT_S)
        before = await watch.read()
        second = await generate(frontend, "two")
        after = await watch.read()
        watch.cancel()

    assert isinstance(before, router_pb2.WatchDecisionsResponse)
    assert isinstance(after, router_pb2.WatchDecisionsResponse)
    decided = before.decisions[-1]
    assert (decided.booking.request_id, decided.booking.attempt) == (first.started.request_id, 1)
    assert decided.explanation.worker_id == first.started.worker_id
    assert len(decided.explanation.candidates) == decided.candidate_count == 3
    assert decided.explanation.candidates[0].terms["prefill_blocks"] > 0
    assert [each.booking.request_id for each in after.decisions] == [second.started.request_id]
    assert after.decisions[0].sequence == decided.sequence + 1
    assert after.decisions[0].decided_at.ToNanoseconds() >= decided.decided_at.ToNanoseconds() > 1.7e18


async def test_rest_streams_the_same_as_events(mesh: Mesh) -> None:
    async with open_frontend(mesh) as frontend:
        answer = await generate(frontend, "three")
    path = "/mesh/v1/router/decisions:watch?max_decisions=1&max_candidates=2"
    headers = {"accept": "text/event-stream"}

    async with (
        httpx.AsyncClient(base_url=f"http://{mesh.http_address}", trust_env=False, timeout=WAIT_S) as client,
        client.stream("GET", path, headers=headers) as reply,
    ):
        line = await anext(line async for line in reply.aiter_lines() if line)

    result = json.loads(line.removeprefix("data: "))["result"]
    assert [each["booking"]["request_id"] for each in result["decisions"]] == [answer.started.request_id]
    assert len(result["decisions"][0]["explanation"]["candidates"]) == 2
    assert result["decisions"][0]["candidate_count"] == 3


async def test_a_router_of_another_process_is_watched_through_the_gateway_until_that_stops() -> None:
    headers = {"accept": "text/event-stream"}
    async with AsyncExitStack() as client_side:
        async with running_mesh(mesh__decode=1, mesh__prefill=0, mesh__router="separate") as mesh:
            client = await client_side.enter_async_context(
                httpx.AsyncClient(base_url=f"http://{mesh.http_address}", trust_env=False, timeout=WAIT_S)
            )
            async with open_frontend(mesh) as frontend:
                answer = await generate(frontend, "four")
            watching = client.stream("GET", "/mesh/v1/router/decisions:watch", headers=headers)
            lines = (await client_side.enter_async_context(watching)).aiter_lines()
            first = await anext(lines)
        async with asyncio.timeout(WAIT_S):
            rest = [line async for line in lines if line]

    shown = json.loads(first.removeprefix("data: "))["result"]["decisions"]
    assert [each["booking"]["request_id"] for each in shown] == [answer.started.request_id]
    assert [line for line in rest if "result" in line] == []


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (router_pb2.WatchDecisionsRequest(max_decisions=65), "max_decisions"),
        (router_pb2.WatchDecisionsRequest(max_candidates=65), "max_candidates"),
        (router_pb2.WatchDecisionsRequest(interval=duration_pb2.Duration(nanos=1)), "interval"),
    ],
)
async def test_bounds_beyond_the_contract_are_refused(
    stub: "RouterAsyncStub", request_: router_pb2.WatchDecisionsRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.WatchDecisions(request_, timeout=WAIT_S).read()

    assert from_rpc_error(caught.value).field == field


async def test_a_burst_is_counted_where_it_is_not_shown() -> None:
    decisions = RecentDecisions()
    decisions.put(selection(), None)
    watch = decisions.watch(interval_s=0.1, max_decisions=2, max_candidates=8)

    first = await anext(watch)
    for number in range(5):
        decisions.put(selection(), AttemptKey(RequestId(f"r{number}"), 1))
    async with asyncio.timeout(WAIT_S):
        second = await anext(watch)
    await watch.aclose()

    assert ([each.sequence for each in first.decisions], first.skipped) == ([1], 0)
    assert ([each.sequence for each in second.decisions], second.skipped) == ([5, 6], 3)
    assert [each.booking.request_id for each in second.decisions] == ["r3", "r4"]


async def test_memory_is_bounded_by_decisions_and_by_their_candidates() -> None:
    few = RecentDecisions(max_decisions=4)
    wide = RecentDecisions(max_candidates=7)
    huge = RecentDecisions(max_candidates=1)

    for kept in (few, wide, huge):
        for _ in range(10):
            kept.put(selection(), None)

    assert [each.sequence for each in (await first_of(few)).decisions] == [7, 8, 9, 10]
    assert [each.sequence for each in (await first_of(wide)).decisions] == [9, 10]
    assert [each.sequence for each in (await first_of(huge)).decisions] == [10]


async def test_a_prompt_is_in_no_decision_that_is_shown() -> None:
    decisions = RecentDecisions()
    decisions.put(selection(), None)

    response = await first_of(decisions)

    assert response.decisions[0].overlap_blocks == 2
    assert "a secret" not in str(response)


async def test_closing_ends_a_watch_that_waits() -> None:
    decisions = RecentDecisions()
    watch = decisions.watch(interval_s=3600.0, max_decisions=1, max_candidates=1)
    await anext(watch)

    decisions.close()
    async with asyncio.timeout(WAIT_S):
        rest = [response async for response in watch]

    assert rest == []
