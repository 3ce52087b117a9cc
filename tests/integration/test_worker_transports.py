"""Which transport a handoff takes: the first of the holder's own that the puller has too."""

import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, FixRequestError, Reason
from kvmesh.runtime.transport_registry import allocator, open_transports
from kvmesh.services.worker_transports import WorkerTransports
from kvmesh.testing.transport_contract import make_pool
from kvmesh.testing.worker_group import (
    BLOCK_BYTES,
    SMALL,
    HeldSimulatedEngine,
    WorkerGroup,
    request,
)
from kvmesh.transports import nixl_library
from kvmesh.transports.memory import MemoryNetwork, MemoryTransport
from kvmesh.transports.nixl import NixlTransport
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport
from kvmesh.transports.transport import Transport

FULL_BLOCKS = 4
OURS = ("shared_memory", "tcp")

needs_nixl = pytest.mark.skipif(not nixl_library.is_installed(), reason=f"needs NIXL: {nixl_library.INSTALL}")


def make(kind: str, directory: Path) -> Transport:
    match kind:
        case "tcp":
            return TcpTransport()
        case "nixl":
            return NixlTransport()
        case _:
            return SharedMemoryTransport(directory)


@pytest.mark.parametrize(
    ("prefill_kinds", "decode_kinds", "expected"),
    [
        (["shared_memory"], ["shared_memory"], "shared_memory"),
        (["tcp"], ["tcp"], "tcp"),
        (["shared_memory", "tcp"], ["tcp", "shared_memory"], "shared_memory"),
        (["shared_memory", "tcp"], ["tcp"], "tcp"),
        pytest.param(["nixl", "shared_memory", "tcp"], ["nixl", "shared_memory", "tcp"], "nixl", marks=needs_nixl),
        pytest.param(["nixl", "tcp"], ["shared_memory", "tcp"], "tcp", marks=needs_nixl),
        pytest.param(["shared_memory", "tcp"], ["nixl", "shared_memory"], "shared_memory", marks=needs_nixl),
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
    memory = open_transports(
        network=MemoryNetwork(), host="127.0.0.1", kinds=("memory", *OURS), shared_directory=tmp_path
    )
    transports = WorkerTransports(memory.transports)
    await transports.serve("w@1", memory.allocate(8, 64))

    assert [reach.split("@")[0] for reach in transports.served_reaches] == ["memory", "shared_memory", "tcp"]
    assert transports.choose(()).reach == "tcp"
    assert transports.choose(transports.reaches).reach == transports.reaches[0]
    await transports.aclose()


@needs_nixl
async def test_nixl_is_preferred_where_it_is_installed_and_its_pool_lies_where_it_wants(tmp_path: Path) -> None:
    memory = open_transports(network=None, host="127.0.0.1", shared_directory=tmp_path)
    transports = WorkerTransports(memory.transports)
    await transports.serve("w@1", memory.allocate(8, 64))

    assert [reach.split("@")[0] for reach in transports.reaches] == ["nixl", "shared_memory", "tcp"]
    assert [reach.split("@")[0] for reach in transports.served_reaches] == ["nixl", "tcp"]
    assert transports.choose(transports.reaches).reach.startswith("nixl@")
    assert os.listdir(tmp_path) == []
    await transports.aclose()


async def test_without_nixl_the_others_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_library, "_PACKAGES", ("no_such_package_of_nixl",))
    nixl_library.load.cache_clear()

    memory = open_transports(network=None, host="127.0.0.1", shared_directory=tmp_path)

    assert [transport.name for transport in memory.transports] == ["shared_memory", "tcp"]
    nixl_library.load.cache_clear()


async def test_process_that_nixl_would_crash_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc_tools", ModuleType("grpc_tools"))
    nixl_library.load.cache_clear()

    memory = open_transports(network=None, host="127.0.0.1", kinds=("nixl", "tcp"), shared_directory=tmp_path)

    assert [transport.name for transport in memory.transports] == ["tcp"]
    nixl_library.load.cache_clear()


async def test_kinds_say_which_and_in_what_order(tmp_path: Path) -> None:
    memory = open_transports(network=None, host="127.0.0.1", kinds=("tcp", "shared_memory"), shared_directory=tmp_path)

    assert [transport.name for transport in memory.transports] == ["tcp", "shared_memory"]
    with pytest.raises(FixRequestError, match="'pigeon' is no transport: there are nixl, shared_memory, tcp"):
        open_transports(network=None, host="127.0.0.1", kinds=("pigeon",), shared_directory=tmp_path)


async def test_record_says_how_to_pull(tmp_path: Path) -> None:
    memory = open_transports(network=None, host="127.0.0.1", kinds=OURS, shared_directory=tmp_path)
    transports = WorkerTransports(memory.transports)
    await transports.serve("w@1", memory.allocate(8, 64))

    [shared, tcp] = memory.transports

    assert list(transports.metadata) == [f"kv.{shared.reach}", f"kv.{tcp.reach}"]
    assert transports.metadata["kv.tcp"].startswith("w@1@127.0.0.1:")
    await transports.aclose()


@needs_nixl
async def test_warmed_up_worker_has_only_blocks_left_to_pull(tmp_path: Path) -> None:
    class Counting(NixlTransport):
        warmed: list[str] = []  # noqa: RUF012  # of this test alone

        async def warm_up(self, agent_name: str, target: npt.NDArray[np.uint8]) -> None:
            self.warmed.append(agent_name)
            await super().warm_up(agent_name, target)

    holder, puller = (WorkerTransports([Counting(), SharedMemoryTransport(tmp_path)]) for _ in range(2))
    served, own = make_pool(10), make_pool(100)
    await holder.serve("w@1", served)

    await puller.warm_up({"engine": "echo"} | holder.metadata, own)
    untouched = (own == make_pool(100)).all()
    [reach] = holder.served_reaches
    await puller.get(reach).pull(Counting.warmed[0], source_block_ids=[3], target=own, target_block_ids=[1])

    assert untouched
    assert (own[1] == served[3]).all()
    assert len(Counting.warmed) == 1
    await holder.aclose()
    await puller.aclose()


async def test_worker_that_has_nothing_in_common_or_needs_nothing_is_not_warmed_up(tmp_path: Path) -> None:
    holder = WorkerTransports([TcpTransport()])
    await holder.serve("w@1", make_pool(10))

    await WorkerTransports([SharedMemoryTransport(tmp_path)]).warm_up(holder.metadata, make_pool(0))
    await WorkerTransports([TcpTransport()]).warm_up({"kv.tcp": "nobody@127.0.0.1:1"}, make_pool(0))

    await holder.aclose()


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
    memory = open_transports(network=None, host="127.0.0.1", kinds=OURS, shared_directory=tmp_path / "nothing")

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
    memory = open_transports(
        network=MemoryNetwork(), host="127.0.0.1", kinds=("memory", *OURS), shared_directory=tmp_path
    )

    engine = HeldSimulatedEngine(allocate=memory.allocate)

    assert engine.kv_memory() is not None
    assert len(os.listdir(tmp_path)) == 1
    for transport in memory.transports:
        await transport.aclose()
