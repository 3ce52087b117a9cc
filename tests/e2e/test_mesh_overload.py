"""What a mesh does when its workers are at the limits that the settings name."""

import asyncio
from typing import Any

import grpc
import httpx
import pytest

from kvmesh.testing.mesh import Answer, generate, open_frontend, running_mesh
from kvmesh.v1 import router_pb2, router_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

WAIT_S = 20.0
ONE_AT_A_TIME: dict[str, Any] = {
    "engine__name": "simulated",
    "engine__speedup": 1.0,
    "mesh__decode": 1,
    "mesh__prefill": 0,
    "router__max_requests_per_slot": 1.0,
    "engine__options__max_sequences": "1",
    "waits__request_s": 60.0,
}
LONG = 100_000
"""Tokens that nobody waits for."""


async def hold(frontend: Any) -> "asyncio.Task[Answer]":
    """Let a request run that ends when it is cancelled; returns once it has begun."""
    answer = Answer()
    task = asyncio.create_task(
        generate(frontend, "Hold the worker", into=answer, sampling={"max_tokens": LONG, "ignore_eos": True})
    )
    async with asyncio.timeout(WAIT_S):
        while not answer.text:  # noqa: ASYNC110  # what a stream said so far
            await asyncio.sleep(0.01)
    return task


async def end(task: "asyncio.Task[Answer]") -> None:
    task.cancel()
    await asyncio.wait([task])


async def test_without_an_admission_wait_overload_is_told_at_once_at_every_door() -> None:
    async with running_mesh(**ONE_AT_A_TIME) as mesh, open_frontend(mesh) as frontend:
        held = await hold(frontend)

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(frontend, "Me too")
        async with httpx.AsyncClient() as client:
            rest = await client.post(f"http://{mesh.http_address}/generate", json={"prompt": "Me too"}, timeout=WAIT_S)
        await end(held)

    error = from_rpc_error(refused.value)
    assert (error.reason.value, error.retry_after_s) == ("OVERLOADED", 1.0)
    assert "1 requests on 1 slots" in error.message
    assert rest.status_code == 429
    assert rest.headers["retry-after"] == "1"


async def test_with_an_admission_wait_a_request_is_served_when_there_is_room() -> None:
    async with (
        running_mesh(**ONE_AT_A_TIME, router__admission_wait_s=WAIT_S) as mesh,
        open_frontend(mesh) as frontend,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
    ):
        router = router_pb2_grpc.RouterStub(channel)
        held = await hold(frontend)
        waiting = asyncio.create_task(generate(frontend, "Me too", sampling={"max_tokens": 3}))
        async with asyncio.timeout(WAIT_S):
            while not (await router.ListWorkers(router_pb2.ListWorkersRequest())).admission_waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        with pytest.raises(grpc.aio.AioRpcError) as select_refused:
            await router.Select(
                router_pb2.SelectRequest(query=router_pb2.RoutingQuery(model="simulated", prompt_tokens=3))
            )
        await end(held)
        answer = await waiting

    assert answer.finished is not None
    assert answer.finished.usage.completion_tokens == 3
    assert from_rpc_error(select_refused.value).reason.value == "OVERLOADED"


async def test_a_wait_ends_before_the_callers_deadline_so_that_the_caller_learns_why() -> None:
    async with (
        running_mesh(**ONE_AT_A_TIME, router__admission_wait_s=WAIT_S) as mesh,
        open_frontend(mesh) as frontend,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
    ):
        held = await hold(frontend)
        query = router_pb2.RoutingQuery(model="simulated", prompt_tokens=3)

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await router_pb2_grpc.RouterStub(channel).Reserve(
                router_pb2.ReserveRequest(request_id="r", attempt=1, query=query), timeout=0.6
            )
        await end(held)

    assert from_rpc_error(refused.value).reason.value == "OVERLOADED"


async def test_a_separate_processor_waits_as_long_as_its_router() -> None:
    # The wait for room is longer than what a processor otherwise allows its router: waits.route_s + waits.connect_s.
    async with (
        running_mesh(
            **ONE_AT_A_TIME,
            mesh__router="separate",
            router__admission_wait_s=WAIT_S,
            waits__route_s=0.2,
            waits__connect_s=0.2,
        ) as mesh,
        open_frontend(mesh) as frontend,
    ):
        held = await hold(frontend)
        waiting = asyncio.create_task(generate(frontend, "Me too", sampling={"max_tokens": 3}))
        await asyncio.wait([waiting], timeout=1.0)  # longer than both together
        was_waiting = not waiting.done()
        await end(held)
        answer = await waiting

    assert was_waiting
    assert answer.finished is not None


@pytest.mark.parametrize("guard", [{}, {"router__imbalance_absolute": 2, "router__imbalance_relative": 1.0}])
async def test_the_guard_of_the_settings_bars_a_worker_that_is_far_busier(guard: dict[str, Any]) -> None:
    # Cached prompt blocks count so much that all goes to one worker, unless the guard bars it.
    weights: dict[str, Any] = {"router__overlap_credit": 1_000.0, "router__prefill_scale": 1_000.0}
    async with (
        running_mesh(engine__name="simulated", engine__speedup=1.0, mesh__prefill=0, **weights, **guard) as mesh,
        open_frontend(mesh) as frontend,
    ):
        prompt = "A prompt that everybody sends. " * 20
        first = await generate(frontend, prompt, sampling={"max_tokens": 1})
        answers = [Answer() for _ in range(6)]
        tasks = []
        for answer in answers:
            tasks.append(
                asyncio.create_task(
                    generate(frontend, prompt, into=answer, sampling={"max_tokens": LONG, "ignore_eos": True})
                )
            )
            async with asyncio.timeout(WAIT_S):
                while not answer.started.worker_id:  # noqa: ASYNC110  # as above
                    await asyncio.sleep(0.01)
        for task in tasks:
            await end(task)

    elsewhere = [answer for answer in answers if answer.started.worker_id != first.started.worker_id]
    assert bool(elsewhere) == bool(guard)
