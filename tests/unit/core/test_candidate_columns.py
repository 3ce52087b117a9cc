import random
from collections.abc import Iterator

import numpy as np
import pytest

from kvmesh.core.candidate_columns import CandidateColumns, ListedField, ScoreColumns, index_of_least
from kvmesh.core.candidates import Candidate, Scored
from kvmesh.core.ids import WorkerId, WorkerRank
from kvmesh.core.lineup import BitPositions, Lineup

A, B, C, D = (WorkerRank(WorkerId(f"n/decode/{name}")) for name in "abcd")
FLEET = [
    Candidate(worker=worker, block_size=16, overlap_blocks=number, active_requests=10 * number)
    for number, worker in enumerate((A, B, C, D))
]


@pytest.mark.parametrize(("costs", "least"), [([5, 3, 7, 3.5], 1), ([-1, -5, 0], 1), ([4], 0), ([float("inf"), 9], 1)])
def test_least_cost_is_drawn(costs: list[float], least: int) -> None:
    assert index_of_least(np.array(costs), random.Random(1)) == least


def test_ties_are_drawn_uniformly() -> None:
    rng = random.Random(1)

    drawn = [index_of_least(np.array([3.0, 9.0, 3.0]), rng) for _ in range(120)]

    assert set(drawn) == {0, 2}
    assert 40 <= drawn.count(0) <= 80


def some(*positions: int) -> CandidateColumns:
    return CandidateColumns(ListedField(FLEET), np.array(positions))


def test_candidates_are_a_sequence_of_objects_in_the_order_of_the_field() -> None:
    columns = some(1, 3)

    assert len(columns) == 2
    assert list(columns) == [FLEET[1], FLEET[3]]
    assert (columns[0], columns[-1], columns[1:]) == (FLEET[1], FLEET[3], (FLEET[3],))
    with pytest.raises(IndexError):
        columns[2]


def test_columns_and_workers_have_the_index_of_the_candidate() -> None:
    columns = some(1, 3)

    assert columns.overlap_blocks.tolist() == [1, 3]
    assert columns.active_requests.tolist() == [10, 30]
    assert [columns.worker(index) for index in range(2)] == [B, D]
    assert [columns.position(index) for index in range(2)] == [1, 3]
    assert [columns.index_of(worker) for worker in (A, B, C, D)] == [None, 0, None, 1]


def test_objects_in_any_order_become_columns_by_worker_and_columns_stay_what_they_are() -> None:
    columns = CandidateColumns.of(FLEET[::-1])

    assert list(columns) == FLEET
    assert CandidateColumns.of(columns) is columns
    assert [columns.index_of(worker) for worker in (A, D)] == [0, 3]


def test_a_field_may_be_made_of_objects_that_come_once() -> None:
    def coming() -> Iterator[Candidate]:
        yield from FLEET

    assert list(CandidateColumns.of(coming())) == FLEET


def test_scores_are_objects_only_where_somebody_looks() -> None:
    scores = ScoreColumns(some(1, 3), np.array([2.5, 0.5]), note=lambda index: f"note {index}")

    assert list(scores) == [Scored(B, 2.5, None, "note 0"), Scored(D, 0.5, None, "note 1")]
    assert (scores[-1].worker, len(scores[:1])) == (D, 1)


def test_ranks_are_found_by_worker_and_by_label() -> None:
    second = WorkerRank(A.worker_id, 1)
    lineup = Lineup([A, second, B], [{"zone": "x"}, {"zone": "x"}, {"zone": "y"}])

    assert lineup.flags_of([A.worker_id, WorkerId("nobody")]).tolist() == [True, True, False]
    assert lineup.flags_of_label("zone", "y").tolist() == [False, False, True]
    assert lineup.flags_of_label("zone", "z").tolist() == [False] * 3
    assert [lineup.position_of(worker) for worker in (A, second, B, C)] == [0, 1, 2, None]


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        pytest.param(0b1000, [0], id="one"),
        pytest.param(0b1001, [0, 2], id="two"),
        pytest.param(0b0110, [], id="bits of nobody here"),
        pytest.param(1 << 90 | 1, [2], id="a bit beyond all that are known"),
        pytest.param(0, [], id="none"),
    ],
)
def test_masks_stand_for_the_positions_of_their_bits(mask: int, positions: list[int]) -> None:
    bits = BitPositions([3, None, 0])

    assert [sorted(bits.of(mask).tolist()) for _ in range(2)] == [positions] * 2


def test_memory_of_masks_and_labels_is_bounded() -> None:
    bits, lineup = BitPositions(range(11)), Lineup([A], [{"zone": "x"}])

    masks = [sorted(bits.of(mask).tolist()) for mask in range(1, 1500)]
    flags = [lineup.flags_of_label("zone", str(number)).tolist() for number in range(1500)]

    assert masks == [[bit for bit in range(11) if mask >> bit & 1] for mask in range(1, 1500)]
    assert flags == [[False]] * 1500
    assert lineup.flags_of_label("zone", "x").tolist() == [True]
