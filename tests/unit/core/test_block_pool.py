"""What a block pool promises, case by case and under random programs."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvmesh.core.block_pool import BlockPool
from kvmesh.core.ids import SequenceHash
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared

A, B, C, D, X = (SequenceHash(number) for number in (1, 2, 3, 4, 9))


def stored(pool: BlockPool, *chain: SequenceHash) -> list[int]:
    """Hold a sequence, sealing what is not cached yet; the local hash of block n is 100 + n."""
    blocks = pool.hold_prefix(chain)
    taken = pool.allocate(len(chain) - len(blocks))
    assert taken is not None
    for index, block in enumerate(taken, len(blocks)):
        parent = chain[index - 1] if index else None
        blocks.append(pool.seal(block, chain[index], parent=parent, local_hash=100 + chain[index]))
    return blocks


def test_new_pool_is_free() -> None:
    pool = BlockPool(3)

    assert (pool.active_blocks, pool.available_blocks, pool.cached_blocks) == (0, 3, 0)
    assert pool.drain_events() == ()


def test_private_blocks_are_nobody_elses_and_become_free_again() -> None:
    pool = BlockPool(3)
    taken = pool.allocate(2)
    assert taken is not None
    while_held = pool.active_blocks, pool.available_blocks, pool.cached_blocks, [pool.holds(block) for block in taken]
    pool.give_back(taken)

    assert while_held == (2, 1, 0, [1, 1])
    assert (pool.active_blocks, pool.available_blocks) == (0, 3)
    assert pool.drain_events() == ()


def test_allocating_more_than_there_is_changes_nothing() -> None:
    pool = BlockPool(3)
    pool.give_back(stored(pool, A))
    held = stored(pool, X)
    pool.drain_events()

    assert pool.allocate(3) is None
    assert pool.cached_prefix([A]) == 1
    assert pool.drain_events() == ()
    assert (pool.active_blocks, pool.available_blocks) == (len(held), 2)


def test_sealed_chain_is_one_event() -> None:
    pool = BlockPool(4)
    stored(pool, A, B, C)

    assert pool.drain_events() == (BlocksStored(None, (A, B, C), (101, 102, 103)),)
    assert pool.drain_events() == ()


def test_branch_is_stored_under_the_block_it_follows() -> None:
    pool = BlockPool(4)
    stored(pool, A, B)
    pool.drain_events()
    stored(pool, A, C)

    assert pool.drain_events() == (BlocksStored(A, (C,), (103,)),)


def test_eviction_takes_the_leaf_first_and_says_so() -> None:
    pool = BlockPool(3)
    pool.give_back(stored(pool, A, B, C))
    pool.drain_events()
    pool.allocate(2)

    assert pool.drain_events() == (BlocksRemoved((C, B)),)
    assert pool.cached_prefix([A, B, C]) == 1


def test_eviction_takes_the_least_recently_used_sequence_first() -> None:
    pool = BlockPool(4)
    pool.give_back(stored(pool, A, B))
    pool.give_back(stored(pool, C, D))
    pool.give_back(pool.hold_prefix([A, B]))
    pool.drain_events()
    pool.allocate(2)

    assert pool.drain_events() == (BlocksRemoved((D, C)),)


def test_held_blocks_are_never_evicted() -> None:
    pool = BlockPool(3)
    stored(pool, A, B)
    pool.give_back(stored(pool, X))
    pool.drain_events()

    assert pool.allocate(2) is None
    assert pool.allocate(1) is not None
    assert pool.drain_events() == (BlocksRemoved((X,)),)


def test_shared_block_is_idle_only_after_its_last_holder() -> None:
    pool = BlockPool(3)
    one = stored(pool, A)
    two = pool.hold_prefix([A])
    pool.give_back(one)
    after_one = pool.active_blocks
    pool.give_back(two)

    assert (after_one, pool.active_blocks) == (1, 0)
    assert pool.cached_prefix([A]) == 1


def test_sealing_what_is_cached_already_frees_the_second_copy() -> None:
    pool = BlockPool(4)
    first = stored(pool, A)
    pool.give_back(first)
    pool.drain_events()
    copy = pool.allocate(1)
    assert copy is not None

    used = pool.seal(copy[0], A, parent=None, local_hash=101)

    assert used == first[0]
    assert (pool.holds(used), pool.holds(copy[0])) == (1, 0)
    assert (pool.active_blocks, pool.cached_blocks) == (1, 1)
    assert pool.drain_events() == ()


def test_prefix_ends_at_the_first_block_that_is_not_cached() -> None:
    pool = BlockPool(4)
    pool.give_back(stored(pool, A, B))

    assert pool.cached_prefix([A, B, C]) == 2
    assert pool.cached_prefix([A, X, B]) == 1
    assert pool.cached_prefix([]) == 0


def test_what_does_not_begin_a_sequence_is_no_prefix() -> None:
    pool = BlockPool(4)
    pool.give_back(stored(pool, A, B))

    assert pool.cached_prefix([B]) == 0
    assert pool.hold_prefix([B]) == []
    assert pool.active_blocks == 0


@pytest.mark.parametrize(
    ("blocks", "spare", "expected"),
    [
        pytest.param(4, 0, True, id="two cached, one free, one to evict"),
        pytest.param(5, 0, False, id="one too many: its own prefix cannot be evicted for it"),
        pytest.param(4, 1, False, id="none to spare"),
        pytest.param(3, 1, True, id="one to spare"),
    ],
)
def test_room_counts_the_reused_prefix_once(blocks: int, spare: int, expected: bool) -> None:
    pool = BlockPool(5)
    pool.allocate(1)
    pool.give_back(stored(pool, A, B))
    pool.give_back(stored(pool, X))

    assert pool.has_room([A, B], blocks, spare=spare) is expected


def test_room_counts_a_prefix_that_others_hold() -> None:
    pool = BlockPool(3)
    stored(pool, A, B)

    assert pool.has_room([A, B], 3)
    assert not pool.has_room([X], 2)


def test_clearing_an_idle_cache_is_one_event() -> None:
    pool = BlockPool(4)
    pool.give_back(stored(pool, A, B))
    pool.drain_events()
    pool.clear()

    assert pool.drain_events() == (CacheCleared(),)
    assert (pool.cached_blocks, pool.available_blocks) == (0, 4)


def test_clearing_leaves_what_is_held_and_names_what_went() -> None:
    pool = BlockPool(4)
    held = stored(pool, A)
    pool.give_back(stored(pool, A, B))
    pool.give_back(stored(pool, C))
    pool.drain_events()
    pool.clear()

    assert pool.drain_events() == (BlocksRemoved((B, C)),)
    assert pool.cached_prefix([A]) == len(held) == 1


def test_clearing_an_empty_cache_says_nothing() -> None:
    pool = BlockPool(2)
    pool.clear()

    assert pool.drain_events() == ()


class PoolMachine(RuleBasedStateMachine):
    """Sequences of a narrow tree are held, grown and given back at random; a twin keeps the cache from the events."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.parents: dict[SequenceHash, SequenceHash | None] = {}
        self.holders: list[list[int]] = []

    @rule(path=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def hold_and_fill(self, path: list[int]) -> None:
        chain = [SequenceHash(int("1" + "".join(map(str, path[: end + 1])))) for end in range(len(path))]
        blocks = self.pool.hold_prefix(chain)
        taken = self.pool.allocate(len(chain) - len(blocks))
        if taken is None:
            self.pool.give_back(blocks)
            return
        for index, block in enumerate(taken, len(blocks)):
            parent = chain[index - 1] if index else None
            blocks.append(self.pool.seal(block, chain[index], parent=parent, local_hash=index))
        self.holders.append(blocks)

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        available = self.pool.available_blocks
        taken = self.pool.allocate(count)
        assert (taken is not None) == (count <= available)
        if taken is not None:
            self.holders.append(taken)

    @rule(pick=st.integers(0, 100))
    def give_back(self, pick: int) -> None:
        if self.holders:
            self.pool.give_back(self.holders.pop(pick % len(self.holders)))

    @rule()
    def clear(self) -> None:
        self.pool.clear()

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        held = {block for blocks in self.holders for block in blocks}
        assert self.pool.active_blocks == len(held)
        for block in held:
            assert self.pool.holds(block) == sum(blocks.count(block) for blocks in self.holders)

    @invariant()
    def events_tell_the_cache(self) -> None:
        for event in self.pool.drain_events():
            if isinstance(event, BlocksStored):
                parent = event.parent
                for block_hash in event.block_hashes:
                    assert parent is None or parent in self.parents
                    assert block_hash not in self.parents
                    self.parents[block_hash] = parent
                    parent = block_hash
            elif isinstance(event, BlocksRemoved):
                for block_hash in event.block_hashes:
                    del self.parents[block_hash]
                    assert block_hash not in self.parents.values()
            else:
                self.parents.clear()
        assert self.pool.cached_blocks == len(self.parents)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
