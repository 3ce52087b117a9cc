"""Every bounded wait of a request: a typed end within its bound, a metric, and nothing held afterwards."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import orjson
import pytest
from prometheus_client import REGISTRY

from kvmesh.core.errors import MeshError, Reason
from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.held_engine import HeldEngine, held_plan
from kvmesh.testing.mesh import Answer, generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2, worker_control_pb2, worker_control_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

BOUND_S = 20.0
SIMULATED: dict[str, Any] = {"engine__name": "simulated", "engine__options__block_size": "16", "mesh__prefill": 0}


def error_of(failure: BaseException) -> MeshError:
    assert isinstance(failure, grpc.aio.AioRpcError)
    return from_rpc_error(failure)


def ended(wait: str) -> float:
    """Count the waits of this name that ran out in this process."""
    return REGISTRY.get_sample_value("kvmesh_wait_ended_total", {"wait": wait}) or 0.0


def sampling(max_tokens: int) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(max_tokens=max_tokens)


async def test_a_client_whose_deadline_passes_is_told_and_the_engine_is_empty_soon() -> None:
    async with running_mesh(engine__speedup=0.1, **SIMULATED) as mesh, open_frontend(mesh) as frontend:
        baseline = await read_baseline(mesh)

        with pytest.raises(grpc.aio.AioRpcError) as late:
            await generate(frontend, "x" * 100, sampling=sampling(10_000), timeout_s=0.2)

        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await wait_for_baseline(mesh, baseline)
        counters = mesh.topology().counters
        assert counters.failed + counters.cancelled == 1  # whichever notices first, the client's side or the mesh's


async def test_a_rest_client_whose_deadline_passes_before_the_first_token_gets_504() -> None:
    plan, _ = held_plan()
    async with running_mesh(plan=plan, mesh__prefill=0) as mesh:
        baseline = await read_baseline(mesh)
        async with httpx.AsyncClient(trust_env=False, timeout=BOUND_S) as client:
            response = await client.post(
                f"http://{mesh.http_address}/generate", json={"prompt": "x"}, headers={"Grpc-Timeout": "200m"}
            )

        assert response.status_code == 504
        assert response.json()["details"][0]["reason"] == "DEADLINE"
        await wait_for_baseline(mesh, baseline)


@pytest.mark.parametrize("steps", [0, 1], ids=["before-the-first-token", "after-it"])
async def test_a_client_that_sets_no_deadline_gets_the_settings(steps: int) -> None:
    plan, _ = held_plan(steps=steps)
    async with running_mesh(plan=plan, mesh__prefill=0, waits__request_s=0.5) as mesh:
        baseline = await read_baseline(mesh)
        before = ended("request_s")
        async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
            call = frontend_pb2_grpc.FrontendStub(channel).Generate(
                frontend_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="no hurry at all"))
            )
            async with asyncio.timeout(BOUND_S):
                with pytest.raises(grpc.aio.AioRpcError) as late:
                    _ = [event async for event in call]

        assert error_of(late.value).reason is Reason.DEADLINE
        assert ended("request_s") >= before + 1
        await wait_for_baseline(mesh, baseline)


async def test_no_first_token_in_time_means_one_retry_and_then_worker_lost() -> None:
    plan, _ = held_plan()
    async with (
        running_mesh(plan=plan, mesh__decode=3, mesh__prefill=0, waits__first_token_s=0.4) as mesh,
        open_frontend(mesh) as frontend,
    ):
        baseline = await read_baseline(mesh)
        before = ended("first_token_s")

        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await generate(frontend, "silence", timeout_s=BOUND_S)

        assert error_of(lost.value).reason is Reason.WORKER_LOST
        assert ended("first_token_s") == before + 2
        await wait_for_baseline(mesh, baseline)


async def test_a_worker_that_falls_silent_between_tokens_ends_the_request_with_worker_lost() -> None:
    plan, engines = held_plan(steps=2)
    async with (
        running_mesh(plan=plan, mesh__prefill=0, waits__token_gap_s=0.4) as mesh,
        open_frontend(mesh) as frontend,
    ):
        baseline = await read_baseline(mesh)
        before = ended("token_gap_s")
        answer = Answer()

        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await generate(frontend, "one two three four", into=answer, timeout_s=BOUND_S)

        assert error_of(lost.value).reason is Reason.WORKER_LOST
        assert answer.text == "one two "
        assert answer.started.attempt == 1
        assert ended("token_gap_s") == before + 1
        await wait_for_baseline(mesh, baseline)
        assert {node: engine.load().active_requests for node, engine in engines.items()} == {"NODE1": 0, "NODE2": 0}


async def test_a_prefill_that_takes_too_long_is_computed_locally() -> None:
    plan, engines = held_plan()
    async with (
        running_mesh(
            plan=plan, mesh__decode=1, mesh__prefill=1, waits__prefill_s=0.4, waits__first_token_s=4.0
        ) as mesh,
        open_frontend(mesh) as frontend,
    ):
        baseline = await read_baseline(mesh)
        before = ended("prefill_s")
        engines["NODE1"].allow(100)

        answer = await generate(frontend, "patience", timeout_s=BOUND_S)

        assert answer.text == "patience_GeneratedBy_NODE1"
        assert not answer.started.prefill.remote
        assert answer.started.prefill.reason == "fallback_prefill_failed"
        assert ended("prefill_s") == before + 1
        await wait_for_baseline(mesh, baseline)


async def test_a_drain_cancels_what_still_runs_when_its_time_is_up() -> None:
    plan, _ = held_plan(steps=1)
    async with (
        running_mesh(plan=plan, mesh__decode=1, mesh__prefill=0) as mesh,
        open_frontend(mesh) as frontend,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
    ):
        baseline = await read_baseline(mesh)
        before = ended("drain_s")
        answer = Answer()
        asked = asyncio.create_task(generate(frontend, "one two three", into=answer, timeout_s=BOUND_S))
        async with asyncio.timeout(BOUND_S):
            while not answer.text:
                await mesh.gateway.router.changed(until=asyncio.get_running_loop().time() + 0.02)
        request = worker_control_pb2.DrainRequest(worker_id="NODE1/decode/0")
        request.timeout.FromMilliseconds(300)

        drained = await worker_control_pb2_grpc.WorkerControlStub(channel).Drain(request, timeout=BOUND_S)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await asked

        assert (drained.finished, drained.cancelled) == (0, 1)
        assert error_of(cut.value).reason is Reason.DRAINING
        assert ended("drain_s") == before + 1
        await wait_for_baseline(mesh, baseline)


@asynccontextmanager
async def client_that_never_reads(mesh: Mesh, body: bytes) -> AsyncIterator[socket.socket]:
    """Ask for a stream by HTTP and read nothing of the answer until the block is over."""
    host, port = mesh.http_address.rsplit(":", 1)
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        await loop.sock_sendall(client, head.encode() + body)
        yield client


async def test_a_client_that_never_reads_is_cut_off_and_its_engine_freed() -> None:
    model = "m" * 4_000  # every event repeats it: the buffers on the way are full soon
    body = orjson.dumps({"model": model, "prompt": "talk to me", "max_tokens": 100_000, "stream": True})
    async with running_mesh(engine__speedup=10, engine__model_name=model, **SIMULATED) as mesh:
        baseline = await read_baseline(mesh)
        async with client_that_never_reads(mesh, body) as client:
            async with asyncio.timeout(BOUND_S):
                while (await read_baseline(mesh)).running == 0:
                    await mesh.gateway.router.changed(until=asyncio.get_running_loop().time() + 0.02)

            # The engine is freed while the client is still there and silent.
            async with asyncio.timeout(BOUND_S):
                while (await read_baseline(mesh)).workers != baseline.workers:
                    await mesh.gateway.router.changed(until=asyncio.get_running_loop().time() + 0.05)

            received = bytearray()
            async with asyncio.timeout(BOUND_S):
                while chunk := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
                    received += chunk
                    if b"slow_consumer" in received[-16_384:]:
                        break
        assert b'"code":"slow_consumer"' in received[-16_384:]
        assert b"[DONE]" not in received
        await wait_for_baseline(mesh, baseline)
        assert mesh.topology().counters.failed == 1


async def test_a_grpc_client_that_stops_reading_is_cut_off_and_its_engine_freed() -> None:
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
    async with (
        running_mesh(engine__speedup=0, **SIMULATED) as mesh,
        grpc.aio.insecure_channel(mesh.grpc_address, options=small_window) as channel,
    ):
        baseline = await read_baseline(mesh)
        call = frontend_pb2_grpc.FrontendStub(channel).Generate(
            frontend_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="talk to me"), sampling=sampling(100_000)),
            timeout=BOUND_S * 2,
        )
        events = aiter(call)
        assert (await anext(events)).HasField("started")

        # The engine is freed while the client is still there and silent.
        async with asyncio.timeout(BOUND_S):
            while (await read_baseline(mesh)).workers != baseline.workers:
                await mesh.gateway.router.changed(until=asyncio.get_running_loop().time() + 0.05)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            _ = [event async for event in events]

        assert error_of(cut.value).reason is Reason.SLOW_CONSUMER
        assert cut.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await wait_for_baseline(mesh, baseline)
        assert mesh.topology().counters.failed == 1


async def test_a_held_engine_that_is_let_go_answers() -> None:
    """Guard of the tests above: what they wait for is the hold, nothing else."""
    plan, engines = held_plan()
    async with running_mesh(plan=plan, mesh__prefill=0) as mesh, open_frontend(mesh) as frontend:
        for engine in engines.values():
            engine.allow(100)

        answer = await generate(frontend, "all good", timeout_s=BOUND_S)

        assert answer.text.startswith("all good_GeneratedBy_NODE")
        assert all(isinstance(engine, HeldEngine) for engine in engines.values())
