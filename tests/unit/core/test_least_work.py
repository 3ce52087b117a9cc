"""The policy `least_work`: its formula, what each term decides, and what requests may override."""

import random
from dataclasses import replace
from typing import Any

import pytest

from kvmesh.core.candidates import Candidate, CostOverrides, RoutingHints, RoutingQuery, Selection
from kvmesh.core.errors import FixRequestError
from kvmesh.core.ids import WorkerId, WorkerRank
from kvmesh.core.policies.least_work import LeastWork, LeastWorkKnobs

A, B, C, D = (WorkerRank(WorkerId(f"n/decode/{name}")) for name in "abcd")
SIZE = 16
PLAIN = LeastWorkKnobs(request_weight=0.0, backlog_weight=0.0, crowd_weight=0.0, held_weight=0.0, busy_tokens=0.0)


def at(worker: WorkerRank, **changes: Any) -> Candidate:
    """A candidate that, unless told otherwise, holds nothing of a prompt of 10 blocks."""
    return Candidate(**{"worker": worker, "block_size": SIZE, "new_blocks": 10, **changes})


def choose(
    *candidates: Candidate, knobs: LeastWorkKnobs | None = None, tokens: int = 165, **overrides: float
) -> Selection:
    hints = RoutingHints(overrides=CostOverrides(**overrides))
    query = RoutingQuery(model="m", prompt_tokens=tokens, hints=hints)
    return LeastWork(knobs).select(query, candidates, random.Random(1))


def cost(candidate: Candidate, *, knobs: LeastWorkKnobs | None = None, tokens: int = 165, **overrides: float) -> float:
    return choose(candidate, knobs=knobs, tokens=tokens, **overrides).scores[0].cost


def test_every_term_counts_with_its_weight() -> None:
    knobs = LeastWorkKnobs(request_weight=2.0, backlog_weight=0.5, crowd_weight=0.1, held_weight=0.25)
    busy = at(A, overlap_blocks=4, active_prefill_tokens=320, active_blocks=40, active_requests=3)

    # crowding 1.3; 160 tokens are 10 blocks, 4 of them cached; 20 in line; 40 held; 3 requests
    assert cost(busy, knobs=knobs, tokens=160) == pytest.approx(1.3 * (10 - 4) + 0.5 * 20 + 0.25 * 40 + 2.0 * 3)


def test_the_terms_of_an_explanation_add_up_to_the_cost() -> None:
    (scored,) = choose(at(A, overlap_blocks=4, active_prefill_tokens=320, active_blocks=40, active_requests=3)).scores

    assert scored.terms is not None
    assert scored.terms.cost == pytest.approx(scored.cost)
    assert scored.terms.prefill_cost == pytest.approx(scored.terms.prefill_blocks - scored.terms.credit_blocks)


def test_a_long_cached_prefix_outweighs_blocks_that_are_merely_held() -> None:
    warm = at(A, overlap_blocks=8, active_blocks=300)

    assert choose(warm, at(B)).worker == A


def test_a_long_line_outweighs_a_cached_prefix() -> None:
    warm = at(A, overlap_blocks=8, active_prefill_tokens=40 * SIZE)

    assert choose(warm, at(B)).worker == B


def test_of_cold_workers_the_one_with_less_to_do_wins() -> None:
    assert choose(at(A, active_requests=1), at(B)).worker == B
    assert choose(at(A, active_blocks=1), at(B)).worker == B
    assert choose(at(A, active_prefill_tokens=1), at(B)).worker == B


def test_blocks_in_flight_count_as_cached() -> None:
    # all 10 full blocks of the prompt are held there by others, none is cached yet
    assert cost(at(A, new_blocks=0), knobs=PLAIN) == pytest.approx(165 / SIZE - 10)
    assert cost(at(A, new_blocks=7, overlap_blocks=5), knobs=PLAIN) == pytest.approx(165 / SIZE - 5)


def test_a_prompt_in_flight_as_a_whole_still_computes_its_last_block() -> None:
    assert cost(at(A, new_blocks=0), knobs=PLAIN, tokens=160) == pytest.approx(1)


def test_a_crowd_makes_blocks_to_compute_dearer_but_not_cached_ones() -> None:
    knobs = LeastWorkKnobs(request_weight=0.0, backlog_weight=0.0, held_weight=0.0, crowd_weight=0.5)
    extra = [
        cost(at(A, overlap_blocks=overlap, active_requests=2), knobs=knobs, tokens=160)
        - cost(at(A, overlap_blocks=overlap), knobs=knobs, tokens=160)
        for overlap in (0, 9)
    ]

    assert extra == pytest.approx([10, 1])


