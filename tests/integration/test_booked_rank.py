"""The data-parallel rank: the router books one, the request says which, and the worker refuses one that it has not."""

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest

from kvmesh.core.candidates import RoutingHints, RoutingQuery
from kvmesh.core.errors import Reason
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, WorkerId
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.channels import Channels
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.peers import Peers
from kvmesh.services.prompts import PreparedPrompt
from kvmesh.services.remote_router import RemoteRouter
from kvmesh.services.router import Router
from kvmesh.services.routing_port import Booking, InProcessRouting, RoutingPort
from kvmesh.services.running_request import Resolved, RunningRequest
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.testing.worker_group import GENEROUS_S, WorkerGroup, request, worker_group
from kvmesh.v1 import frontend_pb2, generation_pb2, router_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

WORKER = WorkerId("node/decode/0")


@pytest.fixture
async def discovery() -> AsyncIterator[MemoryDiscovery]:
    """One with a worker of two ranks."""
    discovery = MemoryDiscovery()
    worker = await ScriptedWorker.start(discovery, 0, ranks=2)
    yield discovery
    await worker.aclose()


@pytest.fixture
async def local(discovery: MemoryDiscovery) -> AsyncIterator[LocalRouter]:
    """A router that has heard of both ranks."""
    router = LocalRouter(
        discovery=discovery, namespace="default", router_id=RouterId("r"),
        policy=build_policy("kv_aware"), rng=random.Random(3),
    )  # fmt: skip
    router.start()
    async with asyncio.timeout(GENEROUS_S):
        while len(states := router.workers()) < 2 or not all(state.report for state in states):
            await router.changed()
    yield router
    await router.aclose()


@pytest.fixture
async def remote(discovery: MemoryDiscovery, local: LocalRouter) -> AsyncIterator[RemoteRouter]:
    """The same router, over gRPC."""
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    router_pb2_grpc.add_RouterServicer_to_server(Router(local, waits=Waits(route_s=10.0)), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await discovery.register(
        WorkerRecord(
            worker_id=WorkerId("n/router/0"), epoch=Epoch(1), role=WorkerRole.ROUTER, models=(),
            namespace="default", block_size=16, address=address,
        )
    )  # fmt: skip
    channels, peers = Channels(), Peers(discovery, namespace="default")
    peers.start()
    async with asyncio.timeout(GENEROUS_S):
        while peers.router_address() is None:
            await peers.changed()
    remote = RemoteRouter(peers=peers, channels=channels, waits=Waits(router_s=10.0, connect_s=10.0))
    yield remote
    await remote.aclose()
    await peers.aclose()
    await channels.aclose()
    await server.stop(None)


async def reserve(router: RoutingPort, rank: int) -> Booking:
    hints = RoutingHints(pinned_worker=WORKER, pinned_rank=rank)
    query = RoutingQuery(model="m", prompt_tokens=64, hints=hints)
    key = AttemptKey(RequestId(f"r{rank}"), 1)
    return await router.reserve(key, query, wait_s=10.0, explain=False)


@pytest.mark.parametrize("rank", [0, 1])
async def test_booking_names_the_rank_wherever_the_router_runs(
    local: LocalRouter, remote: RemoteRouter, rank: int
) -> None:
    over_grpc = await reserve(remote, rank)
    in_process = await reserve(InProcessRouting(local), rank)

    assert (over_grpc.rank, in_process.rank) == (rank, rank)
    assert over_grpc.reservation_id == in_process.reservation_id  # one booking, not taken by round robin


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_request_to_the_worker_carries_the_booked_rank(rank: int | None) -> None:
    tokens = np.arange(20, dtype=np.uint32)
    running = RunningRequest(
        frontend_pb2.GenerateRequest(), RequestId("r"), arrived_at=0.0, deadline_at=10.0, attempt=1
    )
    running.resolved = Resolved("m", PreparedPrompt(None, tokens, tokens), generation_pb2.SamplingParams())
    running.worker = WorkerRecord(
        worker_id=WORKER, epoch=Epoch(1), models=("m",), block_size=16, accepts=frozenset({"tokens"})
    )
    running.booking = Booking(
        key=running.key, worker_id=WORKER, epoch=Epoch(1), overlap_blocks=0, router_id=RouterId("r"),
        reservation_id=1, rank=rank,
    )  # fmt: skip

    sent = running.decode_request(now=0.0)

    assert (sent.rank if sent.HasField("rank") else None) == rank


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group() as group:
        yield group


async def test_worker_serves_the_rank_it_has_and_refuses_another_by_name(group: WorkerGroup) -> None:
    worker = await group.add_decode()

    served = [await group.generate(worker, wanted) for wanted in (request("a"), request("b", rank=0))]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.generate(worker, request("c", rank=1))

    assert [len(answer.token_ids) for answer in served] == [3, 3]
    refusal = from_rpc_error(caught.value)
    assert (refusal.reason, refusal.field) == (Reason.INVALID_FIELD, "rank")
    await group.wait_idle()
