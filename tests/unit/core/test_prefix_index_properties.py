"""Random programs run on the index and on its naive twin must not be told apart."""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvmesh.core import block_run, block_runs, prefix_match
from kvmesh.core.ids import SequenceHash, WorkerId, WorkerRank
from kvmesh.core.prefix_index import IndexStats, PrefixIndex, StoreResult
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.testing.naive_prefix_index import NaivePrefixIndex

Path = tuple[int, ...]


class Step(NamedTuple):
    kind: str
    worker: WorkerRank
    path: Path
    cuts: tuple[int, int]
    backwards: bool
    local: bool
    """A store brings local hashes."""


WORKERS = [WorkerRank(WorkerId(name), rank) for name in ("a", "b", "c") for rank in (0, 1)]
# A path is a leaf of a narrow tree, so that programs meet each other's blocks and branch off them.
PATHS = st.lists(st.sampled_from([5, 5, 5, 5, 6, 7]), min_size=1, max_size=12).map(tuple)
KINDS = st.sampled_from(
    ["store"] * 5
    + ["continue"] * 4
    + ["remove"] * 4
    + ["remove_leaf"] * 3
    + ["clear", "remove_rank", "remove_worker", "limit"]
)
CUTS = st.tuples(st.integers(0, 12), st.integers(0, 12))


def programs(local: st.SearchStrategy[bool]) -> st.SearchStrategy[list[Step]]:
    steps = st.builds(Step, KINDS, st.sampled_from(WORKERS), PATHS, CUTS, st.booleans(), local)
    return st.lists(steps, min_size=8, max_size=60)  # most are about twice the least


ALWAYS, NEVER = st.just(True), st.just(False)
RUN_BLOCKS = st.sampled_from([1, 2, 3, 128])
ANCHOR_BLOCKS = st.sampled_from([1, 2, 4, 16])


@contextmanager
def tree_of(run_blocks: int, anchor_blocks: int, *, max_steps: int = 16) -> Iterator[None]:
    with (
        mock.patch.object(block_runs, "RUN_BLOCKS", run_blocks),
        mock.patch.object(block_run, "ANCHOR_BLOCKS", anchor_blocks),
        mock.patch.object(prefix_match, "MAX_STEPS", max_steps),
    ):
        yield


def chain(path: Path) -> list[SequenceHash]:
    """Link by link, written out anew: it judges `PromptBlocks` too."""
    blocks = [path[0]]
    for local in path[1:]:
        blocks.append(xxh3_64_intdigest(struct.pack("<QQ", blocks[-1], local), 1337))
    return [SequenceHash(block) for block in blocks]


def apply(index: PrefixIndex | NaivePrefixIndex, step: Step) -> object:
    worker, blocks = step.worker, chain(step.path)
    low, high = sorted(cut % len(blocks) for cut in step.cuts)
    local = step.path if step.local else None
    picked = blocks[low : high + 1]
    calls: dict[str, Callable[[], object]] = {
        "store": lambda: index.store(worker, parent=None, block_hashes=blocks, local_hashes=local),
        "continue": lambda: index.store(
            worker, parent=blocks[low], block_hashes=blocks[low + 1 :], local_hashes=local and local[low + 1 :]
        ),
        "remove": lambda: index.remove(worker, picked[::-1] if step.backwards else picked),
        "remove_leaf": lambda: index.remove(worker, blocks[max(index.depth(worker, blocks) - 1, 0) :]),
        "limit": lambda: index.limit(worker, None if step.backwards else high),
        "clear": lambda: index.clear(worker),
        "remove_rank": lambda: index.remove_rank(worker),
        "remove_worker": lambda: index.remove_worker(worker.worker_id),
    }
    return calls[step.kind]()


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


def queries(path: Path) -> list[Sequence[SequenceHash]]:
    blocks = chain(path)
    return [blocks, tuple(blocks), PromptBlocks.of_local(path, 16), PromptBlocks.of_sequence(blocks, 16)]


