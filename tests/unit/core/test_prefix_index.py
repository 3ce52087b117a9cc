from collections.abc import Sequence

import pytest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.hashing import sequence_hashes
from kvmesh.core.ids import SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_index import HeldBlock, PrefixIndex, StoreOutcome, StoreResult
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.testing.naive_prefix_index import NaivePrefixIndex

W0, W1, W2 = (WorkerRank(WorkerId(f"n/decode/{number}")) for number in range(3))

Index = PrefixIndex | NaivePrefixIndex


@pytest.fixture(params=[PrefixIndex, NaivePrefixIndex])
def index(request: pytest.FixtureRequest) -> Index:
    """The index, and the twin that judges it elsewhere: the table of cases judges both."""
    made: Index = request.param()
    return made


def seq(*local: int) -> tuple[SequenceHash, ...]:
    return sequence_hashes(local)


def store(index: Index, worker: WorkerRank, local: Sequence[int], *, after: int = 0) -> StoreOutcome:
    """Store the blocks of `local` from number `after` on, below the one before."""
    blocks = seq(*local)
    return index.store(worker, parent=blocks[after - 1] if after else None, block_hashes=blocks[after:])


def stored(count: int, duplicates: int = 0) -> StoreOutcome:
    return StoreOutcome(StoreResult.STORED, count, duplicates)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        pytest.param([1, 2, 3], {W0: 3}, id="all"),
        pytest.param([1, 2, 999], {W0: 2}, id="a prefix"),
        pytest.param([1, 2, 3, 4], {W0: 3}, id="more than there is"),
        pytest.param([], {}, id="nothing"),
        pytest.param([999, 998], {}, id="something else"),
        pytest.param([2, 3], {}, id="the same blocks elsewhere in a sequence"),
    ],
)
def test_match_counts_leading_blocks(index: Index, query: list[int], expected: dict[WorkerRank, int]) -> None:
    store(index, W0, [1, 2, 3])

    assert index.match(seq(*query)) == expected
    assert index.depth(W0, seq(*query)) == expected.get(W0, 0)


@pytest.mark.parametrize(
    ("query", "expected"),
    [([1], {W0: 1, W1: 1}), ([1, 2], {W0: 2, W1: 1}), ([1, 3], {W0: 1, W1: 2}), ([2], {})],
)
def test_branches_score_apart(index: Index, query: list[int], expected: dict[WorkerRank, int]) -> None:
    store(index, W0, [1, 2])
    store(index, W1, [1, 3])

    assert index.match(seq(*query)) == expected


def test_removing_all_blocks_leaves_nothing(index: Index) -> None:
    store(index, W0, [1, 2, 3])

    assert index.remove(W0, seq(1, 2, 3)) == 3

    assert index.match(seq(1, 2, 3)) == {}
    assert (index.stats.keys, index.stats.pairs, index.stats.aside_pairs, index.stats.workers) == (0, 0, 0, 0)


def test_storing_again_does_not_grow(index: Index) -> None:
    assert store(index, W0, [1, 2, 3]) == stored(3)
    before = index.stats

    assert store(index, W0, [1, 2, 3]) == stored(0, duplicates=3)
    assert store(index, W0, [1, 2, 3], after=1) == stored(0, duplicates=2)

    assert index.stats == before


def test_a_continuation_extends_its_parent(index: Index) -> None:
    store(index, W0, [1, 2, 3])

    assert store(index, W0, [1, 2, 3, 4, 5], after=3) == stored(2)

    assert index.match(seq(1, 2, 3, 4, 5)) == {W0: 5}


def test_blocks_below_a_lost_one_are_kept_aside_until_it_returns(index: Index) -> None:
    blocks = seq(1, 2, 3, 4, 5)
    store(index, W0, [1, 2, 3, 4, 5])

    assert index.remove(W0, [blocks[2]]) == 1
    assert index.match(blocks) == {W0: 2}
    assert (index.stats.pairs, index.stats.aside_pairs) == (2, 2)
    assert index.blocks_of(W0) == {blocks[0], blocks[1], blocks[3], blocks[4]}

    assert store(index, W0, [1, 2, 3], after=2) == stored(1)
    assert index.match(blocks) == {W0: 5}
    before = index.stats
    assert (before.pairs, before.aside_pairs) == (5, 0)

    assert store(index, W0, [1, 2, 3, 4, 5], after=3) == stored(0, duplicates=2)
    assert index.match(blocks) == {W0: 5}
    assert index.stats == before


