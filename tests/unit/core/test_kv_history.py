"""A subscriber that follows batches, or takes a snapshot at any moment, knows exactly what is cached."""

import random
from collections.abc import Iterable

import pytest

from kvmesh.core.ids import SequenceHash
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent
from kvmesh.core.kv_history import KvBatch, KvHistory, merge

A, B, C, D, X = (SequenceHash(number) for number in (1, 2, 3, 4, 9))


def store(parent: SequenceHash | None, *blocks: SequenceHash) -> BlocksStored:
    return BlocksStored(parent, blocks, tuple(100 + block for block in blocks))


def replayed(parts: Iterable[Iterable[KvEvent]]) -> dict[SequenceHash, tuple[SequenceHash | None, int]]:
    """Follow events as a subscriber would, which knows a block only under a parent that it has heard of."""
    heard: dict[SequenceHash, tuple[SequenceHash | None, int]] = {}
    cached: set[SequenceHash] = set()
    for events in parts:
        for event in events:
            match event:
                case BlocksStored(parent, block_hashes, local_hashes):
                    assert parent is None or parent in heard
                    for block_hash, local_hash in zip(block_hashes, local_hashes, strict=True):
                        heard[block_hash] = parent, local_hash
                        cached.add(block_hash)
                        parent = block_hash
                case BlocksRemoved(block_hashes):
                    cached.difference_update(block_hashes)
                case CacheCleared():
                    cached.clear()
    return {block_hash: heard[block_hash] for block_hash in cached}


def test_new_history_is_at_position_0_with_an_empty_snapshot() -> None:
    history = KvHistory()

    assert history.sequence == 0
    assert history.since(0) == ()
    assert list(history.snapshot()) == [()]


def test_each_publication_is_a_batch_with_the_next_position() -> None:
    history = KvHistory()
    history.publish([store(None, A, B)])
    history.publish([store(B, C), BlocksRemoved((C,))])

    assert history.since(0) == (
        KvBatch(1, (store(None, A, B),)),
        KvBatch(2, (store(B, C), BlocksRemoved((C,)))),
    )
    assert history.since(1) == (KvBatch(2, (store(B, C), BlocksRemoved((C,)))),)
    assert history.since(2) == ()
    assert history.blocks == {A, B}


def test_publishing_nothing_is_no_batch() -> None:
    history = KvHistory()
    history.publish([])

    assert history.sequence == 0


@pytest.mark.parametrize(
    ("position", "answered"),
    [
        pytest.param(0, False, id="older than the ring"),
        pytest.param(1, True, id="the oldest in the ring comes next"),
        pytest.param(3, True, id="the newest"),
        pytest.param(4, False, id="beyond the newest: of another life"),
    ],
)
def test_only_a_snapshot_answers_a_position_outside_of_the_ring(position: int, answered: bool) -> None:
    history = KvHistory(ring_size=2)
    for block in (A, B, C):
        history.publish([store(None, block)])

    batches = history.since(position)

    assert (batches is not None) is answered
    if batches is not None:
        assert [batch.sequence for batch in batches] == list(range(position + 1, 4))


def test_snapshot_joins_chains_and_lists_parents_first() -> None:
    history = KvHistory()
    history.publish([store(None, A, B), store(None, X), store(B, C)])
    history.publish([store(C, D)])

    (part,) = history.snapshot()

    assert part == (store(None, A, B), store(None, X), store(B, C, D))


def test_snapshot_does_not_show_later_changes() -> None:
    history = KvHistory()
    history.publish([store(None, A)])
    parts = history.snapshot()
    history.publish([BlocksRemoved((A,)), store(None, B)])

    assert set(replayed(parts)) == {A}


def test_block_removed_above_cached_ones_stays_as_a_ghost_until_they_are_gone() -> None:
    history = KvHistory()
    history.publish([store(None, A, B, C), BlocksRemoved((B,))])
    with_ghost = history.blocks, replayed(history.snapshot())
    history.publish([BlocksRemoved((C,))])

    assert with_ghost == (frozenset({A, C}), {A: (None, 101), C: (B, 103)})
    assert list(history.snapshot()) == [(store(None, A),)]


