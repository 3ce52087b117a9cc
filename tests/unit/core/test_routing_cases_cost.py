"""Costs worked out by hand, through the whole router: stored events, load reports and bookings in, a choice out."""

import random
from collections import Counter
from typing import Any

import pytest

from kvmesh.core.candidates import CostOverrides, RoutingHints, RoutingQuery
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, WorkerId, WorkerRank
from kvmesh.core.load_report import LoadReport, RouterLoad
from kvmesh.core.policies.cost_choice import ImbalanceGuard
from kvmesh.core.policies.kv_aware import CostKnobs, KvAware
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore, RoutingRules

A, B, C, D = (WorkerRank(WorkerId(f"n/decode/{name}")) for name in "abcd")
EPOCH = Epoch(1)
BLOCK_SIZE = 16


def router(
    *workers: WorkerRank, knobs: CostKnobs | None = None, guard: ImbalanceGuard | None = None, max_waiting: int = 50
) -> RoutingCore:
    rules = RoutingRules(overload=OverloadRules(max_waiting_requests=max_waiting))
    made = RoutingCore(
        RouterId("ours"), policy=KvAware(knobs, imbalance_guard=guard), rng=random.Random(1), rules=rules
    )
    for worker in workers:
        record = WorkerRecord(worker_id=worker.worker_id, epoch=EPOCH, models=("m",), block_size=BLOCK_SIZE)
        made.put_worker(record, now=0)
    return made


def prompt(tokens: int, **hints: Any) -> RoutingQuery:
    """The prompt of these cases, cut off after `tokens`."""
    blocks = PromptBlocks.of_local(range(1, tokens // BLOCK_SIZE + 1), BLOCK_SIZE)
    return RoutingQuery(model="m", prompt_tokens=tokens, block_hashes={BLOCK_SIZE: blocks}, hints=RoutingHints(**hints))


def cache(made: RoutingCore, worker: WorkerRank, blocks: int) -> None:
    local = PromptBlocks.of_local(range(1, blocks + 1), BLOCK_SIZE)
    made.apply_kv_stored(
        worker, EPOCH, parent=None, block_hashes=tuple(local), local_hashes=local.local, now=0
    )  # fmt: skip


def report(made: RoutingCore, worker: WorkerRank, *, waiting: int = 0, **load: int) -> None:
    """Let a worker say what it runs for nobody's router."""
    said = LoadReport(epoch=EPOCH, sequence=1, received_at=0, waiting_requests=waiting, unrouted=RouterLoad(**load))
    made.apply_load(worker, said, now=0)


def costs(made: RoutingCore, query: RoutingQuery) -> dict[WorkerRank, float]:
    return {scored.worker: scored.cost for scored in made.select(query, now=0).scores}


def test_cached_blocks_weigh_against_decode_blocks() -> None:
    made = router(A, B, C)
    for worker, overlap, decode in ((A, 2, 10), (B, 5, 5), (C, 8, 9)):
        cache(made, worker, overlap)
        report(made, worker, decode_blocks=decode)

    # 10 blocks to prefill, and 10 new blocks to hold everywhere.
    assert costs(made, prompt(160)) == {A: 18 + 10, B: 10 + 10, C: 11 + 10}
    assert made.select(prompt(160), now=0).worker == B


@pytest.mark.parametrize(
    ("tokens", "overlap", "decode", "knobs", "warm_cost", "cold_cost", "chosen"),
    [
        pytest.param(64, 2, 3, {"prefill_scale": 2.0}, 7, 8, A, id="scale 2 favours the cache"),
        pytest.param(128, 4, 5, {"overlap_credit": 1.0}, 9, 8, B, id="credit 1 favours the idle worker"),
        pytest.param(128, 4, 5, {"overlap_credit": 1.5}, 7, 8, A, id="credit 1.5 favours the cache"),
    ],
)
@pytest.mark.parametrize("is_by_request", [False, True])
def test_knobs_move_the_choice_between_a_warm_and_an_idle_worker(
    *,
    tokens: int,
    overlap: int,
    decode: int,
    knobs: dict[str, float],
    warm_cost: float,
    cold_cost: float,
    chosen: WorkerRank,
    is_by_request: bool,
) -> None:
    made = router(A, B, knobs=None if is_by_request else CostKnobs(**knobs))
    cache(made, A, overlap)
    report(made, A, decode_blocks=decode)
    query = prompt(tokens, overrides=CostOverrides(**knobs)) if is_by_request else prompt(tokens)

    new_blocks = tokens // BLOCK_SIZE
    assert costs(made, query) == {A: warm_cost + new_blocks, B: cold_cost + new_blocks}
    assert made.select(query, now=0).worker == chosen


@pytest.mark.parametrize(("weight", "cost"), [(32.0, 228), (0.0, 100)])
def test_running_requests_count_by_their_weight(weight: float, cost: float) -> None:
    made = router(A, knobs=CostKnobs(request_weight=weight))
    report(made, A, decode_blocks=100, active_requests=4)

    assert costs(made, prompt(0)) == {A: cost}


def test_equal_workers_are_drawn_by_the_routers_own_rng() -> None:
    made = router(A, B)

    assert {made.select(prompt(64), now=0).worker for _ in range(120)} == {A, B}


def test_draws_at_a_temperature_follow_the_costs_of_the_router() -> None:
    made = router(A, B, C, knobs=CostKnobs(temperature=1.0))
    for worker, decode in ((A, 0), (B, 3), (C, 9)):
        report(made, worker, decode_blocks=decode)

    drawn = Counter(made.select(prompt(64), now=0).worker for _ in range(4_000))

    assert [drawn[worker] / 4_000 for worker in (A, B, C)] == pytest.approx([0.4798, 0.3438, 0.1765], abs=0.035)


GUARD = ImbalanceGuard(absolute=5, relative=2.0)


def test_guard_sends_bookings_to_the_idle_worker_whatever_another_has_cached() -> None:
    made = router(A, B, guard=GUARD)
    cache(made, A, 9)
    report(made, A, active_requests=20)
    report(made, B)

    picks = [made.reserve(AttemptKey(RequestId(str(n)), 1), prompt(160), now=0).worker for n in range(5)]

    assert picks == [B] * 5


def test_guard_is_off_unless_it_is_asked_for() -> None:
    made = router(A, B)
    cache(made, A, 9)
    report(made, A, active_requests=20)
    report(made, B)

    assert made.select(prompt(160), now=0).worker == A


def test_an_idle_worker_that_takes_nothing_does_not_disable_affinity() -> None:
    made = router(A, B, C, guard=GUARD, max_waiting=3)
    cache(made, A, 9)
    report(made, A, active_requests=20)
    report(made, B, active_requests=15)
    report(made, C, waiting=4)  # no requests run there, and four wait: it is unwell

    selection = made.select(prompt(160), now=0)

    assert selection.worker == A
    assert [candidate.worker for candidate, _ in selection.excluded] == [C]


def test_cold_prompts_spread_under_the_guard() -> None:
    made = router(A, B, C, D, guard=GUARD)

    for number in range(40):
        blocks = PromptBlocks.of_local(range(1_000 * (number + 1), 1_000 * (number + 1) + 4), BLOCK_SIZE)
        query = RoutingQuery(model="m", prompt_tokens=64, block_hashes={BLOCK_SIZE: blocks})
        made.reserve(AttemptKey(RequestId(str(number)), 1), query, now=0)

    assert [snapshot.reservations for snapshot in made.workers(now=0)] == [10, 10, 10, 10]