def test_blocks_stored_below_one_kept_aside_go_aside_too(index: Index) -> None:
    blocks = seq(1, 2, 3, 4)
    store(index, W0, [1, 2, 3])
    index.remove(W0, [blocks[1]])

    assert store(index, W0, [1, 2, 3, 4], after=3) == stored(1)
    assert index.match(blocks) == {W0: 1}

    store(index, W0, [1, 2], after=1)
    assert index.match(blocks) == {W0: 4}


def test_a_block_removed_while_aside_does_not_return(index: Index) -> None:
    blocks = seq(1, 2, 3, 4)
    store(index, W0, [1, 2, 3, 4])
    index.remove(W0, [blocks[1]])

    assert index.remove(W0, [blocks[2]]) == 1
    store(index, W0, [1, 2], after=1)

    assert index.match(blocks) == {W0: 2}
    assert index.stats.aside_pairs == 1


def test_an_orphan_of_one_rank_is_no_orphan_of_another(index: Index) -> None:
    store(index, W0, [1, 2, 3])
    store(index, W1, [1, 2, 3])

    index.remove(W0, [seq(1, 2)[1]])

    assert index.match(seq(1, 2, 3)) == {W0: 1, W1: 3}


def test_a_store_below_an_unknown_parent_is_rejected_and_counted(index: Index) -> None:
    store(index, W1, [1, 2, 3])
    store(index, W2, [1, 2, 3])
    store(index, W1, [1, 2, 3, 4, 5, 6], after=3)
    store(index, W2, [1, 2, 3, 7, 8], after=3)
    dump = list(index.dump())

    assert store(index, W2, [1, 2, 3, 4, 5, 6, 9, 10], after=6) == StoreOutcome(StoreResult.UNKNOWN_PARENT)

    assert index.match(seq(1, 2, 3, 4, 5, 6, 9, 10)) == {W1: 6, W2: 3}
    assert index.stats.rejected_unknown_parent == 1
    assert list(index.dump()) == dump
    assert store(index, W2, [1, 2, 3, 4], after=3) == stored(1)
    assert index.match(seq(1, 2, 3, 4)) == {W1: 4, W2: 4}


def test_one_rank_may_grow_past_another(index: Index) -> None:
    store(index, W1, [1, 2, 3, 4, 5, 6])
    store(index, W2, [1, 2, 3])
    store(index, W2, [1, 2, 3, 4, 5, 6], after=3)
    store(index, W2, [1, 2, 3, 4, 5, 6, 7, 8, 9], after=6)

    assert index.match(seq(*range(1, 10))) == {W1: 6, W2: 9}


def test_forgetting_a_worker_leaves_the_others(index: Index) -> None:
    for worker in (W0, W1, W2):
        store(index, worker, [1, 2, 3])

    index.remove_worker(W0.worker_id)
    assert index.match(seq(1, 2, 3)) == {W1: 3, W2: 3}

    index.clear(W1)
    assert index.match(seq(1, 2, 3)) == {W2: 3}
    assert store(index, W1, [1]) == stored(1)
    assert index.match(seq(1, 2, 3)) == {W1: 1, W2: 3}


def test_ranks_of_one_worker_score_apart(index: Index) -> None:
    ranks = [WorkerRank(W0.worker_id, rank) for rank in range(3)]
    for count, rank in enumerate(ranks, start=1):
        store(index, rank, [1, 2, 3][:count])
    assert index.match(seq(1, 2, 3)) == {ranks[0]: 1, ranks[1]: 2, ranks[2]: 3}

    index.remove_rank(ranks[0])
    assert index.match(seq(1, 2, 3)) == {ranks[1]: 2, ranks[2]: 3}

    index.remove_worker(W0.worker_id)
    assert index.match(seq(1, 2, 3)) == {}


