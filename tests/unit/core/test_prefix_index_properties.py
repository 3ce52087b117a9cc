"""Random programs run on the index and on its naive twin must not be told apart."""

import hashlib
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.core import block_runs
from kvmesh.core.ids import SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_index import IndexStats, PrefixIndex, StoreResult
from kvmesh.testing.naive_prefix_index import NaivePrefixIndex

Path = tuple[int, ...]
Step = tuple[str, WorkerRank, Path, int, int, bool]

WORKERS = [WorkerRank(WorkerId(name), rank) for name in ("a", "b", "c") for rank in (0, 1)]
# A path is a leaf of a narrow tree, so that programs meet each other's blocks and branch off them.
PATHS = st.lists(st.sampled_from([0, 0, 0, 0, 1, 2]), min_size=1, max_size=12).map(tuple)
KINDS = st.sampled_from(
    ["store"] * 5 + ["continue"] * 4 + ["remove"] * 4 + ["remove_leaf"] * 3 + ["clear", "remove_rank", "remove_worker"]
)
CUTS = st.integers(0, 12)
STEPS = st.lists(st.tuples(KINDS, st.sampled_from(WORKERS), PATHS, CUTS, CUTS, st.booleans()), max_size=40)
RUN_KEYS = st.sampled_from([1, 2, 3, 64])


def key(path: Path) -> SequenceHash:
    return SequenceHash(int.from_bytes(hashlib.blake2b(repr(path).encode(), digest_size=8).digest(), "little"))


def chain(path: Path) -> list[SequenceHash]:
    return [key(path[: end + 1]) for end in range(len(path))]


def apply(index: PrefixIndex | NaivePrefixIndex, step: Step) -> object:
    kind, worker, path, one, other, backwards = step
    blocks = chain(path)
    low, high = sorted((one % len(blocks), other % len(blocks)))
    if kind == "store":
        return index.store(worker, parent=None, block_hashes=blocks)
    if kind == "continue":
        return index.store(worker, parent=blocks[low], block_hashes=blocks[low + 1 :])
    if kind == "remove":
        picked = blocks[low : high + 1]
        return index.remove(worker, picked[::-1] if backwards else picked)
    if kind == "remove_leaf":
        return index.remove(worker, blocks[max(index.depth(worker, blocks) - 1, 0) :])
    if kind == "remove_worker":
        return index.remove_worker(worker.worker_id)
    return index.clear(worker) if kind == "clear" else index.remove_rank(worker)


def without_sweep(stats: IndexStats) -> tuple[object, ...]:
    return (
        stats.pairs,
        stats.aside_pairs,
        stats.workers,
        stats.incomplete,
        stats.rejected_unknown_parent,
        stats.rejected_conflicting_parent,
        stats.rejected_full,
        stats.dropped_aside,
    )


def assert_same(index: PrefixIndex, twin: NaivePrefixIndex, paths: Iterator[Path]) -> None:
    for path in paths:
        blocks = chain(path)
        assert index.match(blocks) == twin.match(blocks)
        for worker in WORKERS:
            assert index.depth(worker, blocks) == twin.depth(worker, blocks)
    assert without_sweep(index.stats) == without_sweep(twin.stats)
    assert list(index.dump()) == list(twin.dump())
    for worker in WORKERS:
        assert index.blocks_of(worker) == twin.blocks_of(worker)


@given(
    steps=STEPS,
    run_keys=RUN_KEYS,
    max_aside=st.sampled_from([0, 2, 5, 1000]),
    max_pairs=st.sampled_from([None, None, 5, 20, 40]),
    sweep_runs=st.sampled_from([0, 1, 2, 16]),
)
@settings(max_examples=200, deadline=None)
def test_index_answers_as_its_naive_twin(
    steps: list[Step], run_keys: int, max_aside: int, max_pairs: int | None, sweep_runs: int
) -> None:
    index = PrefixIndex(max_pairs=max_pairs, max_aside_per_worker=max_aside)
    twin = NaivePrefixIndex(max_pairs=max_pairs, max_aside_per_worker=max_aside)

    with (
        mock.patch.object(block_runs, "RUN_KEYS", run_keys),
        mock.patch("kvmesh.core.prefix_index._SWEEP_RUNS", sweep_runs),
    ):
        for step in steps:
            assert apply(index, step) == apply(twin, step)
            index.check_integrity()
            assert_same(index, twin, iter([step[2]]))
        assert_same(index, twin, (step[2] for step in steps))


@given(steps=STEPS, run_keys=RUN_KEYS)
@settings(max_examples=60, deadline=None)
def test_replaying_a_dump_gives_an_equal_dump(steps: list[Step], run_keys: int) -> None:
    index, copy = PrefixIndex(), PrefixIndex()
    with mock.patch.object(block_runs, "RUN_KEYS", run_keys):
        for step in steps:
            apply(index, step)
        dump = list(index.dump())

        outcomes = [copy.store(held.worker, parent=held.parent, block_hashes=[held.block_hash]) for held in dump]

        copy.check_integrity()
    assert all(outcome.stored == 1 for outcome in outcomes)
    assert list(copy.dump()) == dump


KEYS = st.integers(0, 7).map(SequenceHash)
GARBAGE = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "store", "remove", "remove_rank"]),
        st.sampled_from(WORKERS[:3]),
        st.none() | KEYS,
        st.lists(KEYS, max_size=5),
    ),
    max_size=30,
)


@given(steps=GARBAGE, run_keys=RUN_KEYS)
@settings(max_examples=200, deadline=None)
def test_keys_that_are_no_sequence_hashes_break_no_law(
    steps: list[tuple[str, WorkerRank, SequenceHash | None, list[SequenceHash]]], run_keys: int
) -> None:
    index = PrefixIndex(max_pairs=12, max_aside_per_worker=3)
    with mock.patch.object(block_runs, "RUN_KEYS", run_keys):
        for kind, worker, parent, blocks in steps:
            before = list(index.dump())
            if kind == "store":
                outcome = index.store(worker, parent=parent, block_hashes=blocks)
                if outcome.result is not StoreResult.STORED:
                    assert list(index.dump()) == before
            elif kind == "remove":
                index.remove(worker, blocks)
            else:
                index.remove_rank(worker)
            index.match(blocks)
            index.check_integrity()


@pytest.mark.parametrize("depth", [63, 64, 65, 300])
def test_chains_longer_than_a_run_match_at_every_depth(depth: int) -> None:
    index, blocks = PrefixIndex(), chain(tuple(range(depth)))
    for count, worker in enumerate(WORKERS, start=1):
        index.store(worker, parent=None, block_hashes=blocks[: count * depth // len(WORKERS)])

    found = index.match(blocks)

    assert found == {worker: count * depth // len(WORKERS) for count, worker in enumerate(WORKERS, start=1)}
    index.check_integrity()
