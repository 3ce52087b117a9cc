"""Router services over the same workers that tell each other nothing: the workers' reports are all they share."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest

from kvmesh.core.ids import RouterId, WorkerId
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.engines.engine import EngineLoad
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.router import Router
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.v1 import generation_pb2, router_pb2, router_pb2_grpc, worker_events_pb2

if TYPE_CHECKING:
    from kvmesh.v1.router_pb2_grpc import RouterAsyncStub

WAIT_S = 20.0
REQUESTS = 24


@dataclass
class Replica:
    """One router process: its service, and a client of it."""

    router: LocalRouter
    stub: "RouterAsyncStub"

    async def hears(self, cast: "Cast") -> None:
        """Wait until it knows what every worker carries."""
        async with asyncio.timeout(WAIT_S):
            while not cast.is_known_to(self):
                await self.router.changed()

    async def reserve(self, number: int) -> router_pb2.ReserveResponse:
        tokens = generation_pb2.TokenIds(token_ids=range(100 * number, 100 * number + 64))
        return await self.stub.Reserve(
            router_pb2.ReserveRequest(
                request_id=f"request {number}", attempt=1, query=router_pb2.RoutingQuery(model="m", token_ids=tokens)
            ),
            timeout=WAIT_S,
        )

    async def listed(self) -> dict[str, tuple[int, int, int]]:
        response = await self.stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=WAIT_S)
        return {
            worker.worker_id: (worker.active_requests, worker.active_prefill_tokens, worker.active_blocks)
            for worker in response.workers
        }


@asynccontextmanager
async def replica(discovery: MemoryDiscovery, name: str) -> AsyncIterator[Replica]:
    router = LocalRouter(
        discovery=discovery,
        namespace="default",
        router_id=RouterId(name),
        policy=build_policy("kv_aware"),
        rng=random.Random(name),
    )
    router.start()
    service = Router(router, waits=Waits(route_s=1.0))
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    router_pb2_grpc.add_RouterServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Replica(router, router_pb2_grpc.RouterStub(channel))
            service.close()
    finally:
        await server.stop(None)
        await router.aclose()


class Cast:
    """Scripted workers that report what the test lets run on them: 64 prompt tokens and 4 blocks each."""

    def __init__(self, workers: list[ScriptedWorker]) -> None:
        self._workers = {worker.worker_id: worker for worker in workers}
        self._running: dict[WorkerId, dict[str, list[int]]] = {worker.worker_id: {} for worker in workers}

    def take(self, booked: router_pb2.ReserveResponse) -> None:
        """Run a booked request, and say so."""
        worker = self._workers[WorkerId(booked.worker.worker_id)]
        by_router = self._running[worker.worker_id]
        by_router.setdefault(booked.router_id, []).append(booked.reservation_id)
        shares = [
            worker_events_pb2.RouterShare(
                router_id=router_id,
                active_requests=len(bookings),
                prefill_tokens=64 * len(bookings),
                decode_blocks=4 * len(bookings),
            )
            for router_id, bookings in by_router.items()
        ]
        worker.say(
            load=EngineLoad(active_requests=self.total(worker.worker_id)),
            shares=shares,
            reservation_ids={router_id: list(bookings) for router_id, bookings in by_router.items()},
        )

    def total(self, worker_id: WorkerId) -> int:
        return sum(map(len, self._running[worker_id].values()))

    def truth(self) -> dict[str, tuple[int, int, int]]:
        totals = {worker_id: self.total(worker_id) for worker_id in self._workers}
        return {worker_id: (total, 64 * total, 4 * total) for worker_id, total in totals.items()}

    def is_known_to(self, one: Replica) -> bool:
        states = {state.worker.worker_id: state for state in one.router.workers()}
        return all(
            (state := states.get(worker_id)) is not None
            and state.report is not None
            and state.report.active_requests == self.total(worker_id)
            for worker_id in self._workers
        )


@pytest.fixture
async def cast() -> AsyncIterator[tuple[MemoryDiscovery, Cast]]:
    async with AsyncExitStack() as stack:
        discovery = MemoryDiscovery()
        workers = []
        for number in range(4):
            workers.append(await ScriptedWorker.start(discovery, number))
            stack.push_async_callback(workers[-1].aclose)
        yield discovery, Cast(workers)


def turns(replicas: list[Replica]) -> Iterator[tuple[int, Replica]]:
    for number in range(REQUESTS):
        yield number, replicas[number % 2]


async def test_services_that_never_speak_share_the_workers_evenly(cast: tuple[MemoryDiscovery, Cast]) -> None:
    discovery, workers = cast
    async with replica(discovery, "router-a") as one, replica(discovery, "router-b") as other:
        for number, asked in turns([one, other]):
            await asked.hears(workers)
            workers.take(await asked.reserve(number))
        for each in (one, other):
            await each.hears(workers)
        listed = [await one.listed(), await other.listed()]

    each_worker = REQUESTS // 4
    assert listed == [workers.truth()] * 2
    assert workers.truth() == dict.fromkeys(workers.truth(), (each_worker, 64 * each_worker, 4 * each_worker))


async def test_a_service_started_anew_knows_what_the_one_before_had_booked(cast: tuple[MemoryDiscovery, Cast]) -> None:
    discovery, workers = cast
    async with replica(discovery, "router-b") as other:
        async with replica(discovery, "router-a") as one:
            for number, asked in turns([one, other]):
                await asked.hears(workers)
                workers.take(await asked.reserve(number))
        async with replica(discovery, "router-c") as anew:
            await anew.hears(workers)
            listed = await anew.listed()
            workers.take(await anew.reserve(REQUESTS))

    assert listed == dict.fromkeys(listed, (6, 64 * 6, 4 * 6))
    assert sorted(total for total, _, _ in workers.truth().values()) == [6, 6, 6, 7]