def test_a_dump_lists_parents_first_and_replays_to_an_equal_dump(index: Index) -> None:
    store(index, W1, [1, 2, 3])
    store(index, W0, [1, 2])
    store(index, W0, [4])
    one, two, three = seq(1, 2, 3)
    (four,) = seq(4)
    copy = PrefixIndex()

    dump = list(index.dump())
    assert copy.restore(dump) == 6

    assert dump == [
        HeldBlock(W0, None, one),
        HeldBlock(W1, None, one),
        HeldBlock(W0, one, two),
        HeldBlock(W1, one, two),
        HeldBlock(W1, two, three),
        HeldBlock(W0, None, four),
    ]
    assert list(copy.dump()) == dump


def test_removing_the_unknown_changes_nothing(index: Index) -> None:
    store(index, W0, [1, 2])
    before = index.stats

    assert index.remove(W0, seq(9)) == 0
    assert index.remove(W1, seq(1)) == 0
    index.remove_worker(WorkerId("nobody"))
    index.remove_rank(W1)
    index.clear(W1)

    assert index.stats == before
    assert index.match(seq(1, 2)) == {W0: 2}


def test_a_store_of_no_blocks_records_nothing(index: Index) -> None:
    assert index.store(W0, parent=None, block_hashes=[]) == stored(0)

    assert index.stats.workers == 0
    assert index.blocks_of(W0) == frozenset()


@pytest.mark.parametrize("kind", [PrefixIndex, NaivePrefixIndex])
def test_a_store_beyond_max_pairs_is_refused_whole_and_marks_the_rank(kind: type[Index]) -> None:
    index = kind(max_pairs=4)
    store(index, W0, [1, 2, 3])
    dump = list(index.dump())

    assert store(index, W1, [1, 2]) == StoreOutcome(StoreResult.FULL)

    assert list(index.dump()) == dump
    assert (index.stats.rejected_full, index.stats.incomplete) == (1, frozenset({W1}))
    assert store(index, W0, [1, 2, 3]) == stored(0, duplicates=3)
    index.clear(W1)
    assert index.stats.incomplete == frozenset()
    assert store(index, W1, [1]) == stored(1)


@pytest.mark.parametrize("kind", [PrefixIndex, NaivePrefixIndex])
def test_a_forgotten_rank_makes_room_at_once(kind: type[Index]) -> None:
    index = kind(max_pairs=100)
    index.store(W0, parent=None, block_hashes=seq(*range(100)))

    index.clear(W0)

    assert index.store(W1, parent=None, block_hashes=seq(*range(100, 200))) == stored(100)
    assert index.stats.rejected_full == 0


@pytest.mark.parametrize("kind", [PrefixIndex, NaivePrefixIndex])
def test_orphans_beyond_the_bound_are_dropped_and_counted(kind: type[Index]) -> None:
    index = kind(max_aside_per_worker=2)
    blocks = seq(1, 2, 3, 4, 5)
    store(index, W0, [1, 2, 3, 4, 5])

    index.remove(W0, [blocks[1]])

    assert (index.stats.aside_pairs, index.stats.dropped_aside, index.stats.incomplete) == (0, 3, frozenset({W0}))
    store(index, W0, [1, 2], after=1)
    assert index.match(blocks) == {W0: 2}


@pytest.mark.parametrize("kind", [PrefixIndex, NaivePrefixIndex])
def test_a_batch_removed_top_first_needs_no_room_aside(kind: type[Index]) -> None:
    index = kind(max_aside_per_worker=0)
    store(index, W0, [1, 2, 3, 4])

    assert index.remove(W0, seq(1, 2, 3, 4)) == 4

    assert (index.stats.dropped_aside, index.stats.pairs) == (0, 0)