def test_a_line_beyond_what_runs_at_once_is_no_further_crowd() -> None:
    knobs = LeastWorkKnobs(request_weight=0.0, backlog_weight=0.0, held_weight=0.0, crowd_weight=0.5)

    assert [cost(at(A, active_requests=n), knobs=knobs, tokens=160) for n in (256, 9_999)] == [1290, 1290]


def test_requests_that_run_count_while_half_of_the_workers_idle() -> None:
    knobs = replace(PLAIN, busy_tokens=64.0)  # 4 blocks of 16
    busy, busier, idle, too = at(A, active_requests=2), at(B, active_requests=3), at(C), at(D)

    half_idle = {each.worker: each.cost for each in choose(busy, busier, idle, too, knobs=knobs, tokens=160).scores}
    fewer_idle = {each.worker: each.cost for each in choose(busy, busier, idle, knobs=knobs, tokens=160).scores}

    assert half_idle == {A: 10 + 2 * 4, B: 10 + 3 * 4, C: 10, D: 10}
    assert fewer_idle == {A: 10, B: 10, C: 10}


def test_what_requests_count_is_a_term_of_the_explanation() -> None:
    knobs = replace(PLAIN, busy_tokens=64.0, request_weight=0.5)

    terms = {each.worker: each.terms for each in choose(at(A, active_requests=2), at(B), knobs=knobs).scores}

    assert {worker: each.request_cost for worker, each in terms.items() if each} == {A: 2 * (4 + 0.5), B: 0}


def test_a_short_prefix_does_not_keep_requests_together_while_half_of_the_workers_idle() -> None:
    short = at(A, overlap_blocks=9, active_requests=1)  # 144 tokens
    long = at(A, overlap_blocks=90, new_blocks=100, active_requests=1)  # 1,440 tokens, more than a step costs

    assert choose(short, at(B)).worker == B
    assert choose(long, at(B, new_blocks=100), tokens=1_605).worker == A
    assert choose(short, at(B, active_requests=1)).worker == A


def test_requests_override_the_knobs_that_all_costs_share() -> None:
    warm = at(A, overlap_blocks=4, active_requests=2)

    assert cost(warm, knobs=PLAIN, tokens=160, overlap_credit=0.5) == pytest.approx(8)
    assert cost(warm, knobs=PLAIN, tokens=160, prefill_scale=3.0) == pytest.approx(18)
    assert cost(warm, knobs=PLAIN, tokens=160, request_weight=5.0) == pytest.approx(16)
    assert cost(warm, knobs=PLAIN, tokens=160, overlap_credit=9.0) == 0


def test_the_knobs_in_force_are_told() -> None:
    told = choose(at(A), request_weight=7.0).knobs

    assert told["request_weight"] == 7.0
    assert told["backlog_weight"] == LeastWorkKnobs().backlog_weight


def test_equals_are_drawn_alike() -> None:
    rng = random.Random(3)
    query = RoutingQuery(model="m", prompt_tokens=100)

    drawn = [LeastWork().select(query, [at(A), at(B)], rng).worker for _ in range(120)]

    assert 30 < drawn.count(A) < 90


def test_temperature_draws_dearer_ones_too() -> None:
    rng = random.Random(3)
    query = RoutingQuery(model="m", prompt_tokens=100, hints=RoutingHints(overrides=CostOverrides(temperature=1.0)))

    drawn = [LeastWork().select(query, [at(A), at(B, active_requests=1)], rng).worker for _ in range(200)]

    assert drawn.count(A) / 200 == pytest.approx(0.731, abs=0.12)  # 1 / (1 + exp(-1))


def test_a_choice_changes_nothing() -> None:
    policy = LeastWork()
    query = RoutingQuery(model="m", prompt_tokens=100)
    candidates = [at(A, active_requests=1), at(B, active_blocks=5)]

    chosen = [policy.select(query, candidates, random.Random(1)).worker for _ in range(3)]

    assert len(set(chosen)) == 1


@pytest.mark.parametrize(
    "knobs",
    [
        {"backlog_weight": -0.1},
        {"held_weight": 2.0},
        {"crowd_weight": float("nan")},
        {"temperature": -1.0},
        {"busy_tokens": -1.0},
        {"busy_tokens": float("nan")},
    ],
)
def test_weights_beyond_sense_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(FixRequestError, match=next(iter(knobs))):
        LeastWorkKnobs(**knobs)
