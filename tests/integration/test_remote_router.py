"""The router of another process that stops answering: one request finds out, the others do without it at once."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from structlog.testing import capture_logs

from kvmesh.core.admission import AdmissionRules
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, WorkerId
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.routing import RoutingRules
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.channels import Channels
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.peers import Peers
from kvmesh.services.remote_router import ADMISSION_WAIT, RemoteRouter
from kvmesh.services.router import Router
from kvmesh.services.routing_port import UNROUTED, Booking
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.testing.tcp_proxy import TcpProxy
from kvmesh.v1 import router_pb2_grpc

GENEROUS_S = 20.0
QUERY = RoutingQuery(model="m", prompt_tokens=64)
ROUTER = RouterId("router-1")


@dataclass(slots=True)
class Bench:
    """A processor's side of a router that is reached through a proxy."""

    remote: RemoteRouter
    proxy: TcpProxy
    discovery: MemoryDiscovery
    numbers: int = 0

    async def reserve(self, *, explain: bool = False, wait_s: float = 10.0) -> Booking:
        self.numbers += 1
        key = AttemptKey(RequestId(f"r{self.numbers}"), 1)
        return await self.remote.reserve(key, QUERY, wait_s=wait_s, explain=explain)


@asynccontextmanager
async def bench(*, router_s: float = 0.3, **router: Any) -> AsyncIterator[Bench]:
    """Run one worker, one router and one processor's side, whose other waits are longer than any test."""
    discovery = MemoryDiscovery()
    async with AsyncExitStack() as stack:
        worker = await ScriptedWorker.start(discovery, 0)
        stack.push_async_callback(worker.aclose)
        local = LocalRouter(
            discovery=discovery, namespace="default", router_id=ROUTER, policy=build_policy("kv_aware"),
            rng=random.Random(3), **router,
        )  # fmt: skip
        local.start()
        stack.push_async_callback(local.aclose)
        server = grpc.aio.server(interceptors=[CallInterceptor()])
        router_pb2_grpc.add_RouterServicer_to_server(Router(local, waits=Waits(route_s=10.0)), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, None)
        async with asyncio.timeout(GENEROUS_S):
            while not (states := local.workers()) or not states[0].report:
                await local.changed()
        proxy = TcpProxy(port)
        await proxy.start()
        stack.push_async_callback(proxy.aclose)
        await discovery.register(router_record(proxy.address))
        channels = Channels()
        stack.push_async_callback(channels.aclose)
        peers = Peers(discovery, namespace="default")
        peers.start()
        stack.push_async_callback(peers.aclose)
        async with asyncio.timeout(GENEROUS_S):
            while peers.router_address() is None or not peers.roster.of(WorkerRole.DECODE, "m"):
                await peers.changed()
        remote = RemoteRouter(peers=peers, channels=channels, waits=Waits(router_s=router_s, connect_s=60.0))
        stack.push_async_callback(remote.aclose)
        yield Bench(remote, proxy, discovery)


def router_record(address: str, *, epoch: int = 1) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId("n/router/0"), epoch=Epoch(epoch), role=WorkerRole.ROUTER, models=(),
        namespace="default", block_size=16, address=address, metadata={ADMISSION_WAIT: "60"},
    )  # fmt: skip


async def test_a_router_that_accepts_and_never_answers_costs_one_request_a_short_wait_and_the_next_none() -> None:
    async with bench() as mesh, asyncio.timeout(GENEROUS_S):
        booked = await mesh.reserve()
        mesh.proxy.stall()
        loop = asyncio.get_running_loop()
        began_at = loop.time()

        found_out = await mesh.reserve(explain=True)
        found_out_s, began_at = loop.time() - began_at, loop.time()
        others = [await mesh.reserve() for _ in range(20)]
        others_s = loop.time() - began_at

    assert booked.router_id == ROUTER
    assert {booking.router_id for booking in (found_out, *others)} == {UNROUTED}
    assert found_out_s < 5.0  # and not the minutes that Reserve may take
    assert others_s < 2.0  # less than the wait of each
    assert found_out.explanation is not None
    assert found_out.explanation.note == "no router answered: round robin, unbooked"
    assert found_out.explanation.worker_id == found_out.worker_id


async def test_a_router_that_answers_again_books_again() -> None:
    async with bench() as mesh, asyncio.timeout(GENEROUS_S):
        mesh.proxy.stall()
        unbooked = await mesh.reserve()
        mesh.proxy.restore()

        while (booking := await mesh.reserve()).router_id == UNROUTED:  # noqa: ASYNC110  # it is no event here
            await asyncio.sleep(0.05)

    assert unbooked.router_id == UNROUTED
    assert booking.router_id == ROUTER


async def test_a_suspect_router_that_is_replaced_elsewhere_is_said_to_be() -> None:
    with capture_logs() as logs:
        async with bench() as mesh, asyncio.timeout(GENEROUS_S):
            suspect, successor = mesh.proxy.address, "127.0.0.1:1"
            mesh.proxy.stall()
            await mesh.reserve()

            await mesh.discovery.register(router_record(successor, epoch=2))
            while not any(line["event"] == "router.replaced" for line in logs):  # noqa: ASYNC110  # it is no event here
                await asyncio.sleep(0.05)

    told = [line for line in logs if line["event"].startswith("router.")]
    assert [(line["event"], line["address"]) for line in told] == [
        ("router.suspect", suspect),
        ("router.replaced", suspect),
    ]
    assert told[-1]["successor"] == successor


async def test_a_router_that_lets_a_request_wait_for_room_is_waited_for() -> None:
    rules = RoutingRules(overload=OverloadRules(max_prefill_tokens=0))
    async with bench(rules=rules, admission=AdmissionRules(wait_s=60.0)) as mesh, asyncio.timeout(GENEROUS_S):
        first = await mesh.reserve()
        waiting = asyncio.ensure_future(mesh.reserve())
        await asyncio.sleep(1.5)  # much longer than a router may take that lets nobody wait
        was_waiting = not waiting.done()
        mesh.remote.release(first)
        second = await waiting

    assert was_waiting
    assert second.router_id == ROUTER