@pytest.mark.parametrize(
    ("parent", "blocks"),
    [
        pytest.param(None, [12], id="a middle block as a first one"),
        pytest.param(11, [13], id="a block below its parent's parent"),
        pytest.param(13, [14, 11], id="a first block below others"),
        pytest.param(13, [14, 14], id="a block below itself"),
        pytest.param(13, [13], id="the parent below itself"),
        pytest.param(None, [11, 12, 12], id="a known block below itself"),
    ],
)
def test_a_block_below_a_second_parent_is_refused(parent: int | None, blocks: list[int]) -> None:
    index = PrefixIndex()
    index.store(W0, parent=None, block_hashes=[SequenceHash(key) for key in (11, 12, 13)])
    dump = list(index.dump())

    outcome = index.store(
        W0,
        parent=None if parent is None else SequenceHash(parent),
        block_hashes=[SequenceHash(key) for key in blocks],
    )

    assert outcome == StoreOutcome(StoreResult.CONFLICTING_PARENT)
    assert index.stats.rejected_conflicting_parent == 1
    assert list(index.dump()) == dump


def test_a_forgotten_rank_is_no_conflict() -> None:
    index = PrefixIndex()
    one, two = SequenceHash(1), SequenceHash(2)
    index.store(W0, parent=None, block_hashes=[one, two])
    index.store(W1, parent=None, block_hashes=[one])

    index.remove_rank(W0)

    assert index.store(W1, parent=None, block_hashes=[two]) == stored(1)
    index.check_integrity()


def test_a_new_rank_inherits_nothing_from_one_whose_sweep_is_not_over() -> None:
    index = PrefixIndex()
    roots = [seq(root, 1) for root in range(200)]
    for blocks in roots:
        index.store(W0, parent=None, block_hashes=blocks)

    index.remove_rank(W0)
    index.store(W1, parent=None, block_hashes=roots[0])

    assert index.stats.unswept_pairs > 0
    assert [index.match(blocks) for blocks in roots] == [{W1: 2}] + [{}] * 199
    index.check_integrity()


def test_later_calls_return_the_memory_of_a_forgotten_rank() -> None:
    index = PrefixIndex()
    for root in range(200):
        index.store(W0, parent=None, block_hashes=seq(root, 1, 2))
    index.remove_rank(W0)
    assert index.stats.unswept_pairs == 600

    for _ in range(20):
        index.remove(W1, [])

    assert (index.stats.unswept_pairs, index.stats.keys) == (0, 0)
    index.check_integrity()


def test_restarting_ranks_do_not_use_up_bits() -> None:
    index = PrefixIndex()
    for _ in range(100):
        index.store(W0, parent=None, block_hashes=seq(1, 2))
        index.clear(W0)

    index.store(W0, parent=None, block_hashes=seq(1, 2))

    index.check_integrity()
    assert index.match(seq(1, 2)) == {W0: 2}
    assert index.stats.keys == 2


def test_blocks_whose_hashes_share_60_bits_are_told_apart() -> None:
    index = PrefixIndex()
    one, below = SequenceHash(11), SequenceHash(12)
    like_one, like_below = SequenceHash(11 + 2**60), SequenceHash(12 + 2**61)
    index.store(W0, parent=None, block_hashes=[one, below])

    assert index.store(W1, parent=None, block_hashes=[like_one]) == StoreOutcome(StoreResult.CONFLICTING_PARENT)
    assert index.store(W0, parent=like_one, block_hashes=[SequenceHash(13)]).result is StoreResult.UNKNOWN_PARENT
    assert index.remove(W0, [like_one, like_below]) == 0
    assert index.match([like_one]) == {}
    assert index.match([one, like_below]) == {W0: 1}
    assert index.match([one, below]) == {W0: 2}


def test_prompts_are_found_by_keys_and_by_sequence_hashes_alike() -> None:
    index = PrefixIndex()
    local = list(range(1, 41))
    index.store(W0, parent=None, block_hashes=seq(*local), local_hashes=local)
    index.store(W1, parent=None, block_hashes=seq(*local[:20]), local_hashes=local[:20])

    for query in (seq(*local), PromptBlocks.of_local(local, 16), PromptBlocks.of_sequence(seq(*local), 16)):
        assert index.match(query) == {W0: 40, W1: 20}
        assert index.depth(W1, query) == 20


