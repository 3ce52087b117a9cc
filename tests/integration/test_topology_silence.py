"""The topology while the router or the queue does not answer: what is unknown is not shown as a figure."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.services.channels import Channels
from kvmesh.services.peers import Peers
from kvmesh.services.request_totals import RequestTotals
from kvmesh.services.router_views import RemoteRouterView
from kvmesh.services.topology import TopologyView
from kvmesh.services.totals_views import LocalTotals
from kvmesh.testing.remote_prefills import silent_server
from kvmesh.v1 import frontend_pb2

GENEROUS_S = 20.0
READY, DRAINING = WorkerId("n/decode/0"), WorkerId("n/decode/1")


def record(worker_id: str, role: WorkerRole, *, address: str = "", draining: bool = False) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(worker_id), epoch=Epoch(1), role=role, models=("m",), namespace="default", block_size=16,
        total_blocks=64, address=address, draining=draining,
    )  # fmt: skip


@asynccontextmanager
async def topology_of(*records: WorkerRecord) -> AsyncIterator[TopologyView]:
    """Look at a mesh of these records, from a process that asks router and queue over gRPC."""
    discovery = MemoryDiscovery()
    async with AsyncExitStack() as stack, asyncio.timeout(GENEROUS_S):
        for each in records:
            await discovery.register(each)
        channels = Channels()
        stack.push_async_callback(channels.aclose)
        peers = Peers(discovery, namespace="default")
        peers.start()
        stack.push_async_callback(peers.aclose)
        while len(peers.roster.records()) < len(records):
            await peers.changed()
        yield TopologyView(
            router=RemoteRouterView(peers=peers, channels=channels),
            totals=LocalTotals(RequestTotals()),
            peers=peers,
            channels=channels,
        )


async def test_a_silent_router_leaves_loads_unknown_and_only_the_states_that_records_tell() -> None:
    with silent_server() as address:
        records = (
            record(READY, WorkerRole.DECODE),
            record(DRAINING, WorkerRole.DECODE, draining=True),
            record("n/router/0", WorkerRole.ROUTER, address=address),
        )
        async with topology_of(*records) as view:
            before = view.now()

            topology = await view.refreshed()

    assert not before.router_silent, "nobody was asked yet"
    assert topology.router_silent
    assert topology.policy == ""
    assert [(worker.id, worker.state, worker.load_unknown, worker.total_blocks) for worker in topology.workers] == [
        (READY, frontend_pb2.WORKER_STATE_UNSPECIFIED, True, 64),
        (DRAINING, frontend_pb2.WORKER_STATE_DRAINING, True, 64),
    ]


async def test_a_silent_queue_is_told_from_none_at_all() -> None:
    with silent_server() as address:
        async with topology_of(record("n/queue/0", WorkerRole.QUEUE, address=address)) as view:
            silent = await view.refreshed()
    async with topology_of() as view:
        absent = await view.refreshed()

    assert (silent.HasField("queue"), silent.queue_silent) == (False, True)
    assert (absent.HasField("queue"), absent.queue_silent) == (False, False)
