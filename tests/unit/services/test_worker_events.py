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
    ("position", "epoch"),
    [pytest.param(1, 1, id="older than the ring"), pytest.param(9, 1, id="beyond the newest"), (5, 2)],
)
async def test_unknown_position_is_answered_with_a_snapshot(
    worker: ScriptedWorker, stub: "WorkerEventsAsyncStub", position: int, epoch: int
) -> None:
    for number in range(1, 7):
        worker.events.publish_kv([stored(number)])
    request = worker_events_pb2.WatchKvEventsRequest(from_sequence=position, epoch=epoch)

    message = await _next(stub.WatchKvEvents(request, timeout=WAIT_S))

    assert (message.snapshot, message.snapshot_complete, message.sequence) == (True, True, 6)
    assert {key for event in message.events for key in event.stored.block_hashes} == {1, 2, 3, 4, 5, 6}


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
