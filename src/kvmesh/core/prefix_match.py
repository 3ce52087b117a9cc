"""How deep each bit holds a sequence of blocks: a few steps along its runs, then bisection.

The bits that hold block i of a sequence only shrink as i grows, and they change only from run to run. So every run
found settles all of its blocks at once. Most sequences lead through a few runs, and stepping from one to the next is
cheapest; of a path that many branches leave, hence cut into many runs, the rest is halved again and again: a span whose
ends the same bits hold needs no look inside.
"""

from collections.abc import Callable, Sequence

from kvmesh.core import block_run
from kvmesh.core.block_run import Run
from kvmesh.core.block_runs import RunTree
from kvmesh.core.ids import SequenceHash
from kvmesh.core.prompt_blocks import PromptBlocks

MAX_STEPS = 16
"""Runs stepped through before bisection."""

Masks = list[tuple[int, int]]
_Find = Callable[[int], Run | None]


def match_masks(tree: RunTree, bits: int, blocks: Sequence[SequenceHash]) -> Masks:
    """Return (those of `bits` that hold exactly so many leading blocks, how many), deeper than 0, in any order.

    `blocks` must be one chained sequence: `PromptBlocks` are looked up by their keys, and by sequence hash like any
    other sequence while the tree has blocks without keys. O(d log n) for n blocks and d runs on their path.
    """
    names, by_key = _names(blocks, has_keys=not tree.unkeyed_runs)
    find: _Find = tree.by_key.get if by_key else tree.candidate
    found: Masks = []
    count = len(names)
    end = steps = 0
    holders = bits
    run = None
    while holders and end < count and steps < MAX_STEPS:
        below = find(names[end])
        if below is None or below.depth != end or (below.keys if by_key else below.hashes)[0] != names[end]:
            break
        run = below
        mask = run.mask & holders
        if mask != holders:
            if end:
                found.append((holders ^ mask, end))
            holders = mask
        end += len(run.hashes)
        steps += 1
    if run is None or not holders:
        return found
    own = run.keys if by_key else run.hashes
    last = min(end, count) - 1
    if own[last - run.depth] != names[last]:
        found.append((holders, _first_difference(own, run.depth, names, run.depth, last)))
    elif steps == MAX_STEPS and end < count:
        _bisect(names, find, by_key, (end, holders, count), found)
    else:
        found.append((holders, last + 1))
    return found


def _bisect(names: Sequence[int], find: _Find, by_key: bool, rest: tuple[int, int, int], found: Masks) -> None:
    """Add what becomes, from `low` to `high`, of the `holders` of everything before."""
    # In a span `holders` hold the block before `low` and, of them, `keepers` hold block `high`, where a run begins, or
    # nobody does; at `low`, too, a run begins or nobody holds a block.
    spans = [(*rest, 0)]
    while spans:
        low, holders, high, keepers = spans.pop()
        while holders != keepers:
            if low == high:
                found.append((holders ^ keepers, low))
                break
            at = (low + high) >> 1 & -block_run.ANCHOR_BLOCKS
            if at < low:
                at += block_run.ANCHOR_BLOCKS
            if at >= high:
                at = low
            run = find(names[at])
            own: Sequence[int] = () if run is None else run.keys if by_key else run.hashes
            if run is None or not low <= run.depth <= at < run.end or own[at - run.depth] != names[at]:
                high, keepers = at, 0
                continue
            mask = run.mask & holders
            end = min(run.end, high)
            if not keepers and own[end - 1 - run.depth] != names[end - 1]:
                high = end = _first_difference(own, run.depth, names, at, end - 1)
            if mask != keepers:
                spans.append((end, mask, high, keepers))
            high, keepers = run.depth, mask


def _names(blocks: Sequence[SequenceHash], *, has_keys: bool) -> tuple[Sequence[int], bool]:
    """Return what to look blocks up by, and whether these are keys."""
    if not isinstance(blocks, PromptBlocks):
        return blocks, False
    keys = blocks.key_view
    if keys is None:
        return blocks.keys, False
    return (keys, True) if has_keys else (blocks, False)


def _first_difference(own: Sequence[int], depth: int, names: Sequence[int], equal: int, different: int) -> int:
    """Return where a run leaves the sequence, between a block that is on it and a later one that is not."""
    while different - equal > 1:
        middle = equal + different >> 1
        if own[middle - depth] == names[middle]:
            equal = middle
        else:
            different = middle
    return different
