"""How much a match, and the garbage collector, look at: what is found is judged in test_prefix_index*.py."""

import gc

import pytest

from kvmesh.core.block_run import Run
from kvmesh.core.block_runs import RunTree
from kvmesh.core.hashing import chain_on, sequence_hashes
from kvmesh.core.ids import SequenceHash
from kvmesh.core.prefix_match import match_masks
from kvmesh.core.prompt_blocks import PromptBlocks

MAIN, BRANCHES = 0b01, 0b10
BLOCKS = 4096
LOCAL = list(range(1, BLOCKS + 1))


class Counting(dict[int, Run]):
    """Counts what is looked up."""

    looked_up = 0

    def get(self, key: int, default: Run | None = None) -> Run | None:  # type: ignore[override]  # as it is used
        self.looked_up += 1
        return super().get(key, default)


def hold(
    tree: RunTree, bit: int, parent: SequenceHash | None, local: list[int], blocks: tuple[SequenceHash, ...]
) -> None:
    path = tree.follow(parent, blocks)
    assert path is not None
    tree.hold(path, bit, local)


@pytest.fixture
def cut_up() -> RunTree:
    """A path that a branch leaves at every fourth block: over 1,000 runs."""
    tree = RunTree()
    blocks = sequence_hashes(LOCAL)
    hold(tree, MAIN, None, LOCAL, blocks)
    hold(tree, BRANCHES, None, LOCAL, blocks)
    for at in range(3, BLOCKS, 4):
        branch = [blocks[at]]
        chain_on(branch, [999_999])
        hold(tree, BRANCHES, blocks[at], [999_999], (branch[-1],))
    tree.check_integrity()
    assert len(tree.order) > 2000
    return tree


@pytest.mark.parametrize("asked", [[*LOCAL], [*LOCAL[:3000], 5, 6], LOCAL[:1001]], ids=["all", "a part", "the start"])
def test_a_path_cut_by_many_branches_is_bisected(cut_up: RunTree, asked: list[int]) -> None:
    cut_up.by_key = counting = Counting(cut_up.by_key)
    expected = sum(one == other for one, other in zip(asked, LOCAL, strict=False))

    found = match_masks(cut_up, MAIN | BRANCHES, PromptBlocks.of_local(asked, 16))

    assert found == [(MAIN | BRANCHES, expected)]
    assert counting.looked_up < 60


def test_a_path_of_few_runs_is_stepped_along() -> None:
    tree = RunTree()
    hold(tree, MAIN, None, LOCAL[:1024], sequence_hashes(LOCAL[:1024]))
    tree.by_key = counting = Counting(tree.by_key)

    found = match_masks(tree, MAIN, PromptBlocks.of_local(LOCAL[:1024], 16))

    assert found == [(MAIN, 1024)]
    assert counting.looked_up == len(tree.order) == 8


def test_a_cold_prompt_takes_one_look() -> None:
    tree = RunTree()
    hold(tree, MAIN, None, LOCAL, sequence_hashes(LOCAL))
    tree.by_key = counting = Counting(tree.by_key)

    assert match_masks(tree, MAIN, PromptBlocks.of_local([7, *LOCAL], 16)) == []
    assert counting.looked_up == 1


def test_nobody_asked_for_holds_nothing() -> None:
    tree = RunTree()
    hold(tree, MAIN, None, LOCAL, sequence_hashes(LOCAL))

    assert match_masks(tree, 0, PromptBlocks.of_local(LOCAL, 16)) == []
    assert match_masks(tree, BRANCHES, PromptBlocks.of_local(LOCAL, 16)) == []


def test_the_garbage_collector_does_not_look_at_every_block(cut_up: RunTree) -> None:
    gc.collect()

    assert len(cut_up.by_hash) > BLOCKS
    assert not gc.is_tracked(cut_up.by_hash)
