"""Discovery through a door: a snapshot in parts, then what changed, as a program beside the mesh reads it."""

from asyncio import timeout
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
import pytest

from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.discovery import Deleted, Put, Snapshot
from kvmesh.discovery.door import DoorDiscovery
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.channels import CHANNEL_OPTIONS
from kvmesh.services.components import Components
from kvmesh.services.peers import Peers
from kvmesh.v1 import components_pb2, components_pb2_grpc

if TYPE_CHECKING:
    _Watch = grpc.aio.UnaryStreamCall[components_pb2.WatchComponentsRequest, components_pb2.WatchComponentsResponse]

NAMESPACE = "ns"
BOUND_S = 15.0
MIB = 2**20


class Door:
    """A mesh's door, and the store behind it."""

    def __init__(self, store: MemoryDiscovery, peers: Peers, channel: grpc.aio.Channel) -> None:
        self.store = store
        self.peers = peers
        self.channel = channel

    async def wait_known(self, count: int) -> None:
        """Wait until the door's own process knows so many."""
        while len(self.peers.roster) != count:
            await self.peers.changed()

    def watch(self) -> "_Watch":
        stub = components_pb2_grpc.ComponentsStub(self.channel)
        return stub.WatchComponents(components_pb2.WatchComponentsRequest(), timeout=BOUND_S)


@asynccontextmanager
async def open_door() -> AsyncIterator[Door]:
    store = MemoryDiscovery()
    peers = Peers(store, namespace=NAMESPACE)
    components = Components(peers, namespace=NAMESPACE)
    server = GrpcServer()
    server.add(
        components,
        components_pb2.DESCRIPTOR.services_by_name["Components"],
        components_pb2_grpc.add_ComponentsServicer_to_server,
    )
    await server.start("127.0.0.1", 0)
    peers.start()
    components.start()
    async with timeout(BOUND_S), grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        yield Door(store, peers, channel)
    await components.aclose()
    await server.drain_and_stop(1.0)
    await peers.aclose()
    await store.aclose()


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as door:
        yield door


def record(number: int, *, epoch: int = 1, padding: int = 0) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(f"node/c/{number:05}"), epoch=Epoch(epoch), role=WorkerRole.COMPONENT, models=(),
        namespace=NAMESPACE, block_size=1, address="127.0.0.1:9", metadata={"sdk.contract": "x" * padding},
    )  # fmt: skip


async def read(watch: "_Watch") -> components_pb2.WatchComponentsResponse:
    message = await watch.read()
    assert isinstance(message, components_pb2.WatchComponentsResponse)
    return message


async def parts_of_snapshot(watch: "_Watch") -> list[components_pb2.WatchComponentsResponse]:
    parts = [await read(watch)]
    while not parts[-1].snapshot_complete:
        parts.append(await read(watch))
    return parts


def ids_of(message: components_pb2.WatchComponentsResponse) -> list[str]:
    return [worker.worker_id for worker in message.workers]


async def test_a_large_mesh_comes_in_parts_and_a_change_by_itself(door: Door) -> None:
    records = [record(number, padding=1_500) for number in range(1_000)]
    registered = [await door.store.register(one) for one in records]
    await door.wait_known(1_000)

    watch = door.watch()
    parts = await parts_of_snapshot(watch)
    await registered[7].update(replace(records[7], draining=True))
    changed = await read(watch)
    await registered[9].stop()
    gone = await read(watch)
    watch.cancel()

    assert len(parts) > 1
    assert all(part.snapshot and part.ByteSize() < MIB for part in parts)
    assert [worker_id for part in parts for worker_id in ids_of(part)] == [one.worker_id for one in records]
    assert [(worker.worker_id, worker.draining) for worker in changed.workers] == [("node/c/00007", True)]
    assert [(one.worker_id, one.epoch) for one in gone.gone] == [("node/c/00009", 1)]
    assert not changed.snapshot
    assert not changed.gone
    assert not gone.workers


async def test_a_mesh_of_nobody_is_a_snapshot_too(door: Door) -> None:
    watch = door.watch()
    (part,) = await parts_of_snapshot(watch)
    watch.cancel()

    assert (part.snapshot, part.namespace, ids_of(part)) == (True, NAMESPACE, [])


async def test_a_storm_of_changes_is_told_in_few_messages(door: Door) -> None:
    watch = door.watch()
    await parts_of_snapshot(watch)
    messages, told = 0, set[str]()

    for number in range(500):
        await door.store.register(record(number))
    while len(told) < 500:
        message = await read(watch)
        messages += 1
        told |= set(ids_of(message))
    watch.cancel()

    assert messages < 50


async def test_what_did_not_change_is_not_told(door: Door) -> None:
    registered = await door.store.register(record(1))
    await door.wait_known(1)
    watch = door.watch()
    await parts_of_snapshot(watch)

    for _ in range(3):
        await registered.update(record(1))
    await door.store.register(record(2))
    message = await read(watch)
    watch.cancel()

    assert ids_of(message) == ["node/c/00002"]


async def test_a_program_beside_the_mesh_reads_it_as_discovery(door: Door) -> None:
    records = [record(number, padding=1_500) for number in range(1_000)]
    registered = [await door.store.register(one) for one in records]
    await door.wait_known(1_000)
    discovery = DoorDiscovery(door.channel)

    async with aclosing(discovery.watch("")) as events:
        first = await anext(events)
        await registered[3].stop()
        second = await anext(events)
        await door.store.register(record(4, epoch=2))
        third = await anext(events)
        await discovery.aclose()

    assert first == Snapshot(tuple(records))
    assert second == Deleted(records[3].worker_id, Epoch(1), graceful=True)
    assert third == Put(record(4, epoch=2))
