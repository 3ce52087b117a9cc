"""Clients that go away: nothing of theirs is left in an engine, a booking or the queue, whatever door they came by."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.held_engine import held_plan
from kvmesh.testing.mesh import generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.v1 import frontend_pb2, generation_pb2

if TYPE_CHECKING:
    from kvmesh.v1.frontend_pb2_grpc import FrontendAsyncStub

SIMULATED: dict[str, Any] = {
    "engine__name": "simulated",
    "engine__options__block_size": "16",
    "remote_prefill__min_uncached_tokens": 16,
}
LONG = 100_000
"""Output tokens: a request that ends only when somebody ends it."""
BOUND_S = 30.0
STREAMS = 200
STORM_S = 4.0
"""The longest that one of them lives that does not wait for output."""


@pytest.fixture(params=["in memory", "over gRPC"], autouse=True)
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand the streams between the roles over in memory, or over gRPC as between processes."""
    monkeypatch.setenv("KVMESH_MESH__LOCAL_STREAMS", str(request.param == "in memory").lower())


@dataclass
class Clients:
    """Clients of every door, shared by many streams."""

    http: httpx.AsyncClient
    frontend: "FrontendAsyncStub"


@asynccontextmanager
async def open_clients(mesh: Mesh) -> AsyncIterator[Clients]:
    async with (
        httpx.AsyncClient(
            base_url=f"http://{mesh.http_address}",
            trust_env=False,
            timeout=BOUND_S,
            limits=httpx.Limits(max_connections=None),
        ) as http,
        open_frontend(mesh) as frontend,
    ):
        yield Clients(http, frontend)


async def by_completions(clients: Clients, model: str, prompt: str) -> AsyncGenerator[None, None]:
    body = {"model": model, "prompt": prompt, "max_tokens": LONG, "stream": True}
    async with clients.http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            assert "error" not in line
            yield


async def by_rest(clients: Clients, model: str, prompt: str) -> AsyncGenerator[None, None]:
    body = {"model": model, "prompt": {"text": prompt}, "sampling": {"max_tokens": LONG}}
    async with clients.http.stream("POST", "/mesh/v1/generate", json=body) as response:
        async for line in response.aiter_lines():
            assert "error" not in line
            if '"chunk"' in line:
                yield


async def by_grpc(clients: Clients, model: str, prompt: str) -> AsyncGenerator[None, None]:
    request = frontend_pb2.GenerateRequest(
        model=model,
        prompt=generation_pb2.Prompt(text=prompt),
        sampling=generation_pb2.SamplingParams(max_tokens=LONG),
    )
    call = clients.frontend.Generate(request, timeout=BOUND_S)
    try:
        async for event in call:
            if event.HasField("chunk"):
                yield
    finally:
        call.cancel()


Talk = Callable[[Clients, str, str], AsyncGenerator[None, None]]
"""Opens a stream, yields at every output, and hangs up when it is closed."""
DOORS: tuple[Talk, ...] = (by_completions, by_rest, by_grpc)


async def listen(outputs: AsyncGenerator[None, None], first: "asyncio.Future[None]") -> None:
    """Tell `first` of the first output, then read until cancelled."""
    async with aclosing(outputs):
        async for _ in outputs:
            if not first.done():
                first.set_result(None)


async def hang_up(listening: "asyncio.Task[None]") -> None:
    listening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listening


@pytest.mark.parametrize("talk", DOORS, ids=["sse", "ndjson", "grpc"])
@pytest.mark.parametrize("prefill", [0, 1], ids=["aggregated", "disaggregated"])
async def test_what_a_client_that_hung_up_mid_stream_held_is_given_back(talk: Talk, prefill: int) -> None:
    async with running_mesh(mesh__prefill=prefill, **SIMULATED) as mesh, open_clients(mesh) as clients:
        baseline = await read_baseline(mesh)
        first = asyncio.get_running_loop().create_future()
        listening = asyncio.create_task(listen(talk(clients, "simulated", "a" * 100), first))
        async with asyncio.timeout(BOUND_S):
            await first
        busy = await read_baseline(mesh)

        await hang_up(listening)

        assert busy.running == busy.reservations == 1
        assert sum(worker.requests for worker in busy.workers.values()) == 1
        assert sum(worker.used_blocks for worker in busy.workers.values()) >= 100 // 16
        await wait_for_baseline(mesh, baseline)
        assert mesh.topology().counters.cancelled == 1
        assert mesh.topology().counters.failed == 0


@pytest.mark.parametrize("talk", DOORS, ids=["sse", "ndjson", "grpc"])
async def test_a_client_that_hung_up_before_the_first_token_leaves_nothing(talk: Talk) -> None:
    plan, _ = held_plan()
    async with running_mesh(plan=plan, mesh__prefill=1) as mesh, open_clients(mesh) as clients:
        baseline = await read_baseline(mesh)
        never = asyncio.get_running_loop().create_future()
        listening = asyncio.create_task(listen(talk(clients, "held", "never answered"), never))
        async with asyncio.timeout(BOUND_S):
            while (await read_baseline(mesh)).running == 0:
                await mesh.gateway.router.changed(until=asyncio.get_running_loop().time() + 0.05)

        await hang_up(listening)

        assert not never.done()
        await wait_for_baseline(mesh, baseline)
        assert mesh.topology().counters.cancelled == 1


@pytest.mark.parametrize("seed", [1, 2])
async def test_after_a_storm_of_cancelled_streams_nothing_is_held_and_a_probe_succeeds(seed: int) -> None:
    rng = random.Random(seed)
    async with (
        running_mesh(mesh__decode=2, mesh__prefill=1, waits__request_s=60.0, **SIMULATED) as mesh,
        open_clients(mesh) as clients,
    ):
        baseline = await read_baseline(mesh)

        def begin(number: int) -> AsyncGenerator[None, None]:
            prompt = chr(ord("a") + number % 26) * (40 + number)
            return DOORS[number % len(DOORS)](clients, "simulated", prompt)

        async def leave_by_time(number: int, cancel_after_s: float) -> str:
            first = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(cancel_after_s):
                    await listen(begin(number), first)
            except TimeoutError:
                return "mid-stream" if first.done() else "before the first token"
            return "ended"

        async def leave_mid_stream(number: int, after_outputs: int) -> str:
            async with aclosing(begin(number)) as outputs:
                async for _ in outputs:
                    after_outputs -= 1
                    if not after_outputs:
                        return "mid-stream"
            return "ended"

        ends = await asyncio.gather(
            *(leave_by_time(number, rng.uniform(0.0, STORM_S)) for number in range(0, STREAMS, 2)),
            *(leave_mid_stream(number, rng.randint(1, 4)) for number in range(1, STREAMS, 2)),
        )

        assert ends.count("mid-stream") >= STREAMS // 2
        assert ends.count("before the first token") > STREAMS // 20
        assert "ended" not in ends
        await wait_for_baseline(mesh, baseline, within_s=BOUND_S)
        probe = await generate(
            clients.frontend, "z" * 100, sampling=generation_pb2.SamplingParams(max_tokens=3), timeout_s=BOUND_S
        )
        assert probe.finished is not None
        assert len(probe.token_ids) == 3
        await wait_for_baseline(mesh, baseline)
        topology = await mesh.gateway.refreshed_topology()
        assert topology.counters.failed == 0
        assert topology.counters.cancelled > STREAMS // 2  # some were cancelled before they arrived
        assert topology.queue.submitted > STREAMS // 4
        assert topology.queue.dead == 0
