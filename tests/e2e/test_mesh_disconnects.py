"""Clients that go away: nothing of theirs is left in an engine, a booking or the queue, whatever door they came by."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest

from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.held_engine import held_plan
from kvmesh.testing.mesh import generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2

SIMULATED = {
    "engine__name": "simulated",
    "engine__options__block_size": "16",
    "remote_prefill__min_uncached_tokens": 16,
}
LONG = 100_000
"""Output tokens: a request that ends only when somebody ends it."""
BOUND_S = 30.0
STREAMS = 200

Talk = Callable[[Mesh, str, "asyncio.Future[None]"], Awaitable[None]]
"""Opens a stream, tells the future of its first output, and reads until cancelled."""


def heard(first: "asyncio.Future[None]") -> None:
    if not first.done():
        first.set_result(None)


@asynccontextmanager
async def http_stream(mesh: Mesh, path: str, body: dict[str, object]) -> AsyncIterator[AsyncIterator[str]]:
    url = f"http://{mesh.http_address}{path}"
    async with (
        httpx.AsyncClient(trust_env=False, timeout=BOUND_S) as client,
        client.stream("POST", url, json=body) as response,
    ):
        assert response.status_code == 200, await response.aread()
        yield response.aiter_lines()


async def by_completions(mesh: Mesh, prompt: str, first: "asyncio.Future[None]") -> None:
    body = {"model": "simulated", "prompt": prompt, "max_tokens": LONG, "stream": True}
    async with http_stream(mesh, "/v1/completions", body) as lines:
        async for line in lines:
            assert "error" not in line
            heard(first)


async def by_rest(mesh: Mesh, prompt: str, first: "asyncio.Future[None]") -> None:
    body: dict[str, object] = {"prompt": {"text": prompt}, "sampling": {"max_tokens": LONG}}
    async with http_stream(mesh, "/mesh/v1/generate", body) as lines:
        async for line in lines:
            assert "error" not in line
            if '"chunk"' in line:
                heard(first)


async def by_grpc(mesh: Mesh, prompt: str, first: "asyncio.Future[None]") -> None:
    request = frontend_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(text=prompt), sampling=generation_pb2.SamplingParams(max_tokens=LONG)
    )
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        call = frontend_pb2_grpc.FrontendStub(channel).Generate(request, timeout=BOUND_S)
        async for event in call:
            if event.HasField("chunk"):
                heard(first)


DOORS = (by_completions, by_rest, by_grpc)


async def hang_up(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("talk", DOORS, ids=["sse", "ndjson", "grpc"])
@pytest.mark.parametrize("prefill", [0, 1], ids=["aggregated", "disaggregated"])
async def test_what_a_client_that_hung_up_mid_stream_held_is_given_back(talk: Talk, prefill: int) -> None:
    async with running_mesh(mesh__prefill=prefill, **SIMULATED) as mesh:
        baseline = await read_baseline(mesh)
        first = asyncio.get_running_loop().create_future()
        talking = asyncio.create_task(talk(mesh, "a" * 100, first))
        async with asyncio.timeout(BOUND_S):
            await first
        busy = await read_baseline(mesh)

        await hang_up(talking)

        assert busy.running == busy.reservations == 1
        assert sum(worker.requests for worker in busy.workers.values()) == 1
        assert sum(worker.used_blocks for worker in busy.workers.values()) >= 100 // 16
        await wait_for_baseline(mesh, baseline)
        assert mesh.topology().counters.cancelled == 1
        assert mesh.topology().counters.failed == 0


@pytest.mark.parametrize("talk", DOORS[1:], ids=["ndjson", "grpc"])
async def test_a_client_that_hung_up_before_the_first_token_leaves_nothing(talk: Talk) -> None:
    plan, _ = held_plan()
    async with running_mesh(plan=plan, mesh__prefill=1) as mesh:
        baseline = await read_baseline(mesh)
        talking = asyncio.create_task(talk(mesh, "never answered", asyncio.get_running_loop().create_future()))
        async with asyncio.timeout(BOUND_S):
            while (await read_baseline(mesh)).running == 0:
                await mesh.gateway.router.changed(until=asyncio.get_running_loop().time() + 0.05)

        await hang_up(talking)

        await wait_for_baseline(mesh, baseline)
        assert mesh.topology().counters.cancelled == 1


@pytest.mark.parametrize("seed", [1, 2])
async def test_after_a_storm_of_cancelled_streams_nothing_is_held_and_a_probe_succeeds(seed: int) -> None:
    rng = random.Random(seed)
    async with running_mesh(mesh__decode=2, mesh__prefill=1, waits__request_s=60.0, **SIMULATED) as mesh:
        baseline = await read_baseline(mesh)

        async def one(number: int, cancel_after_s: float) -> str:
            talk = DOORS[number % len(DOORS)]
            prompt = chr(ord("a") + number % 26) * (40 + number)
            try:
                async with asyncio.timeout(cancel_after_s):
                    await talk(mesh, prompt, asyncio.get_running_loop().create_future())
            except TimeoutError:
                return "cancelled"
            return "ended"

        outcomes = await asyncio.gather(*(one(number, rng.uniform(0.0, 1.5)) for number in range(STREAMS)))

        assert set(outcomes) == {"cancelled"}
        await wait_for_baseline(mesh, baseline, within_s=BOUND_S)
        async with open_frontend(mesh) as frontend:
            probe = await generate(
                frontend, "z" * 100, sampling=generation_pb2.SamplingParams(max_tokens=3), timeout_s=BOUND_S
            )
        assert probe.finished is not None
        assert len(probe.token_ids) == 3
        await wait_for_baseline(mesh, baseline)
        topology = await mesh.gateway.refreshed_topology()
        assert topology.counters.failed == 0
        assert topology.counters.cancelled > STREAMS // 2  # the rest was cancelled before its request arrived
        assert topology.queue.cancelled > 0
        assert topology.queue.completed > 1
