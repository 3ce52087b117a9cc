from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.core.active_blocks import ActiveBlocks

ROWS = range(3)


def chain(path: Sequence[int]) -> list[int]:
    """A number for every prefix of a path: equal prefixes, and only they, have the same."""
    return [int("1" + "".join(map(str, path[: end + 1]))) for end in range(len(path))]


# Chains are leaves of a narrow tree, so that they share prefixes and branch off one another.
CHAINS = st.lists(st.sampled_from([0, 0, 1]), max_size=7).map(chain)
ANY_KEYS = st.lists(st.integers(0, 9), max_size=7, unique=True)


class Naive:
    """Recounts everything."""

    def __init__(self) -> None:
        self.held: list[tuple[int, list[int]]] = []

    def counts(self, row: int) -> Counter[int]:
        return Counter(key for held_row, keys in self.held if held_row == row for key in keys)

    def depth(self, row: int, keys: list[int]) -> int:
        counts = self.counts(row)
        return len(list(takewhile(counts.__contains__, keys)))


@given(data=st.data(), keys=st.sampled_from([CHAINS, ANY_KEYS]))
@settings(max_examples=300, deadline=None)
def test_counts_are_those_of_a_naive_recount(data: st.DataObject, keys: st.SearchStrategy[list[int]]) -> None:
    active, naive = ActiveBlocks(), Naive()

    for _ in range(data.draw(st.integers(0, 20))):
        is_leaving: bool = data.draw(st.booleans())
        if naive.held and is_leaving:
            row, leaving = naive.held.pop(data.draw(st.integers(0, len(naive.held) - 1)))
            changed = active.remove(row, leaving)
            left = naive.counts(row)
            assert changed == sum(key not in left for key in leaving)
        else:
            row, coming = data.draw(st.sampled_from(ROWS)), data.draw(keys)
            before = naive.counts(row)
            assert active.add(row, list(coming)) == sum(key not in before for key in coming)
            naive.held.append((row, coming))

        active.check_integrity()
        assert len(active) == len({key for _, held in naive.held for key in held})


@given(held=st.lists(st.tuples(st.sampled_from(ROWS), CHAINS), max_size=12), asked=CHAINS)
@settings(max_examples=300, deadline=None)
def test_depths_are_those_of_a_naive_walk(held: list[tuple[int, list[int]]], asked: list[int]) -> None:
    active, naive = ActiveBlocks(), Naive()
    for row, keys in held:
        active.add(row, list(keys))
        naive.held.append((row, keys))

    found = active.match_masks(asked)

    expected = {row: depth for row in ROWS if (depth := naive.depth(row, asked))}
    assert {row: depth for mask, depth in found for row in ROWS if mask >> row & 1} == expected
    assert sum(mask.bit_count() for mask, _ in found) == len(expected)
    assert [active.depth(row, asked) for row in ROWS] == [expected.get(row, 0) for row in ROWS]


@pytest.mark.parametrize("keys", [[5, 5], [1, 2, 1], [7, 7, 7]])
def test_blocks_that_a_stranger_names_twice_break_nothing(keys: list[int]) -> None:
    active = ActiveBlocks()

    active.add(0, list(keys))
    active.add(0, [keys[0]])
    active.add(1, list(keys))
    for row, leaving in ((0, keys), (1, keys), (0, [keys[0]])):
        active.remove(row, list(leaving))

    assert len(active) == 0


def test_a_booking_that_leaves_a_run_in_the_middle_cuts_it_for_all_that_hold_it() -> None:
    active = ActiveBlocks()
    active.add(0, [1, 2, 3, 4])
    active.add(0, [1, 2, 3, 4])

    fresh = active.add(1, [1, 2, 9])
    first, second = active.remove(0, [1, 2, 3, 4]), active.remove(0, [1, 2, 3, 4])

    assert (fresh, first, second) == (3, 0, 4)
    assert active.match_masks([1, 2, 9]) == [(0b10, 3)]
    assert active.match_masks([1, 2, 3]) == [(0b10, 2)]
