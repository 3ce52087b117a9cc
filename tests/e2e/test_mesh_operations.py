"""What operators ask of a running mesh, by gRPC and by REST."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest

from kvmesh.core.errors import Reason
from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.mesh import generate, open_frontend, running_mesh
from kvmesh.v1 import frontend_pb2, generation_pb2, router_pb2, router_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

if TYPE_CHECKING:
    from kvmesh.v1.frontend_pb2_grpc import FrontendAsyncStub
    from kvmesh.v1.router_pb2_grpc import RouterAsyncStub

SIMULATED: dict[str, Any] = {"engine__name": "simulated", "engine__speedup": 0, "engine__options__block_size": "16"}
PROMPT = list(range(64, 96)) * 8
"""256 tokens: 16 blocks."""
ASK_S = 10.0
TERMS = {"prefill_blocks", "decode_blocks"}
"""Terms that every candidate's cost has, whatever the policy."""


@dataclass
class Doors:
    mesh: Mesh
    frontend: "FrontendAsyncStub"
    router: "RouterAsyncStub"
    http: httpx.AsyncClient


@asynccontextmanager
async def open_doors(**overrides: Any) -> AsyncIterator[Doors]:
    async with (
        running_mesh(**{**SIMULATED, **overrides}) as mesh,
        open_frontend(mesh) as frontend,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
        httpx.AsyncClient(base_url=f"http://{mesh.http_address}", trust_env=False, timeout=ASK_S) as http,
    ):
        yield Doors(mesh, frontend, router_pb2_grpc.RouterStub(channel), http)


def query() -> router_pb2.RoutingQuery:
    return router_pb2.RoutingQuery(model="simulated", token_ids=generation_pb2.TokenIds(token_ids=PROMPT))


QUERY_JSON = {"query": {"model": "simulated", "token_ids": {"token_ids": PROMPT}}}
DECODE_IDS = ["NODE1/decode/0", "NODE2/decode/1", "NODE3/decode/2"]


async def test_a_request_that_asks_why_is_told_of_every_candidate_and_its_terms() -> None:
    async with open_doors(mesh__decode=3) as doors:
        answer = await generate(doors.frontend, "Why there?" * 10, explain=True)

        explanation = answer.started.explanation
        assert explanation.policy == "least_work"
        assert explanation.worker_id == answer.started.worker_id
        assert sorted(candidate.worker_id for candidate in explanation.candidates) == DECODE_IDS
        assert all(candidate.terms.keys() >= TERMS for candidate in explanation.candidates)
        winners = [candidate.worker_id for candidate in explanation.candidates if not candidate.lost]
        assert winners == [answer.started.worker_id]
        assert explanation.prompt_tokens == 100


async def test_a_request_that_does_not_ask_why_is_not_told() -> None:
    async with open_doors() as doors:
        answer = await generate(doors.frontend, "Quietly")

        assert not answer.started.HasField("explanation")


async def test_explain_books_nothing_and_says_the_same_by_both_doors() -> None:
    async with open_doors(mesh__decode=3) as doors:
        by_grpc = await doors.router.Explain(router_pb2.ExplainRequest(query=query()), timeout=ASK_S)
        by_rest = await doors.http.post("/mesh/v1/router:explain", json=QUERY_JSON)

        assert by_rest.status_code == 200, by_rest.text
        listed = by_rest.json()["explanation"]["candidates"]
        assert sorted(candidate["worker_id"] for candidate in listed) == DECODE_IDS
        assert sorted(candidate.worker_id for candidate in by_grpc.explanation.candidates) == DECODE_IDS
        assert {candidate["terms"]["prefill_blocks"] for candidate in listed} == {16.0}
        assert {candidate.terms["prefill_blocks"] for candidate in by_grpc.explanation.candidates} == {16.0}
        assert doors.mesh.topology().counters.reservations == 0


async def test_the_router_lists_decode_and_prefill_workers_by_both_doors() -> None:
    async with open_doors(mesh__decode=2, mesh__prefill=1) as doors:
        by_grpc = await doors.router.ListWorkers(router_pb2.ListWorkersRequest(), timeout=ASK_S)
        by_rest = await doors.http.get("/mesh/v1/router/workers")

        ids = [worker.worker_id for worker in by_grpc.workers]
        assert ids == ["NODE1/decode/0", "NODE2/decode/1", "NODE3/prefill/0"]
        assert [worker["worker_id"] for worker in by_rest.json()["workers"]] == ids
        assert {worker.total_blocks for worker in by_grpc.workers} == {16_384}


