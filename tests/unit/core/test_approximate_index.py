"""The index of what was routed, and its naive twin: a time per block, searched linearly."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.core.approximate_index import ApproximateIndex
from kvmesh.core.ids import SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.core.prompt_blocks import PromptBlocks

W0, W1, W7 = (WorkerRank(WorkerId(f"n/decode/{number}")) for number in (0, 1, 7))


def prompt(*local: int) -> PromptBlocks:
    return PromptBlocks.of_local(local, 16)


def test_what_was_routed_scores_until_its_time_is_over() -> None:
    index = ApproximateIndex(ttl_s=120.0)
    blocks = PromptBlocks.of_tokens(np.arange(1, 5, dtype=np.uint32), 4)

    index.record(W7, blocks, now=1000.0)

    assert index.match(blocks) == {W7: 1}
    assert index.expire(1119.9) == 0
    assert index.match(blocks) == {W7: 1}
    assert index.expire(1120.0) == 1
    assert index.match(blocks) == {}
    assert (index.stats.pairs, index.stats.keys) == (0, 0)


def test_what_a_worker_said_does_not_expire_with_what_was_routed() -> None:
    said, routed = PrefixIndex(), ApproximateIndex(ttl_s=120.0)
    blocks = prompt(1, 2)
    said.store(W7, parent=None, block_hashes=tuple(blocks), local_hashes=(1, 2))
    routed.record(W7, blocks, now=0.0)

    routed.expire(1e6)

    assert routed.match(blocks) == {}
    assert said.match(blocks) == {W7: 2}


def test_a_prompt_routed_again_lives_on_with_all_it_shares() -> None:
    index = ApproximateIndex(ttl_s=10.0)
    index.record(W0, prompt(1, 2, 3), now=0.0)
    index.record(W0, prompt(1, 2, 9), now=6.0)

    assert index.expire(10.0) == 1

    assert index.match(prompt(1, 2, 3)) == {W0: 2}
    assert index.match(prompt(1, 2, 9)) == {W0: 3}
    assert index.expire(16.0) == 3


def test_a_rank_holds_no_more_than_its_cache_and_loses_ends_first() -> None:
    index = ApproximateIndex()
    index.limit(W0, 4)
    index.record(W0, prompt(1, 2, 3), now=0.0)
    index.record(W1, prompt(1, 2, 3), now=0.0)
    index.record(W0, prompt(7, 8), now=1.0)

    assert index.match(prompt(1, 2, 3)) == {W0: 2, W1: 3}
    assert index.match(prompt(7, 8)) == {W0: 2}

    index.record(W0, prompt(4, 5, 6, 7, 8, 9), now=2.0)
    assert index.match(prompt(4, 5, 6, 7, 8, 9)) == {W0: 4}
    assert index.match(prompt(7, 8)) == {}


def test_all_ranks_together_hold_no_more_than_the_bound() -> None:
    index = ApproximateIndex(max_pairs=5)
    index.record(W0, prompt(1, 2, 3), now=0.0)
    index.record(W1, prompt(1, 2, 3), now=1.0)

    assert index.stats.pairs == 5
    assert index.match(prompt(1, 2, 3)) == {W0: 2, W1: 3}


def test_bits_tell_what_ranks_tell() -> None:
    index = ApproximateIndex()
    before = index.version
    index.record(W0, prompt(1, 2, 3), now=0.0)
    index.record(W1, prompt(1, 2), now=0.0)
    bits = {index.bit_of(W0): 3, index.bit_of(W1): 2}

    assert index.version > before
    assert {mask.bit_length() - 1: depth for mask, depth in index.match_masks(prompt(1, 2, 3, 4))} == bits
    assert (index.depth(W0, prompt(1, 2, 9)), index.depth(W7, prompt(1))) == (2, 0)
    assert index.bit_of(W7) is None


def test_a_forgotten_worker_scores_no_more() -> None:
    index = ApproximateIndex()
    other_rank = WorkerRank(W0.worker_id, 1)
    for worker in (W0, other_rank, W1):
        index.record(worker, prompt(1, 2), now=0.0)

    index.remove_rank(other_rank)
    assert index.match(prompt(1, 2)) == {W0: 2, W1: 2}

    index.remove_worker(W0.worker_id)
    index.remove_worker(WorkerId("nobody"))
    assert index.match(prompt(1, 2)) == {W1: 2}
    assert index.expire(1e6) == 2
    index.check_integrity()


def test_prompts_known_by_sequence_hashes_meet_their_like() -> None:
    index = ApproximateIndex()
    hashes = tuple(prompt(1, 2, 3))

    index.record(W0, hashes, now=0.0)

    assert index.match(hashes[:2]) == {W0: 2}
    assert index.match(PromptBlocks.of_sequence(hashes, 16)) == {W0: 3}


def test_a_prompt_without_full_blocks_leaves_nothing() -> None:
    index = ApproximateIndex()

    index.record(W0, prompt(), now=0.0)

    assert index.bit_of(W0) is None
    assert index.match(prompt()) == {}


class NaiveApproximateIndex:
    """When each (rank, block) was last routed, and which record that was."""

    def __init__(self, *, ttl_s: float, max_pairs: int) -> None:
        self.ttl_s, self.max_pairs = ttl_s, max_pairs
        self.limits: dict[WorkerRank, int] = {}
        self.held: dict[tuple[WorkerRank, SequenceHash], tuple[float, int, int]] = {}
        """(when, the number of the record, minus the depth): the least goes first."""
        self.records = 0

    def record(self, worker: WorkerRank, blocks: Sequence[SequenceHash], now: float) -> None:
        self.records += 1
        for depth, block in enumerate(blocks):
            self.held[worker, block] = (now, self.records, -depth)
        self.shrink([pair for pair in self.held if pair[0] == worker], self.limits.get(worker))
        self.shrink([*self.held], self.max_pairs)

    def shrink(self, pairs: list[tuple[WorkerRank, SequenceHash]], most: int | None) -> None:
        excess = 0 if most is None else max(len(pairs) - most, 0)
        for pair in sorted(pairs, key=self.held.__getitem__)[:excess]:
            del self.held[pair]

    def expire(self, now: float) -> int:
        old = [pair for pair, (at, _, _) in self.held.items() if now - at >= self.ttl_s]
        for pair in old:
            del self.held[pair]
        return len(old)

    def clear(self, worker: WorkerRank) -> None:
        self.held = {pair: when for pair, when in self.held.items() if pair[0] != worker}

    def match(self, blocks: Sequence[SequenceHash]) -> dict[WorkerRank, int]:
        depths = {}
        for worker in {worker for worker, _ in self.held}:
            missing = [depth for depth, block in enumerate(blocks) if (worker, block) not in self.held]
            depths[worker] = missing[0] if missing else len(blocks)
        return {worker: depth for worker, depth in depths.items() if depth}


PATHS = st.lists(st.sampled_from([5, 5, 5, 6, 7]), min_size=1, max_size=8)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["record"] * 6 + ["expire", "expire", "clear", "limit"]),
        st.sampled_from([W0, W1, W7]),
        PATHS,
        st.integers(0, 12),
    ),
    min_size=8,
    max_size=60,
)


@pytest.mark.parametrize("max_pairs", [6, 1000])
@given(steps=STEPS)
@settings(max_examples=80, deadline=None)
def test_the_index_answers_as_its_naive_twin(
    max_pairs: int, steps: list[tuple[str, WorkerRank, list[int], int]]
) -> None:
    index, twin = (
        ApproximateIndex(ttl_s=20.0, max_pairs=max_pairs),
        NaiveApproximateIndex(ttl_s=20.0, max_pairs=max_pairs),
    )
    now = 0.0
    for done, (kind, worker, path, number) in enumerate(steps, start=1):
        blocks = prompt(*path)
        if kind == "record":
            index.record(worker, blocks, now)
            twin.record(worker, tuple(blocks), now)
        elif kind == "expire":
            now += number
            assert index.expire(now) == twin.expire(now)
        elif kind == "limit":
            index.limit(worker, number)
            twin.limits[worker] = number
        else:
            index.clear(worker)
            twin.clear(worker)
        index.check_integrity()
        assert index.stats.pairs == len(twin.held)
        for _, _, asked, _ in steps[max(done - 6, 0) : done]:
            assert index.match(prompt(*asked)) == twin.match(tuple(prompt(*asked)))
