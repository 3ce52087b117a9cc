"""Decisions as lines of a log, and lines taken again."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvmesh.core.candidates import Candidate, CostOverrides, RoutingHints, RoutingQuery, Selection
from kvmesh.core.decision_log import Decision, decision_from_mapping, decision_to_mapping, is_start, start_mapping
from kvmesh.core.decision_rerun import DecisionRerun, Retaken
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.policies.kv_aware import CostKnobs, KvAware
from kvmesh.core.policies.policy import Policy
from kvmesh.core.policies.round_robin import RoundRobin
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore, RoutingRules

A, B, C = (WorkerRank(WorkerId(f"n/decode/{name}")) for name in "abc")
SETTINGS = {"policy": "under test"}


def router(policy: Policy, *workers: WorkerRank, ranks: int = 1) -> RoutingCore:
    rules = RoutingRules(overload=OverloadRules(max_requests_per_slot=100))
    core = RoutingCore(RouterId("r"), policy=policy, rng=random.Random(5), rules=rules)
    for worker in workers or (A, B, C):
        labels = {"zone": worker.worker_id[-1]}
        core.put_worker(
            WorkerRecord(
                worker_id=worker.worker_id, epoch=Epoch(7), models=("m",), block_size=16, labels=labels, ranks=ranks
            ),
            now=0,
        )
    return core


def query(tokens: int = 64, *, start: int = 1, **hints: Any) -> RoutingQuery:
    hashes = tuple(map(SequenceHash, range(start, start + tokens // 16)))
    return RoutingQuery(
        model="m",
        prompt_tokens=tokens,
        block_hashes={16: hashes},
        prompt_text="a secret",
        expected_output_tokens=9,
        hints=RoutingHints(**hints),
    )


def booked(core: RoutingCore, number: int, asked: RoutingQuery) -> Decision:
    key = AttemptKey(RequestId(f"r{number}"), 1)
    return Decision(
        selection=core.reserve(key, asked, now=1).selection, policy_settings=SETTINGS, at_s=1000.5, booking=key
    )


def through_json(decision: Decision) -> Decision:
    return decision_from_mapping(json.loads(json.dumps(decision_to_mapping(decision))))


def rerun(decisions: Sequence[Decision], make: Any) -> list[Retaken]:
    again = DecisionRerun(lambda settings: make())
    return [again.take(through_json(decision)) for decision in decisions]


def test_a_line_keeps_everything_the_decision_rested_on() -> None:
    core = router(KvAware(CostKnobs(temperature=0.3)), ranks=2)
    hints: dict[str, Any] = {
        "allowed_workers": frozenset({A.worker_id, B.worker_id}),
        "preferred_labels": {"zone": "b"},
        "session_id": "s",
        "priority": 3,
        "overrides": CostOverrides(temperature=0.9),
    }
    decision = booked(core, 1, query(**hints))

    read = through_json(decision)

    before, after = decision.selection, read.selection
    assert read == replace(decision, selection=after)
    assert tuple(after.candidates) == tuple(before.candidates)
    assert tuple(after.excluded) == tuple(before.excluded)
    assert (after.worker, after.epoch, after.seed, after.knobs) == (
        before.worker, before.epoch, before.seed, dict(before.knobs),
    )  # fmt: skip
    assert after.query == replace(query(**hints), block_hashes={}, prompt_text=None)


def test_a_line_holds_no_prompt() -> None:
    line = decision_to_mapping(booked(router(KvAware()), 1, query(start=123_456_789)))

    text = json.dumps(line)
    assert "secret" not in text
    assert "123456789" not in text
    assert line["query"]["hashed_blocks"] == {"16": 4}


@pytest.mark.parametrize(
    "knobs", [CostKnobs(), CostKnobs(temperature=1.0), CostKnobs(overlap_credit=0.5, request_weight=3)]
)
def test_decisions_taken_again_by_their_policy_are_the_same(knobs: CostKnobs) -> None:
    core, drawn = router(KvAware(knobs)), random.Random(11)
    decisions = [
        booked(core, number, query(16 * drawn.randint(1, 9), start=drawn.randint(1, 3))) for number in range(200)
    ]

    again = rerun(decisions, lambda: KvAware(knobs))

    assert [retaken.worker for retaken in again] == [decision.selection.worker for decision in decisions]
    assert all(retaken.is_same for retaken in again)
    assert len({decision.selection.worker for decision in decisions}) == 3


def test_another_policy_decides_otherwise_and_is_explained() -> None:
    core = router(KvAware())
    core.apply_kv_stored(B, Epoch(7), parent=None, block_hashes=query().block_hashes[16], now=0)
    decision = booked(core, 1, query())

    (again,) = rerun([decision], lambda: KvAware(CostKnobs(overlap_credit=0, request_weight=1)))

    explained = again.explained()
    assert decision.selection.worker == B
    assert len(explained.explain()) == 3
    assert {verdict.cost for verdict in explained.explain()} == {8.0}
    assert explained.worker == again.worker


def test_a_policy_with_a_memory_remembers_what_was_booked() -> None:
    core = router(RoundRobin())
    decisions = [booked(core, number, query()) for number in range(7)]

    again = rerun(decisions, RoundRobin)

    assert [retaken.worker for retaken in again] == [A, B, C, A, B, C, A]
    assert all(retaken.is_same for retaken in again)


def test_what_was_only_asked_is_not_remembered() -> None:
    core = router(RoundRobin())
    asked = Decision(selection=core.select(query(), now=1), policy_settings=SETTINGS, at_s=0)
    decisions = [asked, booked(core, 1, query()), booked(core, 2, query())]

    again = rerun(decisions, RoundRobin)

    assert [retaken.worker for retaken in again] == [A, A, B]


def test_a_start_makes_the_policy_anew() -> None:
    first, second = router(RoundRobin()), router(RoundRobin())
    again = DecisionRerun(lambda settings: RoundRobin())
    again.take(through_json(booked(first, 1, query())))
    restarted = through_json(booked(second, 1, query()))

    without = DecisionRerun(lambda settings: RoundRobin())
    without.take(through_json(booked(first, 2, query())))
    again.start_anew()

    assert again.take(restarted).is_same
    assert not without.take(restarted).is_same


class Remembers:
    """Says what it is told."""

    def __init__(self) -> None:
        self.forgot: list[str] = []

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> WorkerRank:
        return candidates[0].worker

    def forget_worker(self, worker_id: WorkerId) -> None:
        self.forgot.append(worker_id)


def test_a_policy_is_told_of_workers_that_left_or_came_back_anew() -> None:
    core, policy = router(Remembers()), Remembers()
    before = booked(core, 1, query())
    core.remove_worker(C.worker_id, Epoch(7), now=2)
    core.put_worker(WorkerRecord(worker_id=B.worker_id, epoch=Epoch(8), models=("m",), block_size=16), now=2)
    after = booked(core, 2, query())

    rerun([before, after], lambda: policy)

    assert sorted(policy.forgot) == [B.worker_id, C.worker_id]


class Fails:
    """Gives up."""

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> WorkerRank:
        raise RuntimeError("no idea")


def test_a_decision_that_was_a_fallback_is_taken_again_by_the_least_cost() -> None:
    decision = booked(router(Fails()), 1, query())

    (again,) = rerun([decision], Fails)

    assert "no idea" in decision.selection.fallback
    assert again.is_same


def test_a_policy_that_fails_now_is_a_difference() -> None:
    (again,) = rerun([booked(router(KvAware()), 1, query())], Fails)

    assert not again.is_same
    assert again.fault == "raised RuntimeError('no idea')"
    explained = again.explained()
    assert explained.fallback == "Fails raised RuntimeError('no idea')"
    assert {verdict.cost for verdict in explained.explain()} == {8.0}


def test_a_policy_that_fails_to_learn_still_decides() -> None:
    class CannotLearn(Remembers):
        def booked(self, query: RoutingQuery, worker: WorkerRank) -> None:
            raise RuntimeError("full")

    core = router(KvAware())

    again = rerun([booked(core, number, query()) for number in range(2)], CannotLearn)

    assert [retaken.worker for retaken in again] == [A, A]
    assert [retaken.fault for retaken in again] == ["", ""]


def test_another_policy_is_asked_where_that_of_the_log_had_failed() -> None:
    decision = through_json(booked(router(Fails(), B, C), 1, query()))

    again = DecisionRerun(lambda settings: Remembers(), asks_another=True).take(decision)

    assert (again.worker, again.explained().fallback, again.explained().epoch) == (B, "", Epoch(7))


def test_decisions_of_one_policy_share_it_and_those_of_another_do_not() -> None:
    made: list[Mapping[str, Any]] = []

    def make(settings: Mapping[str, Any]) -> Policy:
        made.append(settings)
        return RoundRobin()

    again, core = DecisionRerun(make), router(RoundRobin())
    for number, settings in enumerate([{"policy": "x"}, {"policy": "x"}, {"policy": "y"}]):
        again.take(replace(booked(core, number, query()), policy_settings=settings))

    assert [settings["policy"] for settings in made] == ["x", "y"]


@pytest.mark.parametrize(
    "line",
    [
        [],
        {},
        {"version": 2},
        {"version": 1},
        {**decision_to_mapping(booked(router(KvAware()), 1, query())), "candidates": {}},
        {**decision_to_mapping(booked(router(KvAware()), 1, query())), "query": None},
        {**decision_to_mapping(booked(router(KvAware()), 1, query())), "excluded_because": ["one too many"]},
        {**decision_to_mapping(booked(router(KvAware()), 1, query())), "policy_settings": {}},
    ],
)
def test_what_is_no_decision_is_refused(line: Any) -> None:
    with pytest.raises(FixRequestError) as refused:
        decision_from_mapping(line)

    assert refused.value.reason is Reason.INVALID_FIELD


def test_inputs_that_this_release_does_not_know_or_misses_are_passed_over() -> None:
    line = decision_to_mapping(booked(router(KvAware()), 1, query()))
    line["candidates"]["of_a_later_release"] = [1, 2, 3]
    del line["candidates"]["is_draining"]

    decision = decision_from_mapping(line)

    assert [candidate.is_draining for candidate in decision.selection.candidates] == [False] * 3


def test_a_start_is_told_from_a_decision() -> None:
    assert is_start(start_mapping(at_s=3.0))
    assert not is_start(decision_to_mapping(booked(router(KvAware()), 1, query())))


def test_an_age_that_json_has_not_comes_back() -> None:
    decision = booked(router(KvAware()), 1, query())
    line = decision_to_mapping(decision)
    line["candidates"]["load_age_s"] = [None, 1.0, 2.0]

    read = decision_from_mapping(line)

    assert [candidate.load_age_s for candidate in read.selection.candidates] == [float("inf"), 1.0, 2.0]
    assert isinstance(read.selection, Selection)
