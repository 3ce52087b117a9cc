"""etcd dies, hangs, forgets: watchers keep their last view, records come back, no request fails."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing

import pytest

from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.ids import RouterId
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.roster import WorkerRole
from kvmesh.discovery.discovery import DiscoveryEvent, Put, Snapshot
from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.discovery.etcd import EtcdDiscovery
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.peers import Peers
from kvmesh.testing.discovery_contract import NAMESPACE, make_record
from kvmesh.testing.etcd_server import EtcdServer
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.testing.tcp_proxy import TcpProxy
from kvmesh.testing.worker_group import eventually

pytestmark = pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd]")

WAIT_S = 40.0
TTL_S = 2
BACK_S = 10 * (TTL_S / 3 + 1)
"""Everything registered again within TTL/3 + 1 s; ten times that on a busy machine."""
STILL_S = 1.0
"""How long nothing must be told."""


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def connect(stack: AsyncExitStack, endpoint: str, *, ttl_s: int = TTL_S) -> EtcdDiscovery:
    discovery = EtcdDiscovery([endpoint], ttl_s=ttl_s, rpc_timeout_s=1.0, register_wait_s=0.5)
    stack.push_async_callback(discovery.aclose)
    return discovery


async def next_event(events: AsyncGenerator[DiscoveryEvent, None]) -> DiscoveryEvent:
    async with asyncio.timeout(WAIT_S):
        return await anext(events)


async def assert_nothing_comes(reading: "asyncio.Task[DiscoveryEvent]") -> None:
    done, _ = await asyncio.wait((reading,), timeout=STILL_S)
    assert not done


def begin(events: AsyncGenerator[DiscoveryEvent, None]) -> "asyncio.Task[DiscoveryEvent]":
    """Read the next event in a task, so that a test may look whether it has come."""
    return asyncio.ensure_future(next_event(events))


async def until_keys(etcd: EtcdServer, count: int) -> dict[str, bytes]:
    async with asyncio.timeout(WAIT_S):
        while True:
            keys = await asyncio.to_thread(etcd.keys)
            if len(keys) == count:
                return keys
            await asyncio.sleep(0.02)


async def test_a_killed_etcd_that_comes_back_with_its_store_is_hardly_noticed(
    etcd: EtcdServer, stack: AsyncExitStack
) -> None:
    discovery = connect(stack, etcd.endpoint)
    registration = await discovery.register(make_record(0))
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        assert await next_event(events) == Snapshot((make_record(0),))
        reading = begin(events)

        await asyncio.to_thread(etcd.kill)
        await assert_nothing_comes(reading)
        await asyncio.to_thread(etcd.start)
        await registration.update(make_record(0, draining=True))

        assert await reading == Put(make_record(0, draining=True))
    assert len(etcd.keys()) == 1


async def test_what_is_changed_or_registered_during_an_outage_follows(etcd: EtcdServer, stack: AsyncExitStack) -> None:
    discovery = connect(stack, etcd.endpoint)
    registration = await discovery.register(make_record(0))
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        await next_event(events)
        await asyncio.to_thread(etcd.kill)

        await registration.update(make_record(0, draining=True))
        await discovery.register(make_record(1))
        await asyncio.to_thread(etcd.start)

        put = [await next_event(events), await next_event(events)]
    assert sorted(put, key=repr) == [Put(make_record(0, draining=True)), Put(make_record(1))]


async def test_a_stop_during_an_outage_ends_and_leaves_the_record_to_its_lease(
    etcd: EtcdServer, stack: AsyncExitStack
) -> None:
    discovery = connect(stack, etcd.endpoint)
    registration = await discovery.register(make_record(0))
    await asyncio.to_thread(etcd.kill)

    async with asyncio.timeout(WAIT_S):
        await registration.stop()

    await asyncio.to_thread(etcd.start)
    await until_keys(etcd, 0)


async def test_an_emptied_store_is_filled_again_within_a_third_of_the_lease(
    etcd: EtcdServer, stack: AsyncExitStack
) -> None:
    discoveries = [connect(stack, etcd.endpoint) for _ in range(5)]
    for number, discovery in enumerate(discoveries):
        await discovery.register(make_record(number))

    await asyncio.to_thread(etcd.restart, empty=True)
    begun = time.perf_counter()
    await until_keys(etcd, 5)

    assert time.perf_counter() - begun < BACK_S


async def test_a_watcher_of_an_emptied_store_begins_anew_and_sees_everybody(
    etcd: EtcdServer, stack: AsyncExitStack
) -> None:
    discovery = connect(stack, etcd.endpoint)
    records = tuple(make_record(number) for number in range(5))
    for record in records:
        await discovery.register(record)
    async with aclosing(connect(stack, etcd.endpoint).watch(NAMESPACE)) as events:
        assert await next_event(events) == Snapshot(records)

        await asyncio.to_thread(etcd.restart, empty=True)

        anew = await next_event(events)
        assert isinstance(anew, Snapshot)
        known = {record.worker_id for record in anew.records}
        while len(known) < 5:
            put = await next_event(events)
            assert isinstance(put, Put)
            known.add(put.record.worker_id)


async def test_an_emptied_store_that_outgrew_the_watcher_is_not_taken_for_the_old_one(
    etcd: EtcdServer, stack: AsyncExitStack
) -> None:
    proxy = TcpProxy(etcd.client_port)
    await proxy.start()
    stack.push_async_callback(proxy.aclose)
    first = connect(stack, etcd.endpoint)
    await first.register(make_record(0))
    async with aclosing(connect(stack, proxy.address).watch(NAMESPACE)) as events:
        assert await next_event(events) == Snapshot((make_record(0),))
        reading = begin(events)
        await proxy.cut()
        known_revision = etcd.revision()

        await first.aclose()
        await asyncio.to_thread(etcd.restart, empty=True)
        await connect(stack, etcd.endpoint).register(make_record(1))
        while etcd.revision() <= known_revision + 1:
            await asyncio.to_thread(etcd.put, "filler", b"")
        proxy.restore()

        assert await reading == Snapshot((make_record(1),))


async def test_a_watcher_that_compaction_overtook_begins_anew_and_misses_nothing(
    etcd: EtcdServer, stack: AsyncExitStack
) -> None:
    proxy = TcpProxy(etcd.client_port)
    await proxy.start()
    stack.push_async_callback(proxy.aclose)
    discovery = connect(stack, etcd.endpoint)
    gone = await discovery.register(make_record(0))
    async with aclosing(connect(stack, proxy.address).watch(NAMESPACE)) as events:
        assert await next_event(events) == Snapshot((make_record(0),))
        reading = begin(events)
        await proxy.cut()

        await gone.stop()
        await discovery.register(make_record(1))
        await asyncio.to_thread(etcd.put, "filler", b"")
        await asyncio.to_thread(etcd.compact)
        proxy.restore()

        assert await reading == Snapshot((make_record(1),))
        await discovery.register(make_record(2))
        assert await next_event(events) == Put(make_record(2))


async def test_a_watcher_that_lost_its_connection_resumes_and_is_told_how_each_went(
    etcd: EtcdServer, stack: AsyncExitStack
) -> None:
    proxy = TcpProxy(etcd.client_port)
    await proxy.start()
    stack.push_async_callback(proxy.aclose)
    discovery = connect(stack, etcd.endpoint)
    await discovery.register(make_record(0))
    async with aclosing(connect(stack, proxy.address).watch(NAMESPACE)) as events:
        await next_event(events)
        reading = begin(events)
        await proxy.cut()
        await assert_nothing_comes(reading)

        passing = await discovery.register(make_record(1))
        await passing.stop()
        await discovery.register(make_record(2))
        proxy.restore()

        told = [await reading, await next_event(events), await next_event(events)]

    assert [type(event).__name__ for event in told] == ["Put", "Deleted", "Put"]
    assert told[1].graceful  # type: ignore[union-attr]  # the line above says that it is a Deleted


class TestRouting:
    """A router and its peers through outages: the workers answer all the while."""

    @pytest.fixture
    async def mesh(
        self, etcd: EtcdServer, stack: AsyncExitStack
    ) -> tuple[LocalRouter, Peers, list[ScriptedWorker], EtcdDiscovery]:
        discovery = connect(stack, etcd.endpoint)
        workers = []
        for number, role in enumerate([WorkerRole.DECODE, WorkerRole.DECODE, WorkerRole.PREFILL, WorkerRole.QUEUE]):
            worker = await ScriptedWorker.start(None, number, role=role)
            stack.push_async_callback(worker.aclose)
            await connect(stack, etcd.endpoint).register(worker.record)
            workers.append(worker)
        router = LocalRouter(
            discovery=discovery,
            namespace="default",
            router_id=RouterId("router"),
            policy=build_policy("round_robin"),
            rng=random.Random(7),
        )
        router.start()
        stack.push_async_callback(router.aclose)
        peers = Peers(discovery, namespace="default")
        peers.start()
        stack.push_async_callback(peers.aclose)
        await eventually(lambda: self.is_whole(router, peers))
        return router, peers, workers, discovery

    @staticmethod
    def is_whole(router: LocalRouter, peers: Peers) -> bool:
        counts = len(router.workers()), peers.prefill_workers("m"), len(peers.roster), bool(peers.queue_addresses())
        return counts == (3, 1, 4, True)

    async def requests_through(self, router: LocalRouter, peers: Peers, work: "asyncio.Task[None]") -> int:
        """Route all the while; return how many requests found their worker. Raises: what one of them raises."""
        routed = 0
        while not work.done():
            router.select(RoutingQuery(model="m", prompt_tokens=64, block_hashes={}))
            assert self.is_whole(router, peers)
            routed += 1
            await asyncio.wait((work,), timeout=0.01)
        await work
        return routed

    async def test_no_request_fails_while_etcd_is_away_and_after(
        self,
        etcd: EtcdServer,
        mesh: tuple[LocalRouter, Peers, list[ScriptedWorker], EtcdDiscovery],
    ) -> None:
        router, peers, _, _ = mesh

        async def outage() -> None:
            await asyncio.to_thread(etcd.kill)
            await asyncio.sleep(2 * TTL_S)  # the outage itself
            await asyncio.to_thread(etcd.start)
            await until_keys(etcd, 4)

        assert await self.requests_through(router, peers, asyncio.ensure_future(outage())) > 0
        assert len(await until_keys(etcd, 4)) == 4

    async def test_no_request_fails_in_the_storm_of_deletions_after_etcd_hung(
        self,
        etcd: EtcdServer,
        mesh: tuple[LocalRouter, Peers, list[ScriptedWorker], EtcdDiscovery],
        stack: AsyncExitStack,
    ) -> None:
        router, peers, _, _ = mesh
        gone: set[str] = set()
        back: set[str] = set()

        async def count_the_storm() -> None:
            async with aclosing(connect(stack, etcd.endpoint).watch("default")) as events:
                first = True
                async for event in events:
                    if isinstance(event, Put):
                        back.add(event.record.worker_id)
                    elif isinstance(event, Snapshot):
                        if not first:
                            gone.update({"all"})
                        first = False
                        watching.set()
                    else:
                        gone.add(event.worker_id)

        watching = asyncio.Event()
        counting = asyncio.ensure_future(count_the_storm())
        await watching.wait()

        async def hang() -> None:
            etcd.pause()
            await asyncio.sleep(3 * TTL_S)  # longer than every lease
            etcd.resume()
            await eventually(lambda: len(gone) == 4 and len(back) == 4)

        assert await self.requests_through(router, peers, asyncio.ensure_future(hang())) > 0
        assert len(await until_keys(etcd, 4)) == 4
        counting.cancel()
        await asyncio.wait((counting,))

    async def test_no_request_fails_while_an_emptied_store_fills_again(
        self,
        etcd: EtcdServer,
        mesh: tuple[LocalRouter, Peers, list[ScriptedWorker], EtcdDiscovery],
    ) -> None:
        router, peers, _, _ = mesh

        async def empty() -> None:
            await asyncio.to_thread(etcd.restart, empty=True)
            await until_keys(etcd, 4)

        assert await self.requests_through(router, peers, asyncio.ensure_future(empty())) > 0

    async def test_a_worker_that_died_during_the_outage_goes_when_its_record_does(
        self,
        etcd: EtcdServer,
        mesh: tuple[LocalRouter, Peers, list[ScriptedWorker], EtcdDiscovery],
    ) -> None:
        router, peers, workers, _ = mesh
        await workers[2].aclose()

        await asyncio.to_thread(etcd.wipe)

        await eventually(lambda: len(router.workers()) == 2 and peers.prefill_workers("m") == 0)
        assert bool(peers.queue_addresses())
