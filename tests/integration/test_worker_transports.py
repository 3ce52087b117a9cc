"""Which transport a handoff takes: the first of the holder's own that the puller has too."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, Reason
from kvmesh.runtime.transport_registry import allocator, open_transports
from kvmesh.services.worker_transports import WorkerTransports
from kvmesh.testing.transport_contract import make_pool
from kvmesh.testing.worker_group import (
    BLOCK_BYTES,
    SMALL,
    HeldSimulatedEngine,
    WorkerGroup,
    request,
    worker_group,
)
from kvmesh.transports.memory import MemoryNetwork, MemoryTransport
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport
from kvmesh.transports.transport import Transport

FULL_BLOCKS = 4


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group() as group:
        yield group


def make(kind: str, directory: Path) -> Transport:
    return TcpTransport() if kind == "tcp" else SharedMemoryTransport(directory)


@pytest.mark.parametrize(
    ("prefill_kinds", "decode_kinds", "expected"),
    [
        (["shared_memory"], ["shared_memory"], "shared_memory"),
        (["tcp"], ["tcp"], "tcp"),
        (["shared_memory", "tcp"], ["tcp", "shared_memory"], "shared_memory"),
        (["shared_memory", "tcp"], ["tcp"], "tcp"),
    ],
)
async def test_prefill_worker_hands_over_by_its_first_common_transport(
    group: WorkerGroup, tmp_path: Path, prefill_kinds: list[str], decode_kinds: list[str], expected: str
) -> None:
    await group.add_queue()
    transports = [make(kind, tmp_path) for kind in prefill_kinds]
    moved = telemetry.KV_BYTES_MOVED.labels(transport=expected)
    before = moved._value.get()
    await group.add_prefill(HeldSimulatedEngine(allocate=allocator(transports)), transport=transports)
    decode = await group.add_decode(transport=[make(kind, tmp_path) for kind in decode_kinds])

    answer = await group.generate(decode, request("r"))

    assert [decision.remote for decision in answer.decisions] == [True]
    assert answer.usage.kv_bytes_moved == FULL_BLOCKS * BLOCK_BYTES
    assert moved._value.get() - before == FULL_BLOCKS * BLOCK_BYTES
    await group.wait_idle()


async def test_workers_of_two_hosts_have_no_shared_memory_in_common(group: WorkerGroup, tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    await group.add_queue()
    there = SharedMemoryTransport(tmp_path / "there")
    await group.add_prefill(HeldSimulatedEngine(allocate=allocator([there])), transport=there)
    decode = await group.add_decode(transport=SharedMemoryTransport(tmp_path / "here"))

    answer = await group.generate(decode, request("r"))

    assert [decision.remote for decision in answer.decisions] == [True, False]
    assert answer.decisions[1].reason == "fallback_no_capable_worker"
    await group.wait_idle()


async def test_transport_that_cannot_serve_the_pool_is_left_out(tmp_path: Path) -> None:
    shared, tcp = SharedMemoryTransport(tmp_path), TcpTransport()
    transports = WorkerTransports([shared, tcp])

    await transports.serve("w@1", make_pool(0))

    assert transports.reaches == (shared.reach, "tcp")
    assert transports.served_reaches == ("tcp",)
    assert transports.choose([shared.reach, "tcp"]).reach == "tcp"
    await transports.aclose()


async def test_puller_that_says_nothing_is_served_by_what_reaches_furthest(tmp_path: Path) -> None:
    memory = open_transports(network=MemoryNetwork(), host="127.0.0.1", shared_directory=tmp_path)
    transports = WorkerTransports(memory.transports)
    await transports.serve("w@1", memory.allocate(8, 64))

    assert [reach.split("@")[0] for reach in transports.served_reaches] == ["memory", "shared_memory", "tcp"]
    assert transports.choose(()).reach == "tcp"
    assert transports.choose(transports.reaches).reach == transports.reaches[0]
    await transports.aclose()


async def test_nothing_in_common_names_both_sides() -> None:
    transports = WorkerTransports([MemoryTransport(MemoryNetwork())])
    await transports.serve("w@1", make_pool(0))

    with pytest.raises(ConflictError, match=r"wanted by tcp and served by memory@") as caught:
        transports.choose(["tcp"])
    with pytest.raises(ConflictError, match="served by tcp"):
        transports.get("tcp")

    assert caught.value.reason is Reason.LAYOUT_MISMATCH
    await transports.aclose()


async def test_host_without_shared_memory_does_without(tmp_path: Path) -> None:
    memory = open_transports(network=None, host="127.0.0.1", shared_directory=tmp_path / "nothing")

    assert [transport.name for transport in memory.transports] == ["tcp"]
    assert memory.allocate(8, 64).shape == (8, 64)


async def test_pool_without_room_in_shared_memory_lies_in_the_process(tmp_path: Path) -> None:
    class Full(SharedMemoryTransport):
        def allocate(self, blocks: int, block_bytes: int) -> None:
            super().allocate(1 << 20, 1 << 24)

    pool = allocator([Full(tmp_path)])(SMALL.total_blocks, SMALL.block_bytes)

    assert pool.shape == (SMALL.total_blocks, SMALL.block_bytes)
    assert pool.dtype == np.uint8
    assert os.listdir(tmp_path) == []


async def test_pool_goes_to_the_first_transport_that_wants_it(tmp_path: Path) -> None:
    memory = open_transports(network=MemoryNetwork(), host="127.0.0.1", shared_directory=tmp_path)

    engine = HeldSimulatedEngine(allocate=memory.allocate)

    assert engine.kv_memory() is not None
    assert len(os.listdir(tmp_path)) == 1
    for transport in memory.transports:
        await transport.aclose()
