"""Every Transport against the contract suite, and what is particular to memory."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from kvmesh.core.errors import TryElsewhereError
from kvmesh.testing.transport_contract import AGENT, TransportContract, make_pool
from kvmesh.transports.memory import MemoryNetwork, MemoryTransport
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
