"""What is left of a decision when only some of its candidates are shown."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from kvmesh.core.candidate_columns import CandidateColumns, ListedField, ScoreColumns, shortened
from kvmesh.core.candidates import Candidate, RoutingQuery, Scored, Selection
from kvmesh.core.ids import WorkerId, WorkerRank
from kvmesh.core.policies.kv_aware import KvAware

WORKERS = [WorkerRank(WorkerId(f"n/decode/{name}")) for name in "abcd"]
FLEET = CandidateColumns(ListedField(Candidate(worker=worker, block_size=16) for worker in WORKERS))
COSTS = [5.0, 1.0, 9.0, 3.0]


def columns() -> ScoreColumns:
    return ScoreColumns(FLEET, np.array(COSTS), note=lambda index: f"note {index}")


def selection(chosen: int, scores: Sequence[Scored]) -> Selection:
    excluded = [(candidate, "draining") for candidate in FLEET]
    return Selection(
        worker=WORKERS[chosen], policy="p", cost=COSTS[chosen], candidates=FLEET, scores=scores, excluded=excluded
    )


@pytest.mark.parametrize("scores", [columns(), list(columns())], ids=["columns", "objects"])
class TestShortened:
    def test_the_cheapest_are_kept_with_their_scores(self, scores: Sequence[Scored]) -> None:
        verdicts = shortened(selection(1, scores), limit=2).explain()

        assert [(verdict.candidate.worker, verdict.cost) for verdict in verdicts] == [
            (WORKERS[1], 1.0),
            (WORKERS[3], 3.0),
        ]
        assert verdicts[1].lost == "note 3"

    def test_the_chosen_one_is_kept_however_dear(self, scores: Sequence[Scored]) -> None:
        verdicts = shortened(selection(2, scores), limit=2).explain()

        assert [verdict.candidate.worker for verdict in verdicts] == [WORKERS[1], WORKERS[2]]
        assert verdicts[1].lost == ""

    def test_what_fits_stays_whole(self, scores: Sequence[Scored]) -> None:
        whole = selection(0, scores)

        assert shortened(whole, limit=4).explain() == whole.explain()

    def test_as_many_of_the_excluded_are_kept(self, scores: Sequence[Scored]) -> None:
        short = shortened(selection(0, scores), limit=3)

        assert [candidate.worker for candidate, _ in short.excluded] == WORKERS[:3]


def test_a_policy_that_scores_nobody_keeps_the_chosen_one() -> None:
    short = shortened(replace(selection(3, ()), cost=None), limit=2)

    assert [candidate.worker for candidate in short.candidates] == [WORKERS[0], WORKERS[3]]
    assert short.scores == ()


def test_a_real_decision_keeps_its_terms() -> None:
    made = KvAware().select(RoutingQuery(model="m", prompt_tokens=64), FLEET, random.Random(1))

    verdicts = shortened(replace(made, candidates=FLEET, cost=8.0), limit=1).explain()

    assert [verdict.candidate.worker for verdict in verdicts] == [made.worker]
    assert verdicts[0].terms is not None
    assert verdicts[0].terms.prefill_blocks == 4.0
