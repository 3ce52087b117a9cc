"""One rank's cache, mirrored from its messages: no server, no stream."""

import random
from typing import Any

import pytest

from kvmesh import telemetry
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.ids import Epoch, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore
from kvmesh.services.cache_mirror import RESYNC_S, CacheMirror
from kvmesh.v1 import worker_events_pb2

WORKER = WorkerRank(WorkerId("w"))


class Mirrored:
    def __init__(self, *, max_pairs: int = 1_000) -> None:
        self.core = RoutingCore(
            RouterId("r"),
            policy=build_policy("kv_aware"),
            rng=random.Random(1),
            index=PrefixIndex(max_pairs=max_pairs),
        )
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

    def shown_degraded(self) -> tuple[bool, bool]:
        """Whether the list of workers, and the explanation of a choice, say that the rank is degraded."""
        (snapshot,) = self.core.workers(now=0.0)
        (candidate,) = self.core.select(RoutingQuery(model="m", prompt_tokens=100), now=0.0).candidates
        return snapshot.is_index_degraded, candidate.is_index_degraded


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


def test_rank_is_degraded_from_the_first_part_of_a_snapshot_to_the_last(mirrored: Mirrored) -> None:
    gauge_before = telemetry.INDEX_DEGRADED._value.get()
    mirrored.take(5, stored(1, 2), snapshot=True)
    mirrored.mirror.interrupt()
    interrupted = (
        mirrored.shown_degraded(),
        mirrored.depth(1, 2),
        telemetry.INDEX_DEGRADED._value.get() - gauge_before,
    )

    mirrored.take(6, stored(1, 2), snapshot=True)
    in_part = mirrored.shown_degraded()
    mirrored.take(6, stored(3, parent=2), snapshot=True, snapshot_complete=True)

    assert interrupted == ((True, True), 0, 1)
    assert in_part == (True, True)
    assert (mirrored.shown_degraded(), mirrored.depth(1, 2, 3)) == ((False, False), 3)
    assert telemetry.INDEX_DEGRADED._value.get() == gauge_before


def test_rank_is_shown_degraded_from_a_gap_until_its_snapshot_is_whole(mirrored: Mirrored) -> None:
    mirrored.take(5, stored(1), snapshot=True, snapshot_complete=True)
    before = mirrored.shown_degraded()

    mirrored.take(9, stored(2, parent=1), after_sequence=8)
    after_gap = mirrored.shown_degraded()
    mirrored.take(9, stored(1, 2), snapshot=True, now=mirrored.mirror.open_from)
    in_snapshot = mirrored.shown_degraded()
    mirrored.take(9, snapshot=True, snapshot_complete=True)

    assert (before, after_gap, in_snapshot) == ((False, False), (True, True), (True, True))
    assert mirrored.shown_degraded() == (False, False)


def test_rank_for_which_the_index_has_no_room_keeps_the_overlap_that_is_known() -> None:
    mirrored = Mirrored(max_pairs=3)
    mirrored.take(1, stored(1, 2, 3), snapshot=True, snapshot_complete=True)

    mirrored.take(2, stored(7), after_sequence=1)

    assert mirrored.shown_degraded() == (False, False)
    assert (mirrored.depth(1, 2, 3), mirrored.depth(7)) == (3, 0)


def test_delta_without_a_snapshot_before_it_is_not_taken(mirrored: Mirrored) -> None:
    assert not mirrored.take(3, stored(1))

    assert (mirrored.depth(1), mirrored.mirror.position) == (0, None)


def test_delta_that_is_not_newer_is_not_taken_twice(mirrored: Mirrored) -> None:
    mirrored.take(5, snapshot=True, snapshot_complete=True)

    assert not mirrored.take(5, stored(1))

    assert (mirrored.depth(1), mirrored.mirror.position) == (0, 5)


def test_unknown_parent_asks_for_a_snapshot_and_degrades_the_rank_meanwhile(mirrored: Mirrored) -> None:
    refused = telemetry.KV_EVENTS_REFUSED.labels(reason="unknown_parent")
    refused_before, degraded_before = refused._value.get(), telemetry.INDEX_DEGRADED._value.get()
    mirrored.take(1, stored(1, 2), snapshot=True, snapshot_complete=True)

    taken = mirrored.take(2, stored(9, parent=8), now=1.0)
    meanwhile = (mirrored.mirror.position, mirrored.mirror.open_from, mirrored.depth(1, 2))
    degraded_meanwhile = telemetry.INDEX_DEGRADED._value.get()
    mirrored.take(2, stored(1, 2), snapshot=True, snapshot_complete=True, now=1.1)

    assert not taken
    assert meanwhile == (None, 1.0, 0)  # at once, and routed by load until then
    assert mirrored.depth(1, 2) == 2
    assert refused._value.get() - refused_before == 1
    assert (degraded_meanwhile - degraded_before, telemetry.INDEX_DEGRADED._value.get() - degraded_before) == (1, 0)


