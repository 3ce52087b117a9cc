from collections.abc import Mapping
from typing import Any

import pytest

from kvmesh.core.candidate_columns import ListedField
from kvmesh.core.candidates import Candidate, RoutingHints, RoutingQuery
from kvmesh.core.eligibility import OverloadRules, filter_candidates
from kvmesh.core.errors import BackOffError, FixRequestError, MeshError, Reason, TryElsewhereError
from kvmesh.core.ids import WorkerId, WorkerRank

A, B, C = (WorkerRank(WorkerId(name)) for name in "abc")


def candidate(
    worker: WorkerRank,
    *,
    labels: Mapping[str, str] | None = None,
    draining: bool = False,
    overload: str = "",
    stale: bool = False,
) -> Candidate:
    return Candidate(
        worker=worker,
        block_size=16,
        labels=labels or {},
        is_draining=draining,
        overload=overload,
        is_stale=stale,
        load_age_s=4.0 if stale else 0.0,
        is_saturated=stale or bool(overload),
    )


def query(**hints: Any) -> RoutingQuery:
    return RoutingQuery(model="m", prompt_tokens=10, hints=RoutingHints(**hints))


EAST, WEST = {"zone": "east", "gpu": "h200"}, {"zone": "west", "gpu": "h200"}
FLEET = (candidate(A, labels=EAST), candidate(B, labels=WEST), candidate(C))


@pytest.mark.parametrize(
    ("hints", "kept", "reasons"),
    [
        pytest.param({}, "abc", {}, id="no hints"),
        pytest.param({"pinned_worker": "b"}, "b", {"a": "b is pinned", "c": "b is pinned"}, id="pinned"),
        pytest.param({"allowed_workers": frozenset("ac")}, "ac", {"b": "not among the allowed workers"}, id="allowed"),
        pytest.param(
            {"excluded_workers": frozenset("a")},
            "bc",
            {"a": "excluded by the request, or failed an earlier attempt"},
            id="excluded",
        ),
        pytest.param(
            {"required_labels": {"zone": "east"}},
            "a",
            {"b": "lacks label zone=east", "c": "lacks label zone=east"},
            id="required label",
        ),
        pytest.param(
            {"preferred_labels": {"zone": "east", "gpu": "h200"}},
            "a",
            {"b": "another has more preferred labels", "c": "another has more preferred labels"},
            id="most preferred labels",
        ),
        pytest.param({"preferred_labels": {"zone": "north"}}, "abc", {}, id="a preference nobody meets"),
    ],
)
def test_hints_narrow_the_field_and_say_why(hints: dict[str, Any], kept: str, reasons: dict[str, str]) -> None:
    eligible = filter_candidates(query(**hints), ListedField(FLEET))

    assert [each.worker.worker_id for each in eligible.candidates] == list(kept)
    assert {each.worker.worker_id: why for each, why in eligible.excluded} == reasons


def test_pinned_rank_excludes_the_other_ranks() -> None:
    ranks = [candidate(WorkerRank(A.worker_id, rank)) for rank in range(3)]

    eligible = filter_candidates(query(pinned_worker=A.worker_id, pinned_rank=1), ListedField(ranks))

    assert [each.worker.rank for each in eligible.candidates] == [1]
    assert {why for _, why in eligible.excluded} == {"rank 1 is pinned"}


@pytest.mark.parametrize(
    ("busy", "why"),
    [
        (candidate(B, overload="9 requests wait inside it"), "overloaded: 9 requests wait inside it"),
        (candidate(B, stale=True), "stale: 4.0 s old"),
        (candidate(B, draining=True), "draining"),
    ],
)
def test_busy_stale_and_draining_workers_get_nothing(busy: Candidate, why: str) -> None:
    eligible = filter_candidates(query(), ListedField([candidate(A), busy]))

    assert [each.worker for each in eligible.candidates] == [A]
    assert tuple(eligible.excluded) == ((busy, why),)


def test_session_goes_where_it_was_before_labels_are_preferred() -> None:
    eligible = filter_candidates(query(preferred_labels={"zone": "east"}), ListedField(FLEET), session_worker=C)

    assert [each.worker for each in eligible.candidates] == [C]
    assert {why for _, why in eligible.excluded} == {"another holds the session"}


@pytest.mark.parametrize("gone", [candidate(B, overload="full"), candidate(B, draining=True), None])
def test_session_moves_when_its_worker_cannot_take_it(gone: Candidate | None) -> None:
    field = [candidate(A), *([gone] if gone else [])]

    eligible = filter_candidates(query(), ListedField(field), session_worker=B)

    assert [each.worker for each in eligible.candidates] == [A]


def test_labels_are_preferred_when_the_sessions_worker_is_gone() -> None:
    eligible = filter_candidates(
        query(preferred_labels={"zone": "west"}), ListedField(FLEET), session_worker=WorkerRank(WorkerId("z"))
    )

    assert [each.worker for each in eligible.candidates] == [B]


OVERLOADED = candidate(A, overload="9 requests on 2 slots")


