"""Every Discovery against the contract suite, and what is particular to each."""

from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from kvmesh.discovery.discovery import Put, Registration, Snapshot
from kvmesh.discovery.memory import MemoryDiscovery, MemoryRegistration
from kvmesh.testing.discovery_contract import NAMESPACE, DiscoveryContract, make_record


class TestMemoryDiscovery(DiscoveryContract):
    @pytest.fixture
    async def discovery(self) -> AsyncIterator[MemoryDiscovery]:
        discovery = MemoryDiscovery(max_buffered=16)
        yield discovery
        await discovery.aclose()

    async def lose(self, registration: Registration) -> None:
        assert isinstance(registration, MemoryRegistration)
        registration.lose()

    async def test_watcher_behind_its_buffer_gets_a_fresh_snapshot_in_place_of_the_events(
        self, discovery: MemoryDiscovery
    ) -> None:
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            assert await anext(events) == Snapshot(())
            for number in range(17):
                await discovery.register(make_record(number))

            overflowed = await anext(events)
            await discovery.register(make_record(17))

            assert overflowed == Snapshot(tuple(make_record(number) for number in range(17)))
            assert await anext(events) == Put(make_record(17))

    async def test_watcher_within_its_buffer_gets_every_event(self, discovery: MemoryDiscovery) -> None:
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            await anext(events)
            for number in range(16):
                await discovery.register(make_record(number))

            assert [await anext(events) for _ in range(16)] == [Put(make_record(number)) for number in range(16)]
