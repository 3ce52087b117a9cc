"""Predictions against what requests found: when a rank's part of the index counts as wrong."""

import pytest

from kvmesh.core.ids import AttemptKey, RequestId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.truth_check import TruthCheck, TruthRules, Verdict

WORKER = WorkerRank(WorkerId("w"))
OTHER = WorkerRank(WorkerId("w"), 1)
BLOCKS = tuple(map(SequenceHash, range(1, 21)))


def key(number: int = 1) -> AttemptKey:
    return AttemptKey(RequestId(f"r{number}"), 1)


def book(check: TruthCheck, number: int = 1, *, overlap: int = 10, worker: WorkerRank = WORKER) -> AttemptKey:
    check.booked(key(number), worker, blocks=BLOCKS, overlap_blocks=overlap)
    return key(number)


def overpredicted(verdict: Verdict | None) -> int:
    assert verdict is not None
    return verdict.overpredicted


@pytest.mark.parametrize(("cached", "wrong"), [(10, 0), (12, 0), (7, 3), (0, 10)])
def test_blocks_that_were_not_found_are_overpredicted(cached: int, wrong: int) -> None:
    check = TruthCheck()
    book(check)

    verdict = check.finished(key(), cached_blocks=cached)

    assert verdict == Verdict(WORKER, predicted=10, overpredicted=wrong, has_drifted=False)


@pytest.mark.parametrize(
    ("removed", "wrong"),
    [
        pytest.param((8, 9, 10), 0, id="all that is missing"),
        pytest.param((10,), 2, id="the last of three"),
        pytest.param((8,), 0, id="what follows a removed block is gone with it"),
        pytest.param((3,), 3, id="a block that was found came back"),
        pytest.param((99,), 3, id="another prompt's"),
        pytest.param(None, 0, id="the whole cache"),
    ],
)
def test_blocks_whose_removal_arrived_in_time_do_not_count(removed: tuple[int, ...] | None, wrong: int) -> None:
    check = TruthCheck()
    book(check)

    check.removed(WORKER, None if removed is None else tuple(map(SequenceHash, removed)))
    verdict = check.finished(key(), cached_blocks=7)

    assert overpredicted(verdict) == wrong


def test_removals_before_the_prediction_and_of_other_ranks_excuse_nothing() -> None:
    check = TruthCheck()
    book(check, 1)
    check.removed(WORKER, BLOCKS)
    check.removed(OTHER, BLOCKS)
    book(check, 2)

    assert overpredicted(check.finished(key(2), cached_blocks=0)) == 10
    assert overpredicted(check.finished(key(1), cached_blocks=0)) == 0


def test_each_request_is_judged_once_and_only_if_its_worker_said_what_it_had() -> None:
    check = TruthCheck()
    book(check, 1)
    book(check, 2)

    unsaid = check.finished(key(1), cached_blocks=None)
    first = check.finished(key(2), cached_blocks=5)
    again = check.finished(key(2), cached_blocks=0)
    never_booked = check.finished(key(3), cached_blocks=0)

    assert (unsaid, overpredicted(first), again, never_booked) == (None, 5, None, None)


def test_first_prediction_of_a_key_counts() -> None:
    check = TruthCheck()
    book(check, overlap=10)
    book(check, overlap=2)

    assert overpredicted(check.finished(key(), cached_blocks=0)) == 10


def test_rank_drifts_when_its_share_passes_the_bound_and_says_so_once() -> None:
    check = TruthCheck(TruthRules(min_predictions=10))
    for number in range(9):
        book(check, number)
        assert check.finished(key(number), cached_blocks=10) == Verdict(WORKER, 10, 0, False)

    at_the_bound = check.finished(book(check, 9), cached_blocks=0)
    past_it = check.finished(book(check, 10), cached_blocks=8)
    further = check.finished(book(check, 11), cached_blocks=0)

    assert [v.has_drifted for v in (at_the_bound, past_it, further) if v is not None] == [False, True, False]
    assert check.overpredicted_share(WORKER) == 22 / 120


def test_few_predictions_prove_nothing() -> None:
    check = TruthCheck(TruthRules(min_predictions=3))
    for number in range(5):
        check.finished(book(check, number, overlap=0), cached_blocks=0)

    verdicts = [check.finished(book(check, number), cached_blocks=0) for number in range(10, 13)]

    assert [v.has_drifted for v in verdicts if v is not None] == [False, False, True]


def test_only_the_latest_requests_of_the_window_count() -> None:
    check = TruthCheck(TruthRules(window=4, min_predictions=1, max_overpredicted=0.9))
    check.finished(book(check, 0), cached_blocks=5)

    shares = []
    for number in range(1, 5):
        check.finished(book(check, number), cached_blocks=10)
        shares.append(check.overpredicted_share(WORKER))

    assert shares == [5 / 20, 5 / 30, 5 / 40, 0.0]


def test_reset_forgets_what_was_judged_and_does_not_judge_what_is_pending() -> None:
    check = TruthCheck(TruthRules(min_predictions=1))
    drifted = check.finished(book(check, 1), cached_blocks=0)
    book(check, 2)
    book(check, 3, worker=OTHER)

    check.reset(WORKER)

    assert check.overpredicted_share(WORKER) == 0.0
    assert check.finished(key(2), cached_blocks=0) is None
    assert overpredicted(check.finished(key(3), cached_blocks=0)) == 10
    again = check.finished(book(check, 4), cached_blocks=0)
    assert [v.has_drifted for v in (drifted, again) if v is not None] == [True, True]


def test_worker_that_is_gone_is_forgotten_with_all_its_ranks() -> None:
    check = TruthCheck()
    book(check, 1)
    book(check, 2, worker=OTHER)

    check.forget_worker(WORKER.worker_id)

    assert check.worker_of(key(1)) is None
    assert check.finished(key(2), cached_blocks=0) is None


def test_request_older_than_the_remembered_removals_is_not_judged() -> None:
    check = TruthCheck(TruthRules(max_removals=2))
    book(check, 1)
    check.removed(WORKER, BLOCKS[:2])
    book(check, 2)
    check.removed(WORKER, BLOCKS[4:6])

    assert check.finished(key(1), cached_blocks=0) is None
    assert overpredicted(check.finished(key(2), cached_blocks=0)) == 4


def test_oldest_pending_requests_are_let_go_beyond_the_bound() -> None:
    check = TruthCheck(TruthRules(max_pending=2))
    for number in range(3):
        book(check, number)

    verdicts = [check.finished(key(number), cached_blocks=0) for number in range(3)]

    assert [verdict is None for verdict in verdicts] == [True, False, False]


def test_hashes_of_a_prediction_that_came_true_are_never_read() -> None:
    class Unreadable(tuple[SequenceHash, ...]):
        def __iter__(self) -> None:  # type: ignore[override]  # it must not be called
            raise AssertionError

    check = TruthCheck()
    check.booked(key(), WORKER, blocks=Unreadable(BLOCKS), overlap_blocks=10)

    assert overpredicted(check.finished(key(), cached_blocks=10)) == 0