def depths_by_bit(index: PrefixIndex, query: Sequence[SequenceHash]) -> dict[int, int]:
    found: dict[int, int] = {}
    for mask, depth in index.match_masks(query):
        assert mask
        assert depth
        for number in range(mask.bit_length()):
            if mask >> number & 1:
                assert number not in found
                found[number] = depth
    return found


def assert_same_match(index: PrefixIndex, twin: NaivePrefixIndex, path: Path) -> None:
    expected = twin.match(chain(path))
    for query in queries(path):
        assert index.match(query) == expected
        assert depths_by_bit(index, query) == {index.bit_of(worker): depth for worker, depth in expected.items()}
        for worker in WORKERS:
            assert index.depth(worker, query) == expected.get(worker, 0)


def assert_same_content(index: PrefixIndex, twin: NaivePrefixIndex) -> None:
    assert without_sweep(index.stats) == without_sweep(twin.stats)
    assert [held[:3] for held in index.dump()] == [held[:3] for held in twin.dump()]
    for worker in WORKERS:
        assert index.blocks_of(worker) == twin.blocks_of(worker)


@pytest.mark.parametrize("local", [ALWAYS, NEVER, st.booleans()], ids=["always", "never", "sometimes"])
@given(
    data=st.data(),
    run_blocks=RUN_BLOCKS,
    anchor_blocks=ANCHOR_BLOCKS,
    max_steps=st.sampled_from([1, 2, 16]),
    max_aside=st.sampled_from([0, 2, 5, 1000]),
    max_pairs=st.sampled_from([None, None, 5, 20, 40]),
    sweep_runs=st.sampled_from([0, 1, 2, 16]),
)
@settings(max_examples=80, deadline=None)
def test_index_answers_as_its_naive_twin(
    *,
    local: st.SearchStrategy[bool],
    data: st.DataObject,
    run_blocks: int,
    anchor_blocks: int,
    max_steps: int,
    max_aside: int,
    max_pairs: int | None,
    sweep_runs: int,
) -> None:
    steps = data.draw(programs(local))
    index = PrefixIndex(max_pairs=max_pairs, max_aside_per_worker=max_aside)
    twin = NaivePrefixIndex(max_pairs=max_pairs, max_aside_per_worker=max_aside)
    bits = [(index.version, [index.bit_of(worker) for worker in WORKERS])]

    with (
        tree_of(run_blocks, anchor_blocks, max_steps=max_steps),
        mock.patch("kvmesh.core.prefix_index._SWEEP_RUNS", sweep_runs),
    ):
        for step in steps:
            assert apply(index, step) == apply(twin, step)
            index.check_integrity()
            assert_same_match(index, twin, step.path)
            assert_same_content(index, twin)
            bits.append((index.version, [index.bit_of(worker) for worker in WORKERS]))
        for step in steps:
            assert_same_match(index, twin, step.path)
    for before, after in pairwise(bits):
        assert before[0] < after[0] if before[1] != after[1] else before[0] <= after[0]


@pytest.mark.parametrize("local", [ALWAYS, NEVER], ids=["always", "never"])
@given(data=st.data(), run_blocks=RUN_BLOCKS, anchor_blocks=ANCHOR_BLOCKS)
@settings(max_examples=60, deadline=None)
def test_restoring_a_dump_gives_an_equal_dump(
    local: st.SearchStrategy[bool], data: st.DataObject, run_blocks: int, anchor_blocks: int
) -> None:
    index, copy, twin = PrefixIndex(), PrefixIndex(), NaivePrefixIndex()
    steps = data.draw(programs(local))
    with tree_of(run_blocks, anchor_blocks):
        for step in steps:
            apply(index, step)
            apply(twin, step)
        dump = list(index.dump())

        restored = copy.restore(dump)

        copy.check_integrity()
        for step in steps:
            assert copy.match(PromptBlocks.of_local(step.path, 16)) == twin.match(chain(step.path))
    assert dump == list(twin.dump())
    assert restored == len(dump)
    assert list(copy.dump()) == dump


