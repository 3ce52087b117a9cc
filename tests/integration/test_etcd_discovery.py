"""Discovery on a real etcd that answers: times, atomicity, what stands in the store, several endpoints."""

import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

import pytest

from kvmesh.core.errors import ConflictError, Reason, TryElsewhereError
from kvmesh.core.ids import Epoch
from kvmesh.core.roster import WorkerRole
from kvmesh.discovery.discovery import Deleted, DiscoveryEvent, Put, Snapshot
from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.discovery.etcd import EtcdDiscovery
from kvmesh.discovery.etcd_client import EtcdClient, LeaseEndedError, RevisionGoneError
from kvmesh.discovery.etcd_records import namespace_prefix, put_record
from kvmesh.testing.discovery_contract import NAMESPACE, make_record
from kvmesh.testing.etcd_server import EtcdServer

pytestmark = pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd]")

WAIT_S = 30.0
TTL_S = 2
KEY = "kvmesh/contract/decode/node%2Fdecode%2F0000/00000000000000000001"
REGISTRANT = """
import asyncio, sys
from kvmesh.discovery.etcd import EtcdDiscovery
from kvmesh.testing.discovery_contract import make_record

async def main():
    await EtcdDiscovery([sys.argv[1]], ttl_s=int(sys.argv[2])).register(make_record(0))
    print("registered", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def server() -> Iterator[EtcdServer]:
    with EtcdServer() as etcd:
        yield etcd


@pytest.fixture
def etcd(server: EtcdServer) -> EtcdServer:
    server.wipe()
    return server


@pytest.fixture
async def discovery(etcd: EtcdServer) -> AsyncIterator[EtcdDiscovery]:
    discovery = EtcdDiscovery([etcd.endpoint], ttl_s=TTL_S)
    yield discovery
    await discovery.aclose()


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[EtcdClient]:
    client = EtcdClient([etcd.endpoint])
    yield client
    await client.aclose()


async def next_event(events: AsyncGenerator[DiscoveryEvent, None]) -> DiscoveryEvent:
    async with asyncio.timeout(WAIT_S):
        return await anext(events)


async def test_a_registration_is_seen_within_milliseconds(discovery: EtcdDiscovery) -> None:
    took_s = []
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        await next_event(events)
        for number in range(20):
            begun = time.perf_counter()
            await discovery.register(make_record(number))
            assert await next_event(events) == Put(make_record(number))
            took_s.append(time.perf_counter() - begun)

    assert statistics.median(took_s) < 0.05


async def test_a_graceful_stop_is_seen_long_before_the_lease_ends(etcd: EtcdServer) -> None:
    discovery = EtcdDiscovery([etcd.endpoint], ttl_s=600)
    registration = await discovery.register(make_record(0))
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        await next_event(events)

        await registration.stop()

        assert await next_event(events) == Deleted(make_record(0).worker_id, Epoch(1), graceful=True)
    assert etcd.keys() == {}
    await discovery.aclose()


async def test_a_killed_process_is_gone_when_its_lease_ends(etcd: EtcdServer, discovery: EtcdDiscovery) -> None:
    process = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-c", REGISTRANT, etcd.endpoint, str(TTL_S)], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"registered\n"
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            assert await next_event(events) == Snapshot((make_record(0),))
            process.send_signal(signal.SIGKILL)
            begun = time.perf_counter()

            gone = await next_event(events)

            assert gone == Deleted(make_record(0).worker_id, Epoch(1), graceful=False)
            assert time.perf_counter() - begun < 10 * (TTL_S + 1)


async def test_a_record_outlives_many_leases_while_its_process_lives(
    etcd: EtcdServer, discovery: EtcdDiscovery
) -> None:
    registration = await discovery.register(make_record(0))
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        await next_event(events)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * TTL_S):
                await anext(events)

    assert list(etcd.keys()) == [KEY]
    await registration.stop()


async def test_what_is_registered_between_the_listing_and_the_watch_is_not_missed(
    discovery: EtcdDiscovery, client: EtcdClient
) -> None:
    listing = await client.list(namespace_prefix(NAMESPACE))
    await discovery.register(make_record(0))

    stream = await client.watch(namespace_prefix(NAMESPACE), start_revision=listing.header.revision + 1)
    async with asyncio.timeout(WAIT_S):
        response = await stream.read()
    stream.close()

    assert list(listing.kvs) == []
    assert [event.kv.key.decode() for event in response.events] == [KEY]


async def test_watches_begun_amid_registrations_all_see_every_one(discovery: EtcdDiscovery) -> None:
    async def everybody() -> set[str]:
        seen: set[str] = set()
        async with asyncio.timeout(WAIT_S), aclosing(discovery.watch(NAMESPACE)) as events:
            async for event in events:
                if isinstance(event, Snapshot):
                    seen |= {record.worker_id for record in event.records}
                elif isinstance(event, Put):
                    seen.add(event.record.worker_id)
                if len(seen) == 30:
                    break
        return seen

    watches = []
    for number in range(30):
        watches.append(asyncio.create_task(everybody()))
        await discovery.register(make_record(number))

    wanted = {make_record(number).worker_id for number in range(30)}
    assert await asyncio.gather(*watches) == [wanted] * 30


async def test_a_restart_under_a_higher_epoch_is_one_update(discovery: EtcdDiscovery) -> None:
    await discovery.register(make_record(0, epoch=1))
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        await next_event(events)

        await discovery.register(make_record(0, epoch=2))
        await discovery.register(make_record(1))

        assert [await next_event(events), await next_event(events)] == [
            Put(make_record(0, epoch=2)),
            Put(make_record(1)),
        ]


async def test_a_worker_whose_name_continues_anothers_is_not_touched(
    etcd: EtcdServer, discovery: EtcdDiscovery
) -> None:
    await discovery.register(make_record(0, epoch=1))
    worker_id = make_record(0).worker_id

    await discovery.register(make_record(0, worker_id=f"{worker_id}/5", epoch=9))
    await discovery.register(make_record(0, epoch=2))

    assert len(etcd.keys(f"kvmesh/{NAMESPACE}/")) == 2


async def test_a_superseded_registration_gives_up_and_never_takes_the_name_back(
    etcd: EtcdServer, discovery: EtcdDiscovery
) -> None:
    old = await discovery.register(make_record(0, epoch=1))
    new = await discovery.register(make_record(0, epoch=2))
    with pytest.raises(ConflictError):
        await old.update(make_record(0, epoch=1, draining=True))
    await new.stop()

    with pytest.raises(ConflictError) as caught:
        await old.update(make_record(0, epoch=1))

    assert caught.value.reason is Reason.STALE_EPOCH
    assert etcd.keys() == {}


async def test_a_record_deleted_by_hand_is_put_back_under_the_living_lease(
    etcd: EtcdServer, discovery: EtcdDiscovery
) -> None:
    registration = await discovery.register(make_record(0))
    lease_id = registration.lease_id
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        await next_event(events)

        await asyncio.to_thread(etcd.wipe)

        assert await next_event(events) == Deleted(make_record(0).worker_id, Epoch(1), graceful=False)
        assert await next_event(events) == Put(make_record(0))
    assert registration.lease_id == lease_id


async def test_records_stand_where_etcds_resolver_for_go_looks_for_them(
    etcd: EtcdServer, discovery: EtcdDiscovery
) -> None:
    await discovery.register(make_record(0))
    await discovery.register(make_record(1, role=WorkerRole.PREFILL))

    found = {key: json.loads(value) for key, value in etcd.keys(f"kvmesh/{NAMESPACE}/decode/").items()}

    assert list(found) == [KEY]
    assert {"Op": 0, "Addr": "127.0.0.1:1000"}.items() <= found[KEY].items()
    assert found[KEY]["Metadata"]["worker_id"] == make_record(0).worker_id
    assert found[KEY]["Metadata"]["state"] == "live"


async def test_keys_of_others_under_the_prefix_are_passed_over(etcd: EtcdServer, discovery: EtcdDiscovery) -> None:
    etcd.put(f"kvmesh/{NAMESPACE}/decode/somebody", b'{"Op":0,"Addr":"10.0.0.1:1","Metadata":null}')
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        first = await next_event(events)
        await asyncio.to_thread(etcd.put, f"kvmesh/{NAMESPACE}/decode/another", b"\xff")
        await discovery.register(make_record(0))

        assert (first, await next_event(events)) == (Snapshot(()), Put(make_record(0)))


async def test_dead_endpoints_are_passed_over(etcd: EtcdServer) -> None:
    discovery = EtcdDiscovery(["127.0.0.1:1", etcd.endpoint, "127.0.0.1:2"], ttl_s=TTL_S)
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        assert await next_event(events) == Snapshot(())

        registration = await discovery.register(make_record(0))
        assert await next_event(events) == Put(make_record(0))
        await registration.stop()

        assert await next_event(events) == Deleted(make_record(0).worker_id, Epoch(1), graceful=True)
    await discovery.aclose()


async def test_closing_leaves_records_to_their_leases_and_refuses_what_comes_later(
    etcd: EtcdServer, discovery: EtcdDiscovery
) -> None:
    registration = await discovery.register(make_record(0))

    await discovery.aclose()
    await discovery.aclose()

    assert list(etcd.keys()) == [KEY]
    with pytest.raises(TryElsewhereError):
        await discovery.register(make_record(1))
    await registration.stop()


async def test_a_put_under_a_lease_that_ended_is_told_apart_from_an_outage(client: EtcdClient) -> None:
    lease = await client.grant_lease(TTL_S)
    await client.revoke_lease(lease.lease_id)

    with pytest.raises(LeaseEndedError):
        await client.transact(put_record(make_record(0), lease.lease_id))
    with pytest.raises(LeaseEndedError):
        await client.renew_lease(lease.lease_id)
    with pytest.raises(LeaseEndedError):
        await client.revoke_lease(lease.lease_id)


async def test_revisions_compacted_away_or_yet_to_come_are_told_apart_from_an_outage(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    await asyncio.to_thread(etcd.put, "k", b"v")
    revision = etcd.revision()
    await asyncio.to_thread(etcd.put, "k", b"w")
    await asyncio.to_thread(etcd.compact)

    with pytest.raises(RevisionGoneError):
        await client.get(b"k", revision=revision)
    with pytest.raises(RevisionGoneError):
        await client.get(b"k", revision=revision + 1000)
    stream = await client.watch(b"k", start_revision=revision)
    with pytest.raises(RevisionGoneError):
        await stream.read()
    stream.close()


async def test_minimum_life_of_a_lease_is_etcds_and_read_from_its_answer(client: EtcdClient) -> None:
    lease = await client.grant_lease(1)

    assert lease.ttl_s == 2
