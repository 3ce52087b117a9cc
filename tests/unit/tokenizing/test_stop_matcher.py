"""Stop strings against a naive twin that looks at the whole text, character by character."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.tokenizing.stop_matcher import StopMatcher


def naive_output(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


def naive_open_text(text: str, stops: list[str]) -> str:
    ends = (text[start:] for start in range(len(text)))
    return next((end for end in ends if any(stop.startswith(end) for stop in stops)), "")


def run(matcher: StopMatcher, pieces: list[str], calls: list[int]) -> tuple[list[str], bool]:
    """Push `pieces`, so many at a time; return what came out and whether a stop string ended it."""
    output: list[str] = []
    source = iter(pieces)
    for count in [*calls, len(pieces)]:
        out, is_stopped = matcher.push(list(itertools.islice(source, count)))
        output += out
        if is_stopped:
            return output, True
    return [*output, *matcher.flush()], False


# Few characters, so that stop strings overlap themselves, each other and the pieces' edges.
TEXT = st.text("ab🙂", max_size=3)
PIECES = st.lists(TEXT, max_size=12)
STOPS = st.lists(st.text("ab🙂", min_size=1, max_size=5), min_size=1, max_size=4)
CALLS = st.lists(st.integers(0, 4), max_size=8)


@given(pieces=PIECES, stops=STOPS, calls=CALLS)
def test_output_is_the_text_before_the_first_complete_stop_string_however_it_is_split(
    pieces: list[str], stops: list[str], calls: list[int]
) -> None:
    output, is_stopped = run(StopMatcher(stops), pieces, calls)

    assert ("".join(output), is_stopped) == naive_output("".join(pieces), stops)


@given(pieces=PIECES, stop=st.text("ab🙂", min_size=1, max_size=5), calls=CALLS)
def test_one_stop_string_partitions_the_text(pieces: list[str], stop: str, calls: list[int]) -> None:
    before, separator, _ = "".join(pieces).partition(stop)

    output, is_stopped = run(StopMatcher([stop]), pieces, calls)

    assert ("".join(output), is_stopped) == (before, bool(separator))


@given(pieces=PIECES, stops=STOPS)
def test_pieces_come_out_as_they_went_in_but_for_the_cut_one(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    output: list[str] = []

    for piece in pieces:
        out, is_stopped = matcher.push([piece])
        output += out
        if is_stopped:
            break

    *whole, last = output or [""]
    assert whole == pieces[: len(whole)]
    assert not output or pieces[len(whole)].startswith(last)


@given(pieces=PIECES, stops=STOPS)
def test_a_piece_is_held_back_only_while_it_may_be_part_of_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    returned = 0

    for pushed, piece in enumerate(pieces, start=1):
        out, is_stopped = matcher.push([piece])
        if is_stopped:
            return
        returned += len(out)
        open_text = naive_open_text("".join(pieces[:pushed]), stops)
        free = len("".join(pieces[:pushed])) - len(open_text)
        ends = itertools.accumulate(map(len, pieces[:pushed]))
        assert returned == sum(end <= free for end in ends)


@pytest.mark.parametrize(
    ("stops", "pieces", "output"),
    [
        (["\n\n"], ["one\n", "\ntwo"], ["one"]),  # across two pieces
        (["END"], ["a", " E", "N", "D b"], ["a", " "]),  # across three
        (["STOP"], ["a", "b", "STOP"], ["a", "b"]),  # at the edge of a piece: nothing is cut
        (["STOP"], ["STOP"], []),  # nothing before it
        (["cd", "abcdef"], ["ab", "cd", "ef"], ["ab"]),  # the first that is complete ends it, not the first that began
        (["b", "ab"], ["ab"], []),  # of two that end together the longer one is cut away
        (["aab"], ["aa", "ab"], ["a"]),  # begins again inside itself
        (["🙂!"], ["hi 🙂", "! you"], ["hi "]),  # counts characters, not bytes
    ],
)
def test_output_ends_before_the_stop_string(stops: list[str], pieces: list[str], output: list[str]) -> None:
    got, is_stopped = run(StopMatcher(stops), pieces, [1] * len(pieces))

    assert is_stopped
    assert got == output


def test_text_that_did_not_become_a_stop_string_comes_out_with_the_next_piece() -> None:
    matcher = StopMatcher(["\n\nUser:"])

    assert matcher.push(["Hi", ".\n"]) == (["Hi"], False)
    assert matcher.push(["\nUs"]) == ([], False)
    assert matcher.push(["ing"]) == ([".\n", "\nUs", "ing"], False)
    assert matcher.flush() == []


def test_flush_returns_what_was_held_back_once() -> None:
    matcher = StopMatcher(["END"])
    matcher.push(["the ", "E", "N"])

    assert matcher.flush() == ["E", "N"]
    assert matcher.flush() == []


def test_without_stop_strings_the_very_list_comes_back() -> None:
    pieces = ["a", "", "b"]

    out, is_stopped = StopMatcher(()).push(pieces)

    assert out is pieces
    assert not is_stopped
