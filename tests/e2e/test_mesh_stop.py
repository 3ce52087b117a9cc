"""The end of a mesh: bounded, typed, and nothing left behind; also of one that never came up."""

import asyncio
import socket
import threading
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from kvmesh.core.errors import Reason
from kvmesh.services.channels import PortTakenError
from kvmesh.testing.held_engine import held_plan
from kvmesh.testing.mesh import Answer, generate, open_frontend, running_mesh
from kvmesh.v1 import generation_pb2
from kvmesh.wire.error_catalog import from_rpc_error

STREAMS = 20
DRAIN_S = 1.0
BOUND_S = 20.0
SIMULATED: dict[str, Any] = {"engine__name": "simulated", "engine__options__block_size": "16"}
ENGINE_THREADS = "engine-"


def retried() -> float:
    """Count the requests that went to a second worker in this process."""
    return REGISTRY.get_sample_value("kvmesh_request_retries_total") or 0.0


def ended(wait: str) -> float:
    """Count the waits of this name that ran out in this process."""
    return REGISTRY.get_sample_value("kvmesh_wait_ended_total", {"wait": wait}) or 0.0


def engine_threads() -> int:
    return sum(thread.name.startswith(ENGINE_THREADS) for thread in threading.enumerate())


async def test_a_stop_lets_streams_finish_or_ends_them_typed_within_the_drain() -> None:
    async with running_mesh(waits__drain_s=DRAIN_S, mesh__prefill=1, **SIMULATED) as mesh:
        async with open_frontend(mesh) as frontend:
            loop = asyncio.get_running_loop()
            before = ended("drain_s")
            answers = [Answer() for _ in range(STREAMS)]
            short, long = range(STREAMS // 2), range(STREAMS // 2, STREAMS)
            tasks = [
                asyncio.create_task(
                    generate(
                        frontend,
                        f"stream {number}",
                        into=answers[number],
                        timeout_s=BOUND_S,
                        sampling=generation_pb2.SamplingParams(max_tokens=40 if number in short else 100_000),
                    )
                )
                for number in range(STREAMS)
            ]
            async with asyncio.timeout(BOUND_S):
                while not all(answer.token_ids for answer in answers):
                    await mesh.gateway.router.changed(until=loop.time() + 0.02)
            began = loop.time()

            await mesh.stop()

            stopped_after_s = loop.time() - began
            async with asyncio.timeout(BOUND_S):
                results = await asyncio.gather(*tasks, return_exceptions=True)
        assert stopped_after_s < DRAIN_S + 10.0
        assert all(answers[number].finished is not None for number in short)
        errors = [results[number] for number in long]
        assert all(isinstance(error, grpc.aio.AioRpcError) for error in errors)
        assert {from_rpc_error(error).reason for error in errors} == {Reason.DRAINING}  # type: ignore[arg-type]  # asserted above
        assert ended("drain_s") > before


async def test_a_request_without_a_token_yet_is_ended_by_the_stop_and_not_retried() -> None:
    plan, _ = held_plan()
    async with running_mesh(plan=plan, waits__drain_s=0.5, mesh__prefill=0) as mesh:
        async with open_frontend(mesh) as frontend:
            retries = retried()
            asked = asyncio.create_task(generate(frontend, "Too late", timeout_s=BOUND_S))
            async with asyncio.timeout(BOUND_S):
                while not mesh.topology().counters.reservations:
                    await mesh.gateway.router.changed(until=asyncio.get_running_loop().time() + 0.02)

            await mesh.stop()

            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await asked
        assert from_rpc_error(ended.value).reason is Reason.DRAINING
        assert retried() == retries


async def test_a_mesh_that_stops_takes_nothing_new() -> None:
    async with running_mesh(mesh__prefill=0) as mesh, open_frontend(mesh) as frontend:
        mesh.gateway.processor.draining = True

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(frontend, "Too late")

        assert from_rpc_error(refused.value).reason is Reason.DRAINING


async def test_stopping_twice_is_stopping_once() -> None:
    async with running_mesh(mesh__prefill=0) as mesh:
        await mesh.stop()

        await mesh.stop()

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async with open_frontend(mesh) as frontend:
            await generate(frontend, "Anybody?", timeout_s=BOUND_S)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_a_start_on_a_taken_port_names_it_and_leaves_nothing_behind(door: str) -> None:
    before = engine_threads()
    tasks_before = len(asyncio.all_tasks())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(PortTakenError, match=f"{port}.*--{door}-port"):
            async with running_mesh(**{f"{door}__port": port}):
                pytest.fail("it came up on a taken port")

    assert engine_threads() == before
    assert len(asyncio.all_tasks()) == tasks_before
