"""How block ids are cut for a stream."""

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.transports.blocks import SPAN_BYTES, spans


def cut(ids: list[int], block_bytes: int) -> list[tuple[list[int], bool]]:
    return [(list(part), is_run) for part, is_run in spans(ids, block_bytes)]


def test_consecutive_blocks_are_one_span() -> None:
    assert cut([4, 5, 6, 7], 64) == [([4, 5, 6, 7], True)]


def test_long_runs_are_spans_of_their_own() -> None:
    assert cut([4, 5, 1, 2], 65_536) == [([4, 5], True), ([1, 2], True)]


def test_short_runs_are_joined() -> None:
    assert cut([4, 2, 9], 64) == [([4, 2, 9], False)]


def test_span_is_no_longer_than_its_bound_or_one_block() -> None:
    assert cut([0, 1, 2], SPAN_BYTES // 2) == [([0, 1], True), ([2], True)]
    assert cut([0, 1], SPAN_BYTES * 3) == [([0], True), ([1], True)]


@given(st.lists(st.integers(0, 40), max_size=60), st.sampled_from([64, 8192, 65_536, SPAN_BYTES // 3, SPAN_BYTES * 2]))
def test_spans_are_the_ids_in_order_and_runs_are_consecutive(ids: list[int], block_bytes: int) -> None:
    parts = cut(ids, block_bytes)

    assert [block for part, _ in parts for block in part] == ids
    for part, is_run in parts:
        assert part
        assert len(part) * block_bytes <= SPAN_BYTES or len(part) == 1
        assert not is_run or part == list(range(part[0], part[0] + len(part)))