@given(paths=st.lists(PATHS, min_size=1, max_size=20), run_blocks=RUN_BLOCKS, anchor_blocks=ANCHOR_BLOCKS)
@settings(max_examples=60, deadline=None)
def test_blocks_without_local_hashes_are_found_and_once_gone_forgotten(
    paths: list[Path], run_blocks: int, anchor_blocks: int
) -> None:
    index, twin = PrefixIndex(), NaivePrefixIndex()
    plain, bare = WORKERS[0], WORKERS[2]
    with tree_of(run_blocks, anchor_blocks):
        for path in paths[::2]:
            index.store(plain, parent=None, block_hashes=chain(path), local_hashes=path)
            twin.store(plain, parent=None, block_hashes=chain(path))
        for path in paths[1::2]:
            index.store(bare, parent=None, block_hashes=chain(path))
        for path in paths[1::2]:
            assert index.depth(bare, PromptBlocks.of_local(path, 16)) == len(path)

        for path in paths[1::2]:
            index.remove(bare, chain(path))
        index.check_integrity()

        for path in paths:
            assert index.match(PromptBlocks.of_local(path, 16)) == twin.match(chain(path))


KEYS = st.integers(0, 7).map(SequenceHash)
GARBAGE = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "store", "remove", "remove_rank"]),
        st.sampled_from(WORKERS[:3]),
        st.none() | KEYS,
        st.lists(KEYS, max_size=5),
        st.none() | st.integers(0, 2),
    ),
    max_size=30,
)


@pytest.mark.parametrize("short", [2**60 - 1, 0b101], ids=["60 bits", "2 bits"])
@given(steps=GARBAGE, run_blocks=RUN_BLOCKS, anchor_blocks=ANCHOR_BLOCKS, max_steps=st.sampled_from([1, 16]))
@settings(max_examples=200, deadline=None)
def test_blocks_that_are_no_sequence_hashes_break_no_law(
    *,
    short: int,
    steps: list[tuple[str, WorkerRank, SequenceHash | None, list[SequenceHash], int | None]],
    run_blocks: int,
    anchor_blocks: int,
    max_steps: int,
) -> None:
    index = PrefixIndex(max_pairs=12, max_aside_per_worker=3)
    with (
        tree_of(run_blocks, anchor_blocks, max_steps=max_steps),
        mock.patch.object(block_runs, "SHORT", short),
    ):
        for kind, worker, parent, blocks, local in steps:
            before = list(index.dump())
            if kind == "store":
                local_hashes = None if local is None else [local] * len(blocks)
                outcome = index.store(worker, parent=parent, block_hashes=blocks, local_hashes=local_hashes)
                if outcome.result is not StoreResult.STORED:
                    assert list(index.dump()) == before
            elif kind == "remove":
                index.remove(worker, blocks)
            else:
                index.remove_rank(worker)
            index.match(blocks)
            index.match(PromptBlocks.of_local(blocks, 16))
            index.match(PromptBlocks.of_local([local or 0] * 6, 16))
            index.check_integrity()


@pytest.mark.parametrize("depth", [15, 16, 17, 127, 128, 129, 600])
@pytest.mark.parametrize("max_steps", [1, 16])
def test_chains_longer_than_a_run_match_at_every_depth(depth: int, max_steps: int) -> None:
    index, path = PrefixIndex(), tuple(range(1, depth + 1))
    blocks = chain(path)
    cuts = [count * depth // len(WORKERS) for count in range(1, len(WORKERS) + 1)]
    for cut, worker in zip(cuts, WORKERS, strict=True):
        index.store(worker, parent=None, block_hashes=blocks[:cut], local_hashes=path[:cut])
    index.check_integrity()

    with mock.patch.object(prefix_match, "MAX_STEPS", max_steps):
        for asked in sorted({1, 15, 16, 17, depth - 1, depth}):
            expected = {worker: min(cut, asked) for cut, worker in zip(cuts, WORKERS, strict=True) if cut}
            assert index.match(blocks[:asked]) == expected
            assert index.match(PromptBlocks.of_local(path[:asked], 16)) == expected
            assert index.match(PromptBlocks.of_local((*path[:asked], 0, 1), 16)) == expected
