"""One rank's cache, mirrored from its messages: no server, no stream."""

import random
from typing import Any

import pytest

from kvmesh import telemetry
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.ids import Epoch, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore
from kvmesh.services.cache_mirror import RESYNC_S, CacheMirror
from kvmesh.v1 import worker_events_pb2

WORKER = WorkerRank(WorkerId("w"))


class Mirrored:
    def __init__(self) -> None:
        self.core = RoutingCore(RouterId("r"), policy=build_policy("kv_aware"), rng=random.Random(1))
        self.core.put_worker(
            WorkerRecord(worker_id=WORKER.worker_id, epoch=Epoch(1), models=("m",), block_size=4), now=0.0
        )
        self.mirror = CacheMirror(self.core, WORKER, Epoch(1), block_size=4)

    def take(self, sequence: int, *events: worker_events_pb2.KvEvent, now: float = 0.0, **fields: Any) -> bool:
        message = worker_events_pb2.WatchKvEventsResponse(sequence=sequence, events=events, **fields)
        return self.mirror.apply(message, now=now)

    def depth(self, *hashes: int) -> int:
        keys = tuple(map(SequenceHash, hashes))
        return self.core.overlaps(RoutingQuery(model="m", prompt_tokens=100, block_hashes={4: keys}))[WORKER]


def stored(*hashes: int, parent: int | None = None, block_size: int = 4) -> worker_events_pb2.KvEvent:
    blocks = worker_events_pb2.KvBlocksStored(parent_hash=parent, block_hashes=hashes, block_size=block_size)
    return worker_events_pb2.KvEvent(stored=blocks)


@pytest.fixture
def mirrored() -> Mirrored:
    return Mirrored()


def test_position_stands_for_whole_snapshots_only(mirrored: Mirrored) -> None:
    assert mirrored.take(5, stored(1, 2), snapshot=True)
    position_inside = mirrored.mirror.position
    assert mirrored.take(5, stored(3, parent=2), snapshot=True, snapshot_complete=True)

    assert position_inside is None
    assert mirrored.mirror.position == 5
    assert mirrored.depth(1, 2, 3) == 3


def test_second_snapshot_replaces_the_first(mirrored: Mirrored) -> None:
    mirrored.take(5, stored(1, 2), snapshot=True, snapshot_complete=True)

    mirrored.take(9, stored(7), snapshot=True, snapshot_complete=True)

    assert (mirrored.depth(1, 2), mirrored.depth(7)) == (0, 1)


def test_snapshot_after_an_interrupted_one_begins_anew(mirrored: Mirrored) -> None:
    mirrored.take(5, stored(1, 2), snapshot=True)
    mirrored.mirror.interrupt()

    mirrored.take(6, stored(1), snapshot=True, snapshot_complete=True)

    assert (mirrored.depth(1, 2), mirrored.mirror.position) == (1, 6)


def test_delta_without_a_snapshot_before_it_is_not_taken(mirrored: Mirrored) -> None:
    assert not mirrored.take(3, stored(1))

    assert (mirrored.depth(1), mirrored.mirror.position) == (0, None)


def test_delta_that_is_not_newer_is_not_taken_twice(mirrored: Mirrored) -> None:
    mirrored.take(5, snapshot=True, snapshot_complete=True)

    assert not mirrored.take(5, stored(1))

    assert (mirrored.depth(1), mirrored.mirror.position) == (0, 5)


def test_unknown_parent_asks_for_a_snapshot_but_seldom(mirrored: Mirrored) -> None:
    refused = telemetry.KV_EVENTS_REFUSED.labels(reason="unknown_parent")
    before = refused._value.get()
    mirrored.take(1, snapshot=True, snapshot_complete=True)

    first = mirrored.take(2, stored(9, parent=8), now=1.0)
    asked_from = mirrored.mirror.position
    mirrored.take(2, snapshot=True, snapshot_complete=True, now=1.0)
    soon = mirrored.take(3, stored(9, parent=8), now=1.0 + RESYNC_S / 2)
    later = mirrored.take(4, stored(9, parent=8), now=1.0 + RESYNC_S)

    assert (first, soon, later) == (False, True, False)
    assert asked_from is None
    assert refused._value.get() - before == 3


def test_blocks_of_another_size_and_unknown_changes_are_refused_and_counted(mirrored: Mirrored) -> None:
    counters = [telemetry.KV_EVENTS_REFUSED.labels(reason=reason) for reason in ("invalid", "unknown_kind")]
    before = [counter._value.get() for counter in counters]

    taken = mirrored.take(
        1, stored(1, block_size=0), worker_events_pb2.KvEvent(), stored(2), snapshot=True, snapshot_complete=True
    )

    assert taken
    assert [counter._value.get() for counter in counters] == [count + 1 for count in before]
    assert (mirrored.depth(1), mirrored.depth(2)) == (0, 1)
