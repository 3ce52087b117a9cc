"""Whether a worker is ready is one thing, whether it lives another, and whether it is asked a third."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.runtime.server import GrpcServer
from kvmesh.runtime.worker import Worker
from kvmesh.testing.held_transport import HeldPulls
from kvmesh.testing.mesh import generate, open_frontend, running_mesh
from kvmesh.testing.tcp_proxy import TcpProxy
from kvmesh.testing.worker_group import GENEROUS_S, NAMESPACE, WorkerGroup, eventually, request
from kvmesh.transports.memory import MemoryTransport
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.v1 import worker_control_pb2
from kvmesh.wire.error_catalog import from_rpc_error

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ROLE_SERVICES = {WorkerRole.DECODE: "kvmesh.v1.DecodeWorker", WorkerRole.PREFILL: "kvmesh.v1.PrefillWorker"}


async def check(group: WorkerGroup, address: str, service: str) -> Any:
    stub = health_pb2_grpc.HealthStub(group.channel(address))
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=GENEROUS_S)).status


async def liveness(group: WorkerGroup, worker: Worker) -> list[Any]:
    return [await check(group, worker.address, name) for name in ("", "liveness")]


class Watched:
    """What a stock client hears of the readiness of one worker."""

    def __init__(self, group: WorkerGroup, worker: Worker) -> None:
        role = WorkerRole(worker.name.split("/")[1])
        stub = health_pb2_grpc.HealthStub(group.channel(worker.address))
        self._call = stub.Watch(health_pb2.HealthCheckRequest(service=ROLE_SERVICES[role]), timeout=GENEROUS_S)

    async def next(self) -> Any:
        return (await self._call.read()).status

    def close(self) -> None:
        self._call.cancel()


@asynccontextmanager
async def watching(group: WorkerGroup, worker: Worker) -> AsyncIterator[Watched]:
    watched = Watched(group, worker)
    try:
        yield watched
    finally:
        watched.close()


def lacking(part: str) -> float:
    return REGISTRY.get_sample_value("kvmesh_workers_lacking", {"part": part}) or 0.0


def queue_record(address: str) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId("node/queue/9"),
        epoch=Epoch(1),
        role=WorkerRole.QUEUE,
        models=(),
        namespace=NAMESPACE,
        block_size=1,
        address=address,
    )


class Losing:
    """A transport whose pulls lose their blocks while it is told so."""

    def __init__(self, group: WorkerGroup) -> None:
        self.loses = False
        self.transport = HeldPulls(MemoryTransport(group.network), spoil=self._lose)

    def _lose(self, block: npt.NDArray[np.uint8]) -> None:
        if self.loses:
            raise TryElsewhereError(Reason.KV_TRANSFER_FAILED, "the cable is cut")


def prompt(first: int) -> tuple[int, ...]:
    """Return a prompt of four blocks that begins like no other."""
    return tuple(range(first, first + 18))


async def test_decode_worker_that_loses_its_queue_is_not_ready_until_there_is_one_again(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    decode, _ = await group.add_decode(), await group.add_prefill()
    async with watching(group, decode) as health:
        before = await health.next()
        await queue.stop()
        lost = await health.next()
        alive = await liveness(group, decode)
        await eventually(lambda: lacking("queue") == 2)  # of the decode and the prefill worker
        await group.add_queue()
        back = await health.next()

    assert (before, lost, back) == (SERVING, NOT_SERVING, SERVING)
    assert alive == [SERVING, SERVING]
    await eventually(lambda: lacking("queue") == 0)


async def test_decode_worker_without_its_queue_answers_all_the_same(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    decode, _ = await group.add_decode(), await group.add_prefill()
    async with watching(group, decode) as health:
        await health.next()
        await queue.stop()
        status = await health.next()

    answer = await group.generate(decode, request("r"))

    assert status == NOT_SERVING
    assert answer.usage.completion_tokens == 3
    assert [decision.reason for decision in answer.decisions] == ["remote", "fallback_prefill_failed"]


async def test_queue_that_cannot_be_reached_is_lost_as_well_as_one_that_is_not_known(group: WorkerGroup) -> None:
    queue = GrpcServer()
    proxy = TcpProxy(await queue.start("127.0.0.1", 0))
    await proxy.start()
    await group.discovery.register(queue_record(proxy.address))
    decode, _ = await group.add_decode(), await group.add_prefill()
    async with watching(group, decode) as health:
        before = await health.next()
        await proxy.cut()
        lost = await health.next()
        alive = await liveness(group, decode)
        proxy.restore()
        back = await health.next()
    await proxy.aclose()
    await queue.drain_and_stop(GENEROUS_S)

    assert (before, lost, back) == (SERVING, NOT_SERVING, SERVING)
    assert alive == [SERVING, SERVING]


async def test_decode_worker_of_a_mesh_without_prefill_workers_needs_no_queue(group: WorkerGroup) -> None:
    decode = await group.add_decode()

    assert await check(group, decode.address, "kvmesh.v1.DecodeWorker") == SERVING


async def test_decode_worker_whose_prefills_must_be_remote_needs_the_queue_from_the_start(group: WorkerGroup) -> None:
    decode = await group.add_decode(required=True)
    async with watching(group, decode) as health:
        without = await health.next()
        if without == SERVING:  # it has just started, and has not heard of discovery yet
            without = await health.next()
        await group.add_queue()
        back = await health.next()

    assert (without, back) == (NOT_SERVING, SERVING)


async def test_workers_that_need_no_queue_are_ready_without_it(group: WorkerGroup) -> None:
    decode = await group.add_decode(direct=True)
    prefill = await group.add_prefill(pulls=False)

    assert await check(group, decode.address, "kvmesh.v1.DecodeWorker") == SERVING
    assert await check(group, prefill.address, "kvmesh.v1.PrefillWorker") == SERVING


async def test_prefill_worker_is_ready_while_it_is_attached_to_a_queue(group: WorkerGroup) -> None:
    prefill = await group.add_prefill()
    async with watching(group, prefill) as health:
        before = await health.next()
        alive = await liveness(group, prefill)
        queue = await group.add_queue()
        attached = await health.next()
        await queue.stop()
        lost = await health.next()

    assert (before, attached, lost) == (NOT_SERVING, SERVING, NOT_SERVING)
    assert alive == [SERVING, SERVING]


async def test_decode_worker_that_cannot_fetch_blocks_is_not_ready_until_it_can(group: WorkerGroup) -> None:
    cable = Losing(group)
    await group.add_queue()
    decode, _ = await group.add_decode(transport=cable.transport), await group.add_prefill()
    async with watching(group, decode) as health:
        before = await health.next()
        cable.loses = True
        answer = await group.generate(decode, request("r", tokens=prompt(0)))
        lost = await health.next()
        alive = await liveness(group, decode)
        cable.loses = False
        await group.generate(decode, request("s", tokens=prompt(100)))
        back = await health.next()

    assert (before, lost, back) == (SERVING, NOT_SERVING, SERVING)
    assert alive == [SERVING, SERVING]
    assert answer.usage.completion_tokens == 3
    assert [decision.reason for decision in answer.decisions] == ["remote", "fallback_kv_transfer_failed"]


async def test_source_that_is_gone_does_not_keep_a_worker_unready(group: WorkerGroup) -> None:
    cable = Losing(group)
    await group.add_queue()
    decode, prefill = await group.add_decode(transport=cable.transport), await group.add_prefill()
    async with watching(group, decode) as health:
        await health.next()
        cable.loses = True
        await group.generate(decode, request("r"))
        lost = await health.next()
        await prefill.stop()
        back = await health.next()

    assert (lost, back) == (NOT_SERVING, SERVING)


async def test_source_that_fails_beside_one_that_does_not_is_its_own_trouble(group: WorkerGroup) -> None:
    cable = Losing(group)
    await group.add_queue()
    decode = await group.add_decode(transport=cable.transport)
    for _ in range(2):
        await group.add_prefill()
    cable.loses = True

    answer = await group.generate(decode, request("r"))

    assert [decision.reason for decision in answer.decisions] == ["remote", "fallback_kv_transfer_failed"]
    assert await check(group, decode.address, "kvmesh.v1.DecodeWorker") == SERVING


async def test_prefill_worker_whose_blocks_nothing_serves_is_not_ready(group: WorkerGroup) -> None:
    await group.add_queue()

    prefill = await group.add_prefill(transport=SharedMemoryTransport())  # the pool of its engine lies elsewhere

    assert await check(group, prefill.address, "kvmesh.v1.PrefillWorker") == NOT_SERVING
    assert await liveness(group, prefill) == [SERVING, SERVING]


async def test_drain_outlasts_what_a_worker_has_again(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    prefill = await group.add_prefill()
    async with watching(group, prefill) as health:
        await health.next()
        await group.control(prefill).Drain(worker_control_pb2.DrainRequest(), timeout=GENEROUS_S)
        drained = await health.next()
    await queue.stop()
    await group.add_queue()

    assert drained == NOT_SERVING
    assert await check(group, prefill.address, "kvmesh.v1.PrefillWorker") == NOT_SERVING
    assert await liveness(group, prefill) == [NOT_SERVING, SERVING]


async def test_gateway_without_workers_is_reached_and_says_that_it_has_none() -> None:
    async with running_mesh(mesh__decode=1, mesh__prefill=0) as mesh, open_frontend(mesh) as frontend:
        async with httpx.AsyncClient(base_url=f"http://{mesh.http_address}") as http:
            ready = (await http.get("/readyz")).status_code
            await mesh.workers[0].stop()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await generate(frontend, "Hello")
            unready = await http.get("/readyz")
            alive = (await http.get("/healthz")).status_code
        async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            question = health_pb2.HealthCheckRequest(service="kvmesh.v1.Frontend")
            frontend_health = (await stub.Check(question, timeout=GENEROUS_S)).status

    assert (ready, unready.status_code, alive) == (200, 503, 200)
    assert "no decode worker takes requests" in unready.text
    assert from_rpc_error(refused.value).reason is Reason.NO_WORKERS
    assert frontend_health == SERVING