def test_recovery_under_churn_waits_until_the_last_one_is_long_ago(mirrored: Mirrored) -> None:
    opened = []
    mirrored.take(1, snapshot=True, snapshot_complete=True)

    for now in (1.0, 2.0, 1.0 + RESYNC_S + 1.0, 1000.0):
        mirrored.take(2, stored(9, parent=8), now=now)
        opened.append(mirrored.mirror.open_from)
        mirrored.take(1, snapshot=True, snapshot_complete=True, now=mirrored.mirror.open_from)

    assert opened == [1.0, 1.0 + RESYNC_S, 1.0 + 2 * RESYNC_S, 1000.0]


def test_mirror_of_a_new_incarnation_does_not_wait(mirrored: Mirrored) -> None:
    mirrored.take(1, snapshot=True, snapshot_complete=True)
    mirrored.take(2, stored(9, parent=8), now=1.0)

    fresh = CacheMirror(mirrored.core, WORKER, Epoch(2), block_size=4)

    assert fresh.open_from < 0.0


def test_delta_that_does_not_follow_on_is_a_gap(mirrored: Mirrored) -> None:
    gaps = telemetry.INDEX_GAPS.labels(cause="missed")
    before = gaps._value.get()
    mirrored.take(5, stored(1), snapshot=True, snapshot_complete=True)

    follows = mirrored.take(7, stored(2, parent=1), after_sequence=5)
    skips = mirrored.take(9, stored(3, parent=2), after_sequence=8)

    assert (follows, skips) == (True, False)
    assert mirrored.mirror.position is None
    assert mirrored.depth(1, 2) == 0
    assert gaps._value.get() - before == 1


def test_snapshot_in_the_midst_of_deltas_is_taken_once_and_then_only_after_the_wait(mirrored: Mirrored) -> None:
    mirrored.take(5, stored(1), snapshot=True, snapshot_complete=True)

    first = mirrored.take(3000, stored(2), snapshot=True, snapshot_complete=True, now=1.0)
    later_event = mirrored.take(3001, stored(3, parent=2), after_sequence=3000, now=1.0)
    depth_after_first = mirrored.depth(2, 3)
    second = mirrored.take(6000, stored(4), snapshot=True, snapshot_complete=True, now=2.0)
    depth_meanwhile = mirrored.depth(2, 3)
    third = mirrored.take(7000, stored(5), snapshot=True, snapshot_complete=True, now=mirrored.mirror.open_from)

    assert (first, later_event, second, third) == (True, True, False, True)
    assert (depth_after_first, depth_meanwhile, mirrored.depth(5)) == (2, 0, 1)
    assert mirrored.mirror.open_from == 1.0 + RESYNC_S
    assert mirrored.mirror.position == 7000


def test_drift_ends_the_stream_and_asks_for_a_snapshot_but_not_twice(mirrored: Mirrored) -> None:
    ended: list[None] = []
    mirrored.mirror.on_drift = lambda: ended.append(None)
    mirrored.take(5, stored(1), snapshot=True, snapshot_complete=True)

    mirrored.mirror.drifted(now=1.0)
    mirrored.mirror.drifted(now=2.0)
    meanwhile = (mirrored.mirror.position, mirrored.mirror.open_from, mirrored.depth(1))
    mirrored.take(5, stored(1), snapshot=True, snapshot_complete=True, now=3.0)

    assert ended == [None]
    assert meanwhile == (None, 1.0, 0)
    assert mirrored.depth(1) == 1


def test_closed_mirror_does_not_count_as_degraded(mirrored: Mirrored) -> None:
    before = telemetry.INDEX_DEGRADED._value.get()
    mirrored.take(1, snapshot=True, snapshot_complete=True)
    mirrored.take(2, stored(9, parent=8))

    mirrored.mirror.close()
    mirrored.mirror.close()

    assert telemetry.INDEX_DEGRADED._value.get() == before


def test_blocks_of_another_size_and_unknown_changes_are_refused_and_counted(mirrored: Mirrored) -> None:
    counters = [telemetry.KV_EVENTS_REFUSED.labels(reason=reason) for reason in ("invalid", "unknown_kind")]
    before = [counter._value.get() for counter in counters]

    taken = mirrored.take(
        1, stored(1, block_size=0), worker_events_pb2.KvEvent(), stored(2), snapshot=True, snapshot_complete=True
    )

    assert taken
    assert [counter._value.get() for counter in counters] == [count + 1 for count in before]
    assert (mirrored.depth(1), mirrored.depth(2)) == (0, 1)
