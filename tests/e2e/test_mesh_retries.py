"""Workers that die, and requests nobody can serve: answered elsewhere, or a typed error within its bound."""

import asyncio

import grpc
import pytest
from prometheus_client import REGISTRY

from kvmesh.core.errors import MeshError, Reason
from kvmesh.runtime.mesh import Mesh
from kvmesh.runtime.worker import Worker
from kvmesh.testing.held_engine import HeldEngine, held_plan
from kvmesh.testing.mesh import (
    Baseline,
    WorkerBaseline,
    generate,
    open_frontend,
    read_baseline,
    running_mesh,
    wait_for_baseline,
)
from kvmesh.v1 import frontend_pb2, generation_pb2
from kvmesh.wire.error_catalog import from_rpc_error

WITHIN_S = 10.0
MANY = 1_000
"""Steps: more than any request here takes."""


@pytest.fixture(params=["in memory", "over gRPC"], autouse=True)
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand the streams between the roles over in memory, or over gRPC as between processes."""
    monkeypatch.setenv("KVMESH_MESH__LOCAL_STREAMS", str(request.param == "in memory").lower())


def retried() -> float:
    """Count the requests that went to a second worker in this process."""
    return REGISTRY.get_sample_value("kvmesh_request_retries_total") or 0.0


def ended(wait: str) -> float:
    """Count the waits of this name that ran out in this process."""
    return REGISTRY.get_sample_value("kvmesh_wait_ended_total", {"wait": wait}) or 0.0


def error_of(failure: BaseException) -> MeshError:
    assert isinstance(failure, grpc.aio.AioRpcError)
    return from_rpc_error(failure)


async def busy_worker(mesh: Mesh, *, but: Worker | None = None) -> Worker:
    """Wait until a decode worker runs a request, another than `but`."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            for worker in mesh.workers:
                if worker is not but and (await worker.describe()).requests:
                    return worker
            await mesh.gateway.router.changed(until=asyncio.get_running_loop().time() + 0.05)


def release(engines: dict[str, HeldEngine]) -> None:
    for engine in engines.values():
        engine.allow(MANY)


async def test_a_worker_that_dies_before_the_first_token_is_replaced() -> None:
    plan, engines = held_plan()
    async with running_mesh(plan=plan, mesh__prefill=0) as mesh, open_frontend(mesh) as frontend:
        retries = retried()
        asked = asyncio.create_task(generate(frontend, "Survive me please"))
        dying = await busy_worker(mesh)

        await dying.aclose()
        release(engines)
        answer = await asked

        assert answer.started.attempt == 2
        assert answer.started.worker_id != dying.identity.worker_id
        survivor = answer.started.worker_id.split("/")[0]
        assert answer.text == f"Survive me please_GeneratedBy_{survivor}"
        assert answer.finished is not None
        assert retried() == retries + 1
        await nothing_is_held(mesh)


def break_engine(worker: Worker, engines: dict[str, HeldEngine]) -> None:
    engines[worker.identity.worker_id.split("/")[0]].break_down()


async def test_a_request_whose_engine_breaks_before_the_first_token_is_answered_by_another() -> None:
    plan, engines = held_plan()
    async with running_mesh(plan=plan, mesh__prefill=0) as mesh, open_frontend(mesh) as frontend:
        asked = asyncio.create_task(generate(frontend, "Survive me too"))
        broken = await busy_worker(mesh)

        break_engine(broken, engines)
        release(engines)
        answer = await asked

        assert answer.started.attempt == 2
        assert answer.started.worker_id != broken.identity.worker_id
        assert answer.text.startswith("Survive me too_GeneratedBy_")


@pytest.mark.parametrize(
    ("ends", "reasons"),
    [("engine", {Reason.WORKER_LOST}), ("worker", {Reason.WORKER_LOST, Reason.DRAINING})],
)
async def test_a_request_whose_worker_ends_after_the_first_token_fails_typed_and_says_no_more(
    ends: str, reasons: set[Reason]
) -> None:
    plan, engines = held_plan(steps=1)
    async with running_mesh(plan=plan, mesh__prefill=0) as mesh, open_frontend(mesh) as frontend:
        call = frontend.Generate(
            frontend_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="One word and no more")), timeout=WITHIN_S
        )
        events = aiter(call)
        started = (await anext(events)).started
        first = (await anext(events)).chunk

        ending = await busy_worker(mesh)
        if ends == "engine":
            break_engine(ending, engines)
        else:
            await ending.aclose()
        rest = []
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            rest += [event async for event in events]

        assert rest == []
        assert started.attempt == 1
        assert first.text == "One "
        assert error_of(lost.value).reason in reasons
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        await nothing_is_held(mesh)


async def test_a_worker_that_cannot_be_reached_costs_one_bounded_wait_and_no_request() -> None:
    async with (
        running_mesh(mesh__prefill=0, router__policy="prompt_similarity", waits__connect_s=0.5) as mesh,
        open_frontend(mesh) as frontend,
    ):
        before = ended("connect_s")
        await mesh.workers[0].aclose()  # its record stays, as that of a process that was killed does for a while

        answer = await generate(frontend, "Where are you", timeout_s=WITHIN_S)

        assert (answer.started.attempt, answer.started.worker_id) == (2, "NODE2/decode/1")
        assert ended("connect_s") == before + 1
        await nothing_is_held(mesh)


async def test_a_request_that_two_workers_lost_is_not_given_to_a_third() -> None:
    plan, engines = held_plan()
    async with running_mesh(plan=plan, mesh__decode=3, mesh__prefill=0) as mesh, open_frontend(mesh) as frontend:
        asked = asyncio.create_task(generate(frontend, "Poison"))

        first = await busy_worker(mesh)
        await first.aclose()
        second = await busy_worker(mesh, but=first)
        await second.aclose()
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await asked

        assert error_of(lost.value).reason in {Reason.WORKER_LOST, Reason.DRAINING}
        assert mesh.topology().counters.failed == 1
        release(engines)
        await nothing_is_held(mesh)


async def test_without_any_worker_a_request_waits_for_one_and_ends_with_no_workers() -> None:
    async with running_mesh(mesh__prefill=0, waits__route_s=0.5) as mesh, open_frontend(mesh) as frontend:
        before = ended("route_s")
        for worker in mesh.workers:
            await worker.stop()
        began = asyncio.get_running_loop().time()

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(frontend, "Anybody?", model="echo")

        waited_s = asyncio.get_running_loop().time() - began
        assert error_of(refused.value).reason is Reason.NO_WORKERS
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert 0.5 <= waited_s < WITHIN_S
        assert ended("route_s") == before + 1


async def test_a_model_that_nobody_serves_is_refused_at_once() -> None:
    async with running_mesh(mesh__prefill=0, waits__route_s=20.0) as mesh, open_frontend(mesh) as frontend:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(frontend, "Hello", model="gpt-9", timeout_s=WITHIN_S)

        assert error_of(refused.value).reason is Reason.UNKNOWN_MODEL
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def nothing_is_held(mesh: Mesh) -> None:
    """Wait until no living worker, booking or queue holds anything."""
    found = await read_baseline(mesh)
    await wait_for_baseline(mesh, Baseline(workers=dict.fromkeys(found.workers, WorkerBaseline())), within_s=WITHIN_S)
