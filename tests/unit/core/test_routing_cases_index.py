"""The table of index cases through the whole router, for events that carry local hashes and events that do not."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from kvmesh.core.approximate_index import ApproximateIndex
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.hashing import sequence_hashes
from kvmesh.core.ids import AttemptKey, Epoch, LocalHash, RequestId, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.index_port import IndexMode
from kvmesh.core.policies.kv_aware import KvAware
from kvmesh.core.prefix_index import PrefixIndex, StoreResult
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore, RoutingRules

W0, W1, W2 = (WorkerRank(WorkerId(f"n/decode/{number}")) for number in range(3))
EPOCH = Epoch(1)
BLOCK_SIZE = 4


class Told:
    """A router, and events told to it in the words of the table: blocks as local hashes, from the first on."""

    def __init__(self, *, local_known: bool, ranks: int = 1) -> None:
        self._local_known = local_known
        self.router = RoutingCore(RouterId("ours"), policy=KvAware(), rng=random.Random(1))
        for worker in (W0, W1, W2):
            self.router.put_worker(record(worker, ranks=ranks), now=0)

    def store(self, worker: WorkerRank, *local: int, after: int = 0) -> StoreResult:
        """Store the blocks from number `after` on, below the one before."""
        blocks = sequence_hashes(local)
        outcome = self.router.apply_kv_stored(
            worker,
            EPOCH,
            parent=blocks[after - 1] if after else None,
            block_hashes=blocks[after:],
            local_hashes=[LocalHash(value) for value in local[after:]] if self._local_known else None,
            now=0,
        )
        assert outcome is not None
        return outcome.result

    def remove(self, worker: WorkerRank, *local: int) -> None:
        """Remove the last of these blocks."""
        self.router.apply_kv_removed(worker, EPOCH, block_hashes=sequence_hashes(local)[-1:], now=0)

    def scores(self, *local: int) -> dict[WorkerRank, int]:
        """Ask both ways, and leave out who has nothing."""
        by_sequence = self._overlaps(sequence_hashes(local))
        by_key = self._overlaps(PromptBlocks.of_local(local, BLOCK_SIZE))
        assert by_key == by_sequence
        return by_key

    def _overlaps(self, blocks: Sequence[SequenceHash]) -> dict[WorkerRank, int]:
        query = RoutingQuery(model="m", prompt_tokens=len(blocks) * BLOCK_SIZE, block_hashes={BLOCK_SIZE: blocks})
        return {worker: depth for worker, depth in self.router.overlaps(query).items() if depth}


def record(worker: WorkerRank, *, ranks: int = 1) -> WorkerRecord:
    return WorkerRecord(worker_id=worker.worker_id, epoch=EPOCH, models=("m",), block_size=BLOCK_SIZE, ranks=ranks)


@pytest.fixture(params=[True, False], ids=["with local hashes", "without"])
def told(request: pytest.FixtureRequest) -> Told:
    return Told(local_known=request.param)


def test_leading_blocks_count(told: Told) -> None:
    told.store(W0, 1, 2, 3)

    assert told.scores(1, 2, 3) == {W0: 3}
    assert told.scores(1, 2, 999) == {W0: 2}
    assert told.scores(999, 998) == told.scores() == {}


def test_branches_count_apart(told: Told) -> None:
    told.store(W0, 1, 2)
    told.store(W1, 1, 3)

    assert told.scores(1) == {W0: 1, W1: 1}
    assert told.scores(1, 2) == {W0: 2, W1: 1}
    assert told.scores(1, 3) == {W0: 1, W1: 2}


def test_a_continuation_and_a_duplicate(told: Told) -> None:
    told.store(W0, 1, 2, 3)
    told.store(W0, 1, 2, 3)
    told.store(W0, 1, 2, 3, 4, 5, after=3)

    assert told.scores(1, 2, 3, 4, 5) == {W0: 5}
    assert told.router.index_stats.pairs == 5
    for length in (5, 4, 3, 2, 1):
        told.remove(W0, *range(1, length + 1))
    assert told.scores(1, 2, 3, 4, 5) == {}


def test_a_block_that_returns_brings_back_what_was_below_it(told: Told) -> None:
    told.store(W0, 1, 2, 3, 4, 5)
    told.remove(W0, 1, 2, 3)
    assert told.scores(1, 2, 3, 4, 5) == {W0: 2}

    told.store(W0, 1, 2, 3, after=2)
    assert told.scores(1, 2, 3, 4, 5) == {W0: 5}

    told.store(W0, 1, 2, 3, 4, 5, after=3)
    assert told.scores(1, 2, 3, 4, 5) == {W0: 5}
    assert told.router.index_stats.pairs == 5


def test_a_parent_that_a_worker_does_not_hold_is_refused_and_its_chain_may_begin_again(told: Told) -> None:
    told.store(W1, 1, 2, 3)
    told.store(W2, 1, 2, 3)
    told.store(W1, 1, 2, 3, 4, 5, 6, after=3)
    told.store(W2, 1, 2, 3, 7, 8, after=3)

    refused = told.store(W2, 1, 2, 3, 4, 5, 6, 9, 10, after=6)

    assert refused is StoreResult.UNKNOWN_PARENT
    assert told.router.index_stats.rejected_unknown_parent == 1
    assert told.scores(1, 2, 3, 4, 5, 6, 9, 10) == {W1: 6, W2: 3}
    told.store(W2, 1, 2, 3, 4, 5, 6, 9, 10, after=3)
    assert told.scores(1, 2, 3, 4, 5, 6, 9, 10) == {W1: 6, W2: 8}


def test_one_worker_grows_past_another(told: Told) -> None:
    told.store(W1, 1, 2, 3, 4, 5, 6)
    told.store(W2, 1, 2, 3)
    told.store(W2, 1, 2, 3, 4, 5, 6, after=3)
    told.store(W2, *range(1, 10), after=6)

    assert told.scores(*range(1, 10)) == {W1: 6, W2: 9}


def test_a_worker_that_goes_or_clears_leaves_the_others(told: Told) -> None:
    for worker in (W0, W1, W2):
        told.store(worker, 1, 2, 3)

    told.router.remove_worker(W0.worker_id, EPOCH, now=0)
    assert told.scores(1, 2, 3) == {W1: 3, W2: 3}
    told.router.apply_kv_cleared(W1, EPOCH, now=0)
    assert told.scores(1, 2, 3) == {W2: 3}


@pytest.mark.parametrize("local_known", [True, False])
def test_ranks_of_a_worker_score_apart(*, local_known: bool) -> None:
    told = Told(local_known=local_known, ranks=3)
    ranks = [WorkerRank(W0.worker_id, rank) for rank in range(3)]
    for rank, length in zip(ranks, (3, 2, 1), strict=True):
        told.store(rank, *range(1, length + 1))

    assert told.scores(1, 2, 3) == dict(zip(ranks, (3, 2, 1), strict=True))
    told.router.apply_kv_cleared(ranks[0], EPOCH, now=0)
    assert told.scores(1, 2, 3) == dict(zip(ranks[1:], (2, 1), strict=True))


def test_a_dump_replays_into_an_equal_dump(told: Told) -> None:
    told.store(W1, 1, 2, 3, 4)
    told.store(W1, 1, 2, 7, after=2)
    told.store(W0, 1, 2)
    dump = tuple(told.router.dump_index())

    fresh = PrefixIndex()
    for held in dump:
        local = None if held.local_hash is None else [held.local_hash]
        fresh.store(held.worker, parent=held.parent, block_hashes=[held.block_hash], local_hashes=local)

    assert tuple(fresh.dump()) == dump
    assert len(dump) == 5 + 2
    assert fresh.match(sequence_hashes([1, 2, 7])) == {W0: 2, W1: 3}


def test_removing_the_unknown_changes_nothing(told: Told) -> None:
    told.store(W0, 1, 2, 3)
    before = tuple(told.router.dump_index())

    told.remove(W0, 9)
    told.remove(W1, 1, 2, 3)
    stranger = WorkerRank(WorkerId("n/decode/9"))

    assert not told.router.apply_kv_removed(stranger, EPOCH, block_hashes=sequence_hashes([1]), now=0)
    assert tuple(told.router.dump_index()) == before


def test_what_was_routed_scores_until_its_time_is_over() -> None:
    router = RoutingCore(
        RouterId("ours"),
        policy=KvAware(),
        rng=random.Random(1),
        rules=RoutingRules(index_mode=IndexMode.APPROXIMATE),
        index=ApproximateIndex(ttl_s=120.0),
    )
    router.put_worker(record(W0), now=0)
    blocks = PromptBlocks.of_tokens(np.arange(1, 5, dtype=np.uint32), BLOCK_SIZE)
    query = RoutingQuery(model="m", prompt_tokens=4, block_hashes={BLOCK_SIZE: blocks})

    router.reserve(AttemptKey(RequestId("r"), 1), query, now=0)
    routed = router.overlaps(query)
    router.expire(now=119)
    still = router.overlaps(query)
    router.expire(now=121)

    assert routed == still == {W0: 1}
    assert router.overlaps(query) == {W0: 0}


def test_what_a_worker_says_does_not_expire(told: Told) -> None:
    told.store(W0, 1)

    told.router.expire(now=10_000)

    assert told.scores(1) == {W0: 1}