@pytest.mark.parametrize(
    ("field", "hints", "error", "reason", "names"),
    [
        pytest.param(
            [candidate(A, draining=True)], {}, TryElsewhereError, Reason.NO_WORKERS, "draining", id="all drain"
        ),
        pytest.param(
            FLEET, {"pinned_worker": "z"}, TryElsewhereError, Reason.NO_MATCHING_WORKER, "pinned worker z", id="pin"
        ),
        pytest.param(
            FLEET,
            {"pinned_worker": "a", "pinned_rank": 3},
            TryElsewhereError,
            Reason.NO_MATCHING_WORKER,
            "pinned worker a rank 3",
            id="pinned rank",
        ),
        pytest.param(
            FLEET,
            {"pinned_worker": "a", "excluded_workers": frozenset("a")},
            TryElsewhereError,
            Reason.NO_MATCHING_WORKER,
            "pinned worker a",
            id="pinned and excluded",
        ),
        pytest.param(
            FLEET,
            {"excluded_workers": frozenset("abc")},
            TryElsewhereError,
            Reason.NO_MATCHING_WORKER,
            r"excluded \[a, b, c\]",
            id="all excluded",
        ),
        pytest.param(
            FLEET,
            {"required_labels": {"gpu": "h200", "zone": "north"}},
            TryElsewhereError,
            Reason.NO_MATCHING_WORKER,
            "has label zone=north$",
            id="a label nobody has",
        ),
        pytest.param(
            [candidate(A, labels={"x": "1"}), candidate(B, labels={"y": "1"})],
            {"required_labels": {"x": "1", "y": "1"}},
            TryElsewhereError,
            Reason.NO_MATCHING_WORKER,
            "has label x=1, y=1",
            id="labels nobody has together",
        ),
        pytest.param(
            [OVERLOADED, candidate(B, stale=True)],
            {},
            BackOffError,
            Reason.OVERLOADED,
            "every worker of m is saturated: a .overloaded: 9 requests on 2 slots., b .stale: 4.0 s old.",
            id="all saturated",
        ),
        pytest.param(
            [OVERLOADED, candidate(B)],
            {"pinned_worker": "a"},
            BackOffError,
            Reason.OVERLOADED,
            "pinned worker a is saturated",
            id="pinned and overloaded is never rerouted",
        ),
        pytest.param(
            [OVERLOADED, candidate(B, labels=EAST, overload="full"), candidate(C)],
            {"required_labels": EAST},
            BackOffError,
            Reason.OVERLOADED,
            "saturated: b .overloaded: full.",
            id="all that match are overloaded",
        ),
    ],
)
def test_error_names_what_excluded_everybody(
    field: list[Candidate], hints: dict[str, Any], error: type[MeshError], reason: Reason, names: str
) -> None:
    with pytest.raises(error, match=names) as caught:
        filter_candidates(query(**hints), ListedField(field))

    assert caught.value.reason is reason


def test_overload_says_when_to_come_back() -> None:
    with pytest.raises(BackOffError) as caught:
        filter_candidates(query(), ListedField([OVERLOADED]))

    assert caught.value.retry_after_s == 1.0


IDLE = {"decode_blocks": 0, "total_blocks": 100, "prefill_tokens": 0, "requests": 0, "slots": 4, "waiting": 0}


@pytest.mark.parametrize(
    ("rules", "load", "is_broken"),
    [
        pytest.param(OverloadRules(), {"decode_blocks": 999, "waiting": 999, "requests": 999}, False, id="all off"),
        pytest.param(OverloadRules(max_block_usage=0.5), {"decode_blocks": 50}, False, id="blocks at the bound"),
        pytest.param(OverloadRules(max_block_usage=0.5), {"decode_blocks": 51}, True, id="blocks above it"),
        pytest.param(
            OverloadRules(max_block_usage=0.5), {"decode_blocks": 51, "total_blocks": 0}, False, id="pool not said"
        ),
        pytest.param(OverloadRules(max_prefill_tokens=100), {"prefill_tokens": 100}, False, id="tokens at the bound"),
        pytest.param(OverloadRules(max_prefill_tokens=100), {"prefill_tokens": 101}, True, id="tokens above it"),
        pytest.param(OverloadRules(max_requests_per_slot=1.0), {"requests": 3}, False, id="the last slot"),
        pytest.param(OverloadRules(max_requests_per_slot=1.0), {"requests": 4}, True, id="no slot left"),
        pytest.param(OverloadRules(max_requests_per_slot=1.0), {"requests": 4, "slots": 0}, False, id="slots not said"),
        pytest.param(OverloadRules(max_waiting_requests=0), {"waiting": 1}, True, id="one waits"),
    ],
)
def test_overload_rules(rules: OverloadRules, load: dict[str, int], *, is_broken: bool) -> None:
    assert bool(rules.broken_by(**(IDLE | load))) == is_broken


@pytest.mark.parametrize("value", [-1, float("nan")])
def test_overload_bound_below_zero_is_refused(value: float) -> None:
    with pytest.raises(FixRequestError) as caught:
        OverloadRules(max_block_usage=value)

    assert caught.value.field == "max_block_usage"