def test_ghost_that_is_stored_again_is_cached_again() -> None:
    history = KvHistory()
    history.publish([store(None, A, B), BlocksRemoved((A,)), store(None, A)])

    assert history.blocks == {A, B}
    assert list(history.snapshot()) == [(store(None, A, B),)]


@pytest.mark.parametrize("first", [(), (store(None, A, B), BlocksRemoved((A,)))], ids=["unknown", "ghost"])
def test_block_stored_under_a_parent_that_is_not_cached_is_left_out_and_counted(first: tuple[KvEvent, ...]) -> None:
    history = KvHistory()
    history.publish(first)
    position = history.sequence
    history.publish([store(A, C)])

    assert history.unknown_parents == 1
    assert history.sequence == position
    assert C not in history.blocks


def test_cleared_cache_is_empty() -> None:
    history = KvHistory()
    history.publish([store(None, A, B), BlocksRemoved((A,)), CacheCleared(), store(None, C)])

    assert history.blocks == {C}
    assert replayed(history.snapshot()) == {C: (None, 103)}


def test_long_event_is_cut_into_batches_that_still_tell_the_chain() -> None:
    blocks = tuple(SequenceHash(number) for number in range(1, 70_001))
    history = KvHistory()
    history.publish([BlocksStored(None, blocks, tuple(range(70_000)))])
    batches = history.since(0)
    assert batches is not None
    stored_batches = len(batches)
    snapshot = list(history.snapshot())
    history.publish([BlocksRemoved(blocks[::-1])])

    assert stored_batches == len(snapshot) == 3
    assert all(
        len(event.block_hashes) < 32_768
        for batch in batches
        for event in batch.events
        if hasattr(event, "block_hashes")
    )
    assert replayed(batch.events for batch in batches) == replayed(snapshot)
    assert replayed(snapshot)[blocks[-1]] == (blocks[-2], 69_999)
    assert len(replayed(snapshot)) == 70_000
    assert history.sequence == 6
    assert history.blocks == frozenset()


def test_merged_batches_say_the_same_with_the_last_position() -> None:
    batches = [KvBatch(number, (store(None, SequenceHash(number)),)) for number in range(1, 6)]

    (merged,) = merge(batches)

    assert merged.sequence == 5
    assert merged.events == tuple(batch.events[0] for batch in batches)
    assert list(merge([])) == []


def test_merging_stays_within_the_bound_of_a_batch() -> None:
    big = tuple(SequenceHash(number) for number in range(20_000))
    batches = [KvBatch(number, (BlocksRemoved(big),)) for number in (1, 2, 3)]

    assert list(merge(batches)) == batches


@pytest.mark.parametrize("seed", range(5))
def test_following_and_snapshots_agree_with_a_plain_set_at_every_moment(seed: int) -> None:
    rng = random.Random(seed)
    history = KvHistory(ring_size=10_000)
    parents: dict[SequenceHash, SequenceHash | None] = {}
    for number in range(1, 300):
        event: KvEvent
        leaves = [block for block in parents if block not in parents.values()]
        if leaves and rng.random() < 0.45:
            gone = rng.choice(leaves)
            del parents[gone]
            event = BlocksRemoved((gone,))
        elif rng.random() < 0.01:
            parents.clear()
            event = CacheCleared()
        else:
            block = SequenceHash(number)
            parents[block] = rng.choice([None, *parents])
            event = store(parents[block], block)
        history.publish([event])
        expected = {block: (parent, 100 + block) for block, parent in parents.items()}
        assert history.blocks == set(parents)
        assert replayed(history.snapshot()) == expected

    batches = history.since(0)

    assert batches is not None
    assert set(replayed(batch.events for batch in batches)) == set(parents)