def test_blocks_without_local_hashes_are_found_by_any_query() -> None:
    index = PrefixIndex()
    store(index, W0, [1, 2, 3])
    index.store(W1, parent=None, block_hashes=seq(1, 9), local_hashes=[1, 9])

    assert index.match(PromptBlocks.of_local([1, 2, 3], 16)) == {W0: 3, W1: 1}
    assert index.match(PromptBlocks.of_local([1, 9], 16)) == {W0: 1, W1: 2}


def test_local_hashes_survive_being_kept_aside() -> None:
    index = PrefixIndex()
    local = [1, 2, 3, 4, 5]
    blocks = seq(*local)
    index.store(W0, parent=None, block_hashes=blocks, local_hashes=local)

    index.remove(W0, [blocks[1]])
    assert index.match(PromptBlocks.of_local(local, 16)) == {W0: 1}
    index.store(W0, parent=blocks[0], block_hashes=[blocks[1]], local_hashes=[2])

    assert index.match(PromptBlocks.of_local(local, 16)) == {W0: 5}
    assert [held.local_hash for held in index.dump()] == local


@pytest.mark.parametrize("local", [[1], [1, 2, 3]])
def test_local_hashes_that_are_not_one_per_block_are_refused(local: list[int]) -> None:
    index = PrefixIndex()

    with pytest.raises(FixRequestError) as caught:
        index.store(W0, parent=None, block_hashes=seq(1, 2), local_hashes=local)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "local_hashes")
    assert index.stats.pairs == 0


@pytest.mark.parametrize("kind", [PrefixIndex, NaivePrefixIndex])
def test_a_rank_over_its_limit_is_refused_and_marked_and_the_others_go_on(kind: type[Index]) -> None:
    index = kind()
    index.limit(W0, 4)
    store(index, W0, [1, 2, 3])
    store(index, W1, [1, 2, 3])

    assert store(index, W0, [1, 2, 3, 4, 5], after=3) == StoreOutcome(StoreResult.FULL)

    assert index.stats.incomplete == frozenset({W0})
    assert store(index, W0, [1, 2, 3, 4], after=3) == stored(1)
    assert store(index, W1, [1, 2, 3, 4, 5, 6], after=3) == stored(3)
    index.clear(W0)
    assert index.stats.incomplete == frozenset()
    assert store(index, W0, [1, 2, 3, 4, 5]) == StoreOutcome(StoreResult.FULL)
    index.remove_worker(W0.worker_id)
    assert store(index, W0, [1, 2, 3, 4, 5]) == stored(5)
    index.limit(W0, 5)
    index.limit(W0, None)
    assert store(index, W0, [1, 2, 3, 4, 5, 6], after=5) == stored(1)


def test_bits_change_with_the_version_alone() -> None:
    index = PrefixIndex()
    assert index.bit_of(W0) is None
    versions = [index.version]
    store(index, W0, [1, 2])
    store(index, W1, [1])
    bits = {index.bit_of(W0): 2, index.bit_of(W1): 1}
    versions.append(index.version)

    assert {mask.bit_length() - 1: depth for mask, depth in index.match_masks(seq(1, 2, 3))} == bits
    store(index, W0, [1, 2, 3], after=2)
    assert index.version == versions[-1]
    index.remove_rank(W0)

    assert index.bit_of(W0) is None
    assert index.version > versions[-1] > versions[0]
    assert index.match_masks(seq(1, 2)) == [(1 << (index.bit_of(W1) or 0), 1)]


def test_a_dump_is_of_the_moment_it_was_asked_for() -> None:
    index = PrefixIndex()
    index.store(W0, parent=None, block_hashes=seq(1, 2, 3), local_hashes=None)

    dump = index.dump()
    index.remove(W0, seq(1, 2, 3)[2:])
    index.store(W0, parent=None, block_hashes=seq(8), local_hashes=None)

    assert [held.block_hash for held in dump] == list(seq(1, 2, 3))
