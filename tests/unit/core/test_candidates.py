import pytest

from kvmesh.core.candidates import (
    Candidate,
    CostOverrides,
    RoutingQuery,
    Scored,
    Selection,
    by_worker,
)
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import WorkerId, WorkerRank

A, B, C = (WorkerRank(WorkerId(f"n/decode/{name}")) for name in "abc")


def test_candidates_are_ordered_by_name_then_rank() -> None:
    workers = [WorkerRank(B.worker_id, 1), A, WorkerRank(B.worker_id, 0)]

    ordered = by_worker(Candidate(worker=worker, block_size=16) for worker in workers)

    assert [candidate.worker for candidate in ordered] == [A, WorkerRank(B.worker_id, 0), WorkerRank(B.worker_id, 1)]


@pytest.mark.parametrize(("overlap", "uncached"), [(0, 100), (2, 68), (6, 4), (7, 0)])
def test_uncached_tokens_are_what_the_overlap_leaves(overlap: int, uncached: int) -> None:
    candidate = Candidate(worker=A, block_size=16, overlap_blocks=overlap)

    assert candidate.uncached_tokens(100) == uncached


@pytest.mark.parametrize("name", ["overlap_credit", "prefill_scale", "request_weight", "temperature"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), 1e300])
def test_knob_out_of_range_is_refused_and_named(name: str, value: float) -> None:
    with pytest.raises(FixRequestError, match=r"not in 0\.\.1e\+06") as caught:
        CostOverrides(**{name: value})

    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.field == f"query.hints.cost.{name}"


def test_negative_prompt_is_refused() -> None:
    with pytest.raises(FixRequestError) as caught:
        RoutingQuery(model="m", prompt_tokens=-1)

    assert caught.value.field == "prompt_tokens"


def test_prompt_text_is_not_in_the_representation_of_a_query() -> None:
    query = RoutingQuery(model="m", prompt_tokens=3, prompt_text="my secret")

    assert "secret" not in repr(query)
    assert query != RoutingQuery(model="m", prompt_tokens=3, prompt_text="another")


def test_explanation_lists_candidates_by_cost_and_says_why_each_lost() -> None:
    scores = (Scored(A, 7.0), Scored(B, 2.0), Scored(C, 2.0))
    candidates = tuple(Candidate(worker=worker, block_size=16) for worker in (A, B, C))
    selection = Selection(worker=C, policy="p", cost=2.0, scores=scores, candidates=candidates)

    verdicts = selection.explain()

    assert [(verdict.candidate.worker, verdict.cost, verdict.lost) for verdict in verdicts] == [
        (C, 2.0, ""),
        (B, 2.0, "tie, not drawn"),
        (A, 7.0, "cost 7 is above 2"),
    ]


def test_explanation_says_when_a_cheaper_candidate_was_passed_over() -> None:
    scores = (Scored(A, 1.0), Scored(B, 2.0), Scored(C, 0.5, note="barred"))
    candidates = tuple(Candidate(worker=worker, block_size=16) for worker in (A, B, C))
    selection = Selection(worker=B, policy="p", cost=2.0, scores=scores, candidates=candidates, note="drawn")

    verdicts = selection.explain()

    assert [(verdict.candidate.worker, verdict.lost) for verdict in verdicts] == [
        (C, "barred"),
        (A, "costs less, passed over: drawn"),
        (B, ""),
    ]


def test_explanation_of_a_policy_that_does_not_score_puts_the_chosen_first() -> None:
    candidates = tuple(Candidate(worker=worker, block_size=16) for worker in (A, B))
    selection = Selection(worker=B, policy="p", candidates=candidates)

    verdicts = selection.explain()

    assert [(verdict.candidate.worker, verdict.cost, verdict.lost) for verdict in verdicts] == [
        (B, None, ""),
        (A, None, "not chosen by p"),
    ]
