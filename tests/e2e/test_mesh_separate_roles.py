"""Router and processor on their own: the same answers, and what is left of them when one goes."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest

from kvmesh.core.errors import Reason
from kvmesh.runtime.mesh import Mesh
from kvmesh.runtime.role import Role
from kvmesh.testing.held_engine import held_plan
from kvmesh.testing.mesh import generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.v1 import frontend_pb2, generation_pb2, router_pb2, router_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

if TYPE_CHECKING:
    from kvmesh.v1.router_pb2_grpc import RouterAsyncStub

SIMULATED: dict[str, Any] = {"engine__name": "simulated", "engine__speedup": 0, "engine__options__block_size": "16"}
BOUND_S = 15.0
PROMPT = "What is a service mesh, and who would want one? " * 8

SHAPES = [
    pytest.param({"mesh__router": "separate"}, id="router"),
    pytest.param({"mesh__processor": "separate"}, id="processor"),
    pytest.param({"mesh__router": "separate", "mesh__processor": "separate"}, id="router-and-processor"),
]


async def indexed(router: "RouterAsyncStub") -> None:
    """Wait until the router has heard what a worker caches."""
    deadline = asyncio.get_running_loop().time() + BOUND_S
    while not any(each.indexed_blocks for each in (await router.ListWorkers(router_pb2.ListWorkersRequest())).workers):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


def role(mesh: Mesh, kind: str) -> Role:
    return next(role for role in mesh.others if f"/{kind}/" in role.name)


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_request_is_served_explained_and_counted_wherever_the_roles_run(shape: dict[str, Any]) -> None:
    async with running_mesh(**SIMULATED, **shape) as mesh, open_frontend(mesh) as frontend:
        first = await generate(frontend, PROMPT, explain=True)
        second = await generate(frontend, PROMPT)
        topology = (await frontend.GetTopology(frontend_pb2.GetTopologyRequest())).topology

    assert first.finished is not None
    assert first.finished.usage.completion_tokens > 0
    assert {each.worker_id for each in first.started.explanation.candidates} == {"NODE1/decode/0", "NODE2/decode/1"}
    assert second.text == first.text
    assert topology.policy == "least_work"
    assert topology.counters.requests == 2
    assert topology.counters.reservations == 0
    assert {worker.id for worker in topology.workers} == {"NODE1/decode/0", "NODE2/decode/1", "NODE3/prefill/0"}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_router_elsewhere_still_sends_a_prompt_to_where_its_prefix_is(shape: dict[str, Any]) -> None:
    async with (
        running_mesh(**SIMULATED, **shape, mesh__prefill=0, mesh__decode=3) as mesh,
        open_frontend(mesh) as frontend,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
    ):
        router = router_pb2_grpc.RouterStub(channel)
        first = await generate(frontend, PROMPT)
        await indexed(router)
        again = await generate(frontend, PROMPT)

    assert again.started.worker_id == first.started.worker_id
    assert again.finished is not None
    assert again.finished.usage.cached_tokens > 0


@pytest.mark.parametrize("shape", SHAPES)
async def test_operators_reach_the_router_by_the_frontends_doors(shape: dict[str, Any]) -> None:
    query = {"query": {"model": "simulated", "token_ids": {"token_ids": list(range(64))}}}
    async with (
        running_mesh(**SIMULATED, **shape) as mesh,
        httpx.AsyncClient(base_url=f"http://{mesh.http_address}", trust_env=False, timeout=BOUND_S) as http,
    ):
        explained = await http.post("/mesh/v1/router:explain", json=query)
        stats = await http.get("/mesh/v1/queue")
        ready = await http.get("/readyz")

    assert len(explained.json()["explanation"]["candidates"]) == 2
    assert stats.status_code == 200
    assert ready.text == "ready\n"


async def test_a_frontend_on_its_own_keeps_one_event_per_token() -> None:
    async with (
        running_mesh(**SIMULATED, mesh__processor="separate", mesh__prefill=0) as mesh,
        httpx.AsyncClient(base_url=f"http://{mesh.http_address}", trust_env=False, timeout=BOUND_S) as http,
    ):
        body = {"model": "simulated", "prompt": "count", "stream": True, "max_tokens": 40}
        answer = await http.post("/v1/completions", json=body)

    events = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    with_text = [event for event in events if '"text":""' not in event.replace('": "', '":"')]
    assert len(with_text) == 40


async def test_requests_are_served_unbooked_while_the_router_is_gone() -> None:
    async with (
        running_mesh(**SIMULATED, mesh__router="separate", mesh__prefill=0) as mesh,
        open_frontend(mesh) as frontend,
    ):
        await role(mesh, "router").stop()

        answers = [await generate(frontend, f"{PROMPT}{number}") for number in range(4)]

    assert all(answer.finished is not None for answer in answers)
    assert {answer.started.worker_id for answer in answers} == {"NODE1/decode/0", "NODE2/decode/1"}


async def test_while_the_router_is_gone_its_door_says_so_and_a_choice_is_explained_as_unbooked() -> None:
    query = {"query": {"model": "simulated", "token_ids": {"token_ids": list(range(64))}}}
    async with (
        running_mesh(**SIMULATED, mesh__router="separate", mesh__prefill=0) as mesh,
        open_frontend(mesh) as frontend,
        httpx.AsyncClient(base_url=f"http://{mesh.http_address}", trust_env=False, timeout=BOUND_S) as http,
    ):
        await role(mesh, "router").stop()

        explained = await http.post("/mesh/v1/router:explain", json=query)
        answer = await generate(frontend, PROMPT, explain=True)

    assert explained.status_code == 503
    assert explained.json()["message"] == "Whoever was to serve this request is gone or does not answer: retry."
    assert answer.started.explanation.note == "no router answered: round robin, unbooked"


async def test_without_a_processor_a_request_fails_typed_and_in_time() -> None:
    async with (
        running_mesh(**SIMULATED, mesh__processor="separate", waits__route_s=0.3) as mesh,
        open_frontend(mesh) as frontend,
    ):
        await role(mesh, "processor").stop()

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(frontend, PROMPT, timeout_s=BOUND_S)

    assert from_rpc_error(caught.value).reason is Reason.NO_WORKERS


async def test_a_client_that_goes_is_gone_from_the_engine_behind_a_separate_processor() -> None:
    plan, _ = held_plan(steps=2)
    async with (
        running_mesh(plan=plan, mesh__processor="separate", mesh__decode=1, mesh__prefill=0) as mesh,
        open_frontend(mesh) as frontend,
    ):
        baseline = await read_baseline(mesh)
        request = frontend_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="one two three four five"))
        call = frontend.Generate(request, timeout=BOUND_S)
        async for response in call:
            if response.HasField("chunk"):
                break
        call.cancel()

        await wait_for_baseline(mesh, baseline)