async def test_potential_loads_and_overlaps_follow_what_a_worker_caches() -> None:
    async with open_doors(mesh__decode=2, mesh__prefill=0) as doors:
        served = await generate(
            doors.frontend,
            generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=PROMPT)),
            sampling=generation_pb2.SamplingParams(max_tokens=2),
        )
        async with asyncio.timeout(ASK_S):
            while not (overlaps := await overlaps_of(doors)).get(served.started.worker_id):
                await doors.mesh.gateway.router.changed()

        loads = await doors.router.GetPotentialLoads(router_pb2.GetPotentialLoadsRequest(query=query()), timeout=ASK_S)
        rest_loads = await doors.http.post("/mesh/v1/router:potentialLoads", json=QUERY_JSON)
        rest_overlaps = await doors.http.post("/mesh/v1/router:overlaps", json=QUERY_JSON)

        assert overlaps[served.started.worker_id] == 16
        assert sum(overlaps.values()) == 16
        assert sorted(load.worker_id for load in loads.loads) == DECODE_IDS[:2]
        tokens = {load.worker_id: load.prefill_tokens for load in loads.loads}
        other = next(worker_id for worker_id in DECODE_IDS[:2] if worker_id != served.started.worker_id)
        assert tokens[other] == len(PROMPT)
        assert tokens[served.started.worker_id] < len(PROMPT)
        assert sorted(load["worker_id"] for load in rest_loads.json()["loads"]) == DECODE_IDS[:2]
        assert sum(overlap.get("blocks", 0) for overlap in rest_overlaps.json()["overlaps"]) == 16


async def test_one_worker_the_index_and_a_choice_are_asked_for_by_rest() -> None:
    async with open_doors(mesh__decode=2, mesh__prefill=1) as doors:
        info = await doors.http.get("/mesh/v1/workers/NODE3/prefill/0")
        unknown = await doors.http.get("/mesh/v1/workers/NODE9/prefill/0")
        chosen = await doors.http.post("/mesh/v1/router:select", json=QUERY_JSON)
        index = await doors.http.get("/mesh/v1/router/index", params={"worker_id": "NODE1/decode/0"})
        async with doors.http.stream("GET", "/mesh/v1/router/metrics:watch") as watched:
            metrics = json.loads(await anext(watched.aiter_lines()))

        assert (info.json()["worker_id"], info.json()["role"]) == ("NODE3/prefill/0", "prefill")
        assert (unknown.status_code, unknown.json()["details"][0]["reason"]) == (404, "NOT_FOUND")
        assert chosen.json()["worker"]["worker_id"] in DECODE_IDS
        assert (index.status_code, index.text) == (200, "")
        assert len(metrics["result"]["workers"]) == 3


async def overlaps_of(doors: Doors) -> dict[str, int]:
    answer = await doors.router.GetOverlaps(router_pb2.GetOverlapsRequest(query=query()), timeout=ASK_S)
    return {overlap.worker_id: overlap.blocks for overlap in answer.overlaps}


async def test_watched_topologies_show_a_request_come_and_go() -> None:
    async with open_doors(mesh__decode=1, mesh__prefill=0) as doors:
        watched = frontend_pb2.WatchTopologyRequest()
        watched.interval.FromMilliseconds(100)
        topologies = doors.frontend.WatchTopology(watched, timeout=ASK_S)

        seen = [(await anext(aiter(topologies))).topology.counters.requests]
        await generate(doors.frontend, "Watched", sampling=generation_pb2.SamplingParams(max_tokens=2))
        async for message in topologies:
            seen.append(message.topology.counters.requests)
            if seen[-1]:
                break

        assert seen[0] == 0
        assert seen[-1] == 1
        assert [worker.id for worker in message.topology.workers] == DECODE_IDS[:1]
        assert message.topology.policy == "least_work"


@pytest.mark.parametrize(
    ("field", "hints"),
    [
        ("pinned_worker_id", {"pinned_worker_id": "NODE9/decode/9"}),
        ("allowed_worker_ids", {"allowed_worker_ids": ["NODE9/decode/9"]}),
        ("excluded_worker_ids", {"excluded_worker_ids": DECODE_IDS}),
        ("required_labels", {"required_labels": {"zone": "nowhere"}}),
        ("pinned_worker_id", {"pinned_worker_id": DECODE_IDS[0], "allowed_worker_ids": [DECODE_IDS[1]]}),
        ("pinned_worker_id", {"pinned_worker_id": DECODE_IDS[0], "excluded_worker_ids": [DECODE_IDS[0]]}),
        ("pinned_worker_id", {"pinned_worker_id": "NODE3/prefill/0"}),
    ],
    ids=["unknown", "none-allowed", "all-excluded", "no-label", "pinned-not-allowed", "pinned-excluded", "of-prefill"],
)
async def test_hints_that_nobody_matches_are_refused_at_once(field: str, hints: dict[str, Any]) -> None:
    async with open_doors(waits__route_s=20.0) as doors:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(doors.frontend, "Where to?", routing=generation_pb2.RoutingHints(**hints), timeout_s=ASK_S)

        error = from_rpc_error(refused.value)
        assert (error.reason, error.field) == (Reason.NO_MATCHING_WORKER, f"routing.{field}")


async def test_a_pinned_worker_serves_what_is_pinned_to_it() -> None:
    async with open_doors(mesh__decode=3) as doors:
        answers = [
            await generate(
                doors.frontend, "Pinned", routing=generation_pb2.RoutingHints(pinned_worker_id="NODE2/decode/1"),
                sampling=generation_pb2.SamplingParams(max_tokens=1),
            )
            for _ in range(4)
        ]  # fmt: skip

        assert [answer.started.worker_id for answer in answers] == ["NODE2/decode/1"] * 4
