"""What one worker says to whoever watches it, over a real server."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from kvmesh.core.ids import SequenceHash
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared
from kvmesh.engines.engine import EngineLoad
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.v1 import worker_events_pb2, worker_events_pb2_grpc
from kvmesh.wire.validation import duration

if TYPE_CHECKING:
    from kvmesh.v1.worker_events_pb2_grpc import WorkerEventsAsyncStub

WAIT_S = 20.0
KvMessage = worker_events_pb2.WatchKvEventsResponse


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    worker = await ScriptedWorker.start(None, ring_size=4, ranks=2)
    yield worker
    await worker.aclose()


@pytest.fixture
async def stub(worker: ScriptedWorker) -> AsyncIterator["WorkerEventsAsyncStub"]:
    async with grpc.aio.insecure_channel(worker.record.address) as channel:
        yield worker_events_pb2_grpc.WorkerEventsStub(channel)


async def _next(call: Any) -> Any:
    async with asyncio.timeout(WAIT_S):
        message = await call.read()
    assert message is not grpc.aio.EOF
    return message


def stored(*hashes: int, parent: int | None = None) -> BlocksStored:
    return BlocksStored(None if parent is None else SequenceHash(parent), tuple(map(SequenceHash, hashes)), hashes)


def watch(stub: "WorkerEventsAsyncStub", **fields: Any) -> Any:
    return stub.WatchKvEvents(worker_events_pb2.WatchKvEventsRequest(epoch=1, **fields), timeout=WAIT_S)


def kinds(message: KvMessage) -> list[str | None]:
    return [event.WhichOneof("event") for event in message.events]


async def test_watch_of_an_empty_cache_begins_with_an_empty_snapshot(stub: "WorkerEventsAsyncStub") -> None:
    message = await _next(watch(stub))

    assert (message.snapshot, message.snapshot_complete, message.sequence) == (True, True, 0)
    assert (message.worker_id, message.epoch, message.rank, kinds(message)) == ("node/decode/0", 1, 0, [])


async def test_snapshot_is_followed_by_what_happens_next(worker: ScriptedWorker, stub: "WorkerEventsAsyncStub") -> None:
    worker.events.publish_kv([stored(1, 2)])
    call = watch(stub)
    snapshot = await _next(call)

    worker.events.publish_kv([stored(3, parent=2), BlocksRemoved((SequenceHash(3),)), CacheCleared()])
    delta = await _next(call)

    assert snapshot.snapshot_complete
    assert list(snapshot.events[0].stored.block_hashes) == [1, 2]
    assert snapshot.events[0].stored.block_size == 16
    assert (delta.snapshot, delta.sequence, kinds(delta)) == (False, 2, ["stored", "removed", "cleared"])
    assert delta.events[0].stored.parent_hash == 2


async def test_known_position_is_answered_with_what_followed_it(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub"
) -> None:
    for number in range(1, 4):
        worker.events.publish_kv([stored(number)])

    message = await _next(watch(stub, from_sequence=1))

    assert (message.snapshot, message.sequence) == (False, 3)
    assert [list(event.stored.block_hashes) for event in message.events] == [[2], [3]]


@pytest.mark.parametrize(
    ("position", "epoch", "cause"),
    [
        pytest.param(None, 1, "NO_POSITION", id="no position"),
        pytest.param(1, 1, "FELL_BEHIND", id="older than the ring"),
        pytest.param(9, 1, "BEYOND_NEWEST", id="beyond the newest"),
        pytest.param(5, 2, "OTHER_EPOCH", id="of another incarnation"),
    ],
)
async def test_unknown_position_is_answered_with_a_snapshot_that_says_why(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub", position: int | None, epoch: int, cause: str
) -> None:
    for number in range(1, 7):
        worker.events.publish_kv([stored(number)])
    request = worker_events_pb2.WatchKvEventsRequest(from_sequence=position, epoch=epoch)

    message = await _next(stub.WatchKvEvents(request, timeout=WAIT_S))

    assert (message.snapshot, message.snapshot_complete, message.sequence) == (True, True, 6)
    assert message.snapshot_cause == worker_events_pb2.SnapshotCause.Value(f"SNAPSHOT_CAUSE_{cause}")
    assert {key for event in message.events for key in event.stored.block_hashes} == {1, 2, 3, 4, 5, 6}


async def test_range_inside_the_ring_is_answered_with_exactly_its_events(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub"
) -> None:
    for number in range(1, 7):
        worker.events.publish_kv([stored(number)])

    messages = [message async for message in watch(stub, from_sequence=3, to_sequence=5)]

    assert [(message.snapshot, message.after_sequence, message.sequence) for message in messages] == [(False, 3, 5)]
    assert [list(event.stored.block_hashes) for event in messages[0].events] == [[4], [5]]


async def test_range_that_has_not_happened_yet_is_waited_for(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub"
) -> None:
    call = watch(stub, to_sequence=2)
    keys = []

    async for message in call:
        if message.snapshot:
            for number in (1, 2, 3):
                worker.events.publish_kv([stored(number)])
        keys += [key for event in message.events for key in event.stored.block_hashes]

    assert keys == [1, 2]


async def test_empty_range_ends_at_once(worker: ScriptedWorker, stub: "WorkerEventsAsyncStub") -> None:
    worker.events.publish_kv([stored(1)])

    assert [message async for message in watch(stub, from_sequence=1, to_sequence=1)] == []


async def test_range_that_ends_before_it_starts_is_refused(stub: "WorkerEventsAsyncStub") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _next(watch(stub, from_sequence=5, to_sequence=4))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_deltas_say_what_they_follow_and_how_long_they_waited(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub"
) -> None:
    call = watch(stub, min_interval=duration(0.2))
    snapshot = await _next(call)

    worker.events.publish_kv([stored(1)])
    first = await _next(call)
    worker.events.publish_kv([stored(2)])
    second = await _next(call)

    assert not snapshot.HasField("after_sequence")
    assert not snapshot.HasField("waited")
    assert [message.after_sequence for message in (first, second)] == [0, 1]
    assert 0.0 < first.waited.ToTimedelta().total_seconds() < WAIT_S


async def test_slow_reader_gets_a_snapshot_once_it_is_behind_the_ring(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub"
) -> None:
    blocks = 20_000  # of one batch: a connection does not hold many of them for who does not read
    batches = 10
    held: set[int] = set()
    causes: set[int] = set()
    call = watch(stub, min_interval=duration(0.001))
    await _next(call)

    for number in range(batches):
        first = 1 + number * blocks
        worker.events.publish_kv([stored(*range(first, first + blocks))])
        worker.events.publish_kv([BlocksRemoved(tuple(map(SequenceHash, range(first + 1, first + blocks))))])
        await asyncio.sleep(0)
    is_current = False
    while not is_current:
        message = await _next(call)
        if message.snapshot and not causes:
            causes.add(message.snapshot_cause)
            held.clear()
        for event in message.events:
            held.update(event.stored.block_hashes)
            held.difference_update(event.removed.block_hashes)
        is_current = message.sequence == 2 * batches and (message.snapshot_complete or not message.snapshot)

    assert causes == {worker_events_pb2.SNAPSHOT_CAUSE_FELL_BEHIND}
    assert held == {1 + number * blocks for number in range(batches)}


async def test_ranks_are_told_apart_and_an_unknown_one_is_refused(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub"
) -> None:
    worker.events.publish_kv([stored(1)], rank=1)

    message = await _next(watch(stub, rank=1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _next(watch(stub, rank=2))

    assert (message.rank, list(message.events[0].stored.block_hashes)) == (1, [1])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_batches_within_one_interval_come_as_one_message(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub"
) -> None:
    call = watch(stub, min_interval=duration(0.5))
    await _next(call)

    for number in range(1, 5):
        worker.events.publish_kv([stored(number)])
    message = await _next(call)

    assert (message.sequence, len(message.events)) == (4, 4)


async def test_interval_out_of_range_is_refused(stub: "WorkerEventsAsyncStub") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _next(watch(stub, min_interval=duration(61)))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_load_comes_at_once_and_when_it_changes(worker: ScriptedWorker, stub: "WorkerEventsAsyncStub") -> None:
    call = stub.WatchLoad(worker_events_pb2.WatchLoadRequest(router_id="me"), timeout=WAIT_S)
    first = await _next(call)

    share = worker_events_pb2.RouterShare(router_id="me", active_requests=1)
    worker.say(load=EngineLoad(active_requests=1, max_requests=8), shares=[share], reservation_ids={"me": [7]})
    second = await _next(call)

    assert [rank.active_requests for rank in first.ranks] == [0, 0]
    assert second.sequence > first.sequence
    assert [(rank.rank, rank.active_requests, rank.max_requests) for rank in second.ranks] == [(0, 1, 8), (1, 1, 8)]
    assert list(second.ranks[0].shares) == [share]
    assert list(second.reservation_ids) == [7]


async def test_slow_reader_of_loads_gets_the_newest_and_not_what_was_in_between(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub"
) -> None:
    request = worker_events_pb2.WatchLoadRequest(min_interval=duration(0.3))
    call = stub.WatchLoad(request, timeout=WAIT_S)
    first = await _next(call)

    for number in range(1, 101):
        worker.say(load=EngineLoad(waiting_requests=number))
    second = await _next(call)

    assert [rank.waiting_requests for rank in second.ranks] == [100, 100]
    assert second.sequence == first.sequence + 100
    assert second.epoch == 1


async def test_load_sequence_begins_anew_with_a_new_epoch_only(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub"
) -> None:
    worker.say(load=EngineLoad(waiting_requests=1))
    first = await _next(stub.WatchLoad(worker_events_pb2.WatchLoadRequest(), timeout=WAIT_S))

    again = await _next(stub.WatchLoad(worker_events_pb2.WatchLoadRequest(), timeout=WAIT_S))

    assert (first.sequence, first.epoch) == (2, 1)
    assert again.sequence >= first.sequence  # who watches again is not taken back
    assert [rank.waiting_requests for rank in again.ranks] == [1, 1]


async def test_reservations_of_others_are_not_shown(worker: ScriptedWorker, stub: "WorkerEventsAsyncStub") -> None:
    worker.say(reservation_ids={"other": [7]}, draining=True)

    message = await _next(stub.WatchLoad(worker_events_pb2.WatchLoadRequest(router_id="me"), timeout=WAIT_S))

    assert list(message.reservation_ids) == []
    assert message.draining


async def test_unchanged_load_is_repeated_as_a_newer_one(stub: "WorkerEventsAsyncStub") -> None:
    call = stub.WatchLoad(worker_events_pb2.WatchLoadRequest(min_interval=duration(30)), timeout=WAIT_S)

    first, second = await _next(call), await _next(call)

    assert second.sequence > first.sequence


async def test_close_ends_every_watch_well(worker: ScriptedWorker, stub: "WorkerEventsAsyncStub") -> None:
    loads = stub.WatchLoad(worker_events_pb2.WatchLoadRequest(min_interval=duration(1)), timeout=WAIT_S)
    events = watch(stub, min_interval=duration(30))
    await _next(loads)
    await _next(events)

    worker.events.close()

    for call in (loads, events):
        async with asyncio.timeout(WAIT_S / 2):
            assert await call.code() is grpc.StatusCode.OK
