"""What a mesh routes by under each setting of `router.index`, and what it says of it."""

import asyncio
from typing import Any

import grpc
import pytest

from kvmesh.telemetry import exposition
from kvmesh.testing.mesh import generate, open_frontend, running_mesh
from kvmesh.v1 import router_pb2, router_pb2_grpc

PROMPT = "What everybody asks, word for word. " * 40
MESH: dict[str, Any] = {"engine__name": "simulated", "mesh__decode": 3, "mesh__prefill": 0}


async def ask_twice(**settings: Any) -> tuple[int, int, router_pb2.ListWorkersResponse]:
    """Return the tokens predicted and found at the second of two equal requests, and the router's view."""
    async with (
        running_mesh(**MESH, **settings) as mesh,
        open_frontend(mesh) as frontend,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
    ):
        first = await generate(frontend, PROMPT, sampling={"max_tokens": 1}, routing={"session_id": "s"})
        again = await generate(frontend, PROMPT, sampling={"max_tokens": 1}, routing={"session_id": "s"})
        assert (await mesh.gateway.refreshed_topology()).index == settings["router__index"]
        listed = await router_pb2_grpc.RouterStub(channel).ListWorkers(router_pb2.ListWorkersRequest())

    assert again.finished is not None
    assert again.started.worker_id == first.started.worker_id  # the session's
    return again.started.predicted_cached_tokens, again.finished.usage.cached_tokens, listed


@pytest.mark.parametrize("mode", ["events", "approximate"])
async def test_what_a_worker_served_is_predicted_to_be_cached_there(mode: str) -> None:
    predicted, found, listed = await ask_twice(router__index=mode)

    assert predicted == found > 1_000
    assert listed.index == mode
    assert f'kvmesh_index_mode{{mode="{mode}"}} 1.0' in exposition().decode()


async def test_with_the_index_off_nothing_is_predicted_and_the_worker_finds_it_all_the_same() -> None:
    predicted, found, listed = await ask_twice(router__index="off")

    assert predicted == 0
    assert found > 1_000
    assert listed.index == "off"
    assert {worker.indexed_blocks for worker in listed.workers} == {0}


async def test_a_routed_prompt_is_forgotten_after_its_time_under_approximate() -> None:
    async with (
        running_mesh(**MESH, router__index="approximate", router__approximate_ttl_s=0.2) as mesh,
        open_frontend(mesh) as frontend,
        asyncio.timeout(20),
    ):
        await generate(frontend, PROMPT, sampling={"max_tokens": 1})
        predicted = -1
        while predicted != 0:
            await asyncio.sleep(1.5)  # the router looks for what is too old once a second
            again = await generate(frontend, PROMPT, sampling={"max_tokens": 1})
            predicted = again.started.predicted_cached_tokens

    assert predicted == 0
