"""Every Transport against the contract suite, and what is particular to memory."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kvmesh.core.errors import TryElsewhereError
from kvmesh.testing.transport_contract import AGENT, TransportContract, make_pool
from kvmesh.transports import nixl_library
from kvmesh.transports.memory import MemoryNetwork, MemoryTransport
from kvmesh.transports.nixl import NixlTransport
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport


class TestMemoryTransport(TransportContract):
    @pytest.fixture
    def network(self) -> MemoryNetwork:
        return MemoryNetwork()

    @pytest.fixture
    async def source(self, network: MemoryNetwork) -> AsyncIterator[MemoryTransport]:
        transport = MemoryTransport(network)
        yield transport
        await transport.aclose()

    @pytest.fixture
    async def target(self, network: MemoryNetwork) -> AsyncIterator[MemoryTransport]:
        transport = MemoryTransport(network)
        yield transport
        await transport.aclose()

    async def test_networks_are_apart(self, source: MemoryTransport) -> None:
        public_name = await source.serve(AGENT, make_pool(10))
        stranger = MemoryTransport(MemoryNetwork())

        assert stranger.reach != source.reach
        with pytest.raises(TryElsewhereError):
            await stranger.pull(public_name, source_block_ids=[0], target=make_pool(100), target_block_ids=[0])

    async def test_large_pull_leaves_the_event_loop_free(
        self, source: MemoryTransport, target: MemoryTransport
    ) -> None:
        served = make_pool(10, blocks=64, block_bytes=1 << 20)
        public_name = await source.serve(AGENT, served)
        ids = list(range(64))

        pulling = asyncio.ensure_future(
            target.pull(public_name, source_block_ids=ids, target=np.zeros_like(served), target_block_ids=ids)
        )
        turns = 0
        while not pulling.done():
            await asyncio.sleep(0)
            turns += 1

        assert turns > 3, "the copy was done between two turns of the loop"
        assert pulling.result() == served.nbytes


class TestSharedMemoryTransport(TransportContract):
    @pytest.fixture
    async def source(self, tmp_path: Path) -> AsyncIterator[SharedMemoryTransport]:
        transport = SharedMemoryTransport(tmp_path)
        yield transport
        await transport.aclose()
        assert os.listdir(tmp_path) == []  # a path's own methods are refused in async code

    @pytest.fixture
    async def target(self, tmp_path: Path) -> AsyncIterator[SharedMemoryTransport]:
        transport = SharedMemoryTransport(tmp_path)
        yield transport
        await transport.aclose()


class TestTcpTransport(TransportContract):
    @pytest.fixture
    async def source(self) -> AsyncIterator[TcpTransport]:
        transport = TcpTransport()
        yield transport
        await transport.aclose()

    @pytest.fixture
    async def target(self) -> AsyncIterator[TcpTransport]:
        transport = TcpTransport()
        yield transport
        await transport.aclose()


def listening() -> set[str]:
    """Return the IPv4 addresses on which this process listens."""
    inodes = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one by which they are listed
            inodes.add(os.readlink(fd))
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    own = [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    return {socket.inet_ntoa(bytes.fromhex(address)[::-1]) for address in own}


needs_nixl = pytest.mark.skipif(
    not nixl_library.is_installed(), reason=f"NIXL is not installed: {nixl_library.INSTALL}"
)


@needs_nixl
class TestNixlTransport(TransportContract):
    @pytest.fixture
    async def source(self) -> AsyncIterator[NixlTransport]:
        transport = NixlTransport()
        yield transport
        await transport.aclose()

    @pytest.fixture
    async def target(self) -> AsyncIterator[NixlTransport]:
        transport = NixlTransport()
        yield transport
        await transport.aclose()

    async def test_source_that_ended_is_noticed_by_a_puller_that_is_connected(
        self, source: NixlTransport, target: NixlTransport
    ) -> None:
        own, served = make_pool(100), make_pool(10)
        public_name = await source.serve(AGENT, served)
        await target.pull(public_name, source_block_ids=[0], target=own, target_block_ids=[0])
        await source.aclose()

        with pytest.raises(TryElsewhereError):
            await target.pull(public_name, source_block_ids=[1], target=own, target_block_ids=[1])

    async def test_more_pools_are_pulled_into_than_stay_registered(
        self, source: NixlTransport, target: NixlTransport
    ) -> None:
        served = make_pool(10)
        public_name = await source.serve(AGENT, served)
        pools = [make_pool(100) for _ in range(9)]

        for pool in [*pools, *pools]:
            await target.pull(public_name, source_block_ids=[4], target=pool, target_block_ids=[2])

        assert all((pool[2] == served[4]).all() for pool in pools)

    async def test_memory_that_is_not_consecutive_is_refused(
        self, source: NixlTransport, target: NixlTransport
    ) -> None:
        public_name = await source.serve(AGENT, make_pool(10))

        with pytest.raises(TryElsewhereError, match="consecutive"):
            await source.serve("w@1", make_pool(10)[:, ::2])
        with pytest.raises(TryElsewhereError, match="consecutive"):
            await target.pull(public_name, source_block_ids=[0], target=make_pool(0)[::2], target_block_ids=[0])

    async def test_only_loopback_listens(self, source: NixlTransport, target: NixlTransport) -> None:
        public_name = await source.serve(AGENT, make_pool(10))
        await target.pull(public_name, source_block_ids=[0], target=make_pool(0), target_block_ids=[0])

        assert {address for address in listening() if not address.startswith("127.")} == set()

    def test_only_a_fabric_reaches_other_hosts(self, tmp_path: Path) -> None:
        without = NixlTransport("10.0.0.1", fabric=tmp_path).reach
        (tmp_path / "mlx5_0").mkdir()

        assert without.startswith("nixl@")
        assert NixlTransport("10.0.0.1", fabric=tmp_path).reach == "nixl"
        assert NixlTransport("127.0.0.1", fabric=tmp_path).reach == without
