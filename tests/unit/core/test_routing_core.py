import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvmesh.core.approximate_index import ApproximateIndex
from kvmesh.core.candidates import Candidate, CostOverrides, RoutingHints, RoutingQuery, Scored, Selection
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.errors import BackOffError, ConflictError, FixRequestError, NotKnownError, Reason, TryElsewhereError
from kvmesh.core.hashing import sequence_hashes
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, WorkerId, WorkerRank
from kvmesh.core.index_port import IndexMode
from kvmesh.core.load_report import LoadReport, ReportOutcome, RouterLoad
from kvmesh.core.policies.kv_aware import CostKnobs, KvAware
from kvmesh.core.policies.policy import Policy
from kvmesh.core.policies.prompt_similarity import PromptSimilarity
from kvmesh.core.policies.round_robin import RoundRobin
from kvmesh.core.prefix_index import StoreResult
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.remote_prefill import RemotePrefillReason, RemotePrefillRules
from kvmesh.core.roster import RosterOutcome, WorkerRecord, WorkerRole
from kvmesh.core.routing import RoutingCore, RoutingRules

A, B, C = (WorkerRank(WorkerId(f"n/decode/{name}")) for name in "abc")
P = WorkerRank(WorkerId("n/prefill/0"))
EPOCH = Epoch(7)
US = RouterId("router-1")


def key(number: int, attempt: int = 1) -> AttemptKey:
    return AttemptKey(RequestId(f"r{number}"), attempt)


def record(worker: WorkerRank, epoch: Epoch = EPOCH, **changes: Any) -> WorkerRecord:
    made = WorkerRecord(worker_id=worker.worker_id, epoch=epoch, models=("m",), block_size=16)
    return replace(made, **changes)


def core(
    *workers: WorkerRank, policy: Policy | None = None, rules: RoutingRules | None = None, seed: int = 1
) -> RoutingCore:
    made = RoutingCore(US, policy=policy or KvAware(), rng=random.Random(seed), rules=rules)
    for worker in workers:
        made.put_worker(record(worker), now=0)
    return made


def query(tokens: int = 64, *, start: int = 0, text: str | None = None, model: str = "m", **hints: Any) -> RoutingQuery:
    """A prompt of which every block of 16 tokens has a hash; another `start` is another prompt."""
    hashes = sequence_hashes(range(start, start + tokens // 16))
    return RoutingQuery(
        model=model,
        prompt_tokens=tokens,
        block_hashes={16: hashes},
        prompt_text=text,
        hints=RoutingHints(**hints),
    )


def report(sequence: int, *, epoch: Epoch = EPOCH, at: float = 0, shows: Sequence[int] = (), **load: int) -> LoadReport:
    return LoadReport(
        epoch=epoch,
        sequence=sequence,
        received_at=at,
        unrouted=RouterLoad(**load),
        reservation_ids=frozenset(shows),
    )


def hold(router: RoutingCore, worker: WorkerRank, asked: RoutingQuery, blocks: int | None = None) -> None:
    """Let a worker have cached the first blocks of a prompt."""
    hashes = asked.block_hashes[16][:blocks]
    router.apply_kv_stored(worker, EPOCH, parent=None, block_hashes=hashes, now=0)


def potential(router: RoutingCore, asked: RoutingQuery) -> dict[WorkerRank, tuple[int, int]]:
    return {load.worker: (load.prefill_tokens, load.decode_blocks) for load in router.potential_loads(asked, now=1)}


# --- choosing and booking ---------------------------------------------------------------------------------------------


def test_one_prompt_reserved_four_times_spreads_and_its_blocks_are_counted_once() -> None:
    router = core(A, B, C)

    picks = [router.reserve(key(number), query(), now=1).worker for number in range(4)]

    assert set(picks[:3]) == {A, B, C}
    loads = potential(router, query())
    assert sorted(prefill for prefill, _ in loads.values()) == [128, 128, 192]
    assert {decode for _, decode in loads.values()} == {4}
    for number in range(4):
        router.report_progress(key(number), prefill_complete=True, now=1)
    assert set(potential(router, query()).values()) == {(64, 4)}
    assert {snapshot.load.prefill_tokens for snapshot in router.workers(now=1)} == {0}
    for number in range(4):
        router.release(key(number), now=1)
    assert {snapshot.load for snapshot in router.workers(now=1)} == {RouterLoad()}


def test_warm_worker_is_chosen_and_only_what_it_lacks_is_booked() -> None:
    router = core(A, B)
    hold(router, B, query(), blocks=3)

    reservation = router.reserve(key(1), query(), now=1)

    assert reservation.worker == B
    assert reservation.epoch == EPOCH
    assert reservation.overlap_blocks == 3
    assert reservation.selection.cost == 4 - 3 + 4
    assert router.workers(now=1)[1].load == RouterLoad(1, 16, 4)


def test_overlap_never_covers_the_whole_prompt() -> None:
    router = core(A)
    hold(router, A, query(64))

    exact, longer = router.select(query(64), now=1), router.select(replace(query(64), prompt_tokens=65), now=1)

    assert (exact.overlap_blocks, longer.overlap_blocks) == (3, 4)
    assert router.overlaps(query(64)) == {A: 4}


def test_blocks_active_by_bookings_are_not_counted_again() -> None:
    router = core(A)
    router.reserve(key(1), query(64), now=1)

    selection = router.select(query(96), now=1)

    assert (selection.candidates[0].active_blocks, selection.candidates[0].new_blocks) == (4, 2)
    assert selection.candidates[0].decode_blocks == 6


@pytest.mark.parametrize("identity", [{"lora": "adapter-a"}, {"cache_namespace": "tenant-a"}])
def test_same_tokens_under_another_lora_or_namespace_share_nothing(identity: dict[str, Any]) -> None:
    router = core(A, B)
    tokens = np.arange(64, dtype=np.uint32)
    plain, other = PromptBlocks.of_tokens(tokens, 16), PromptBlocks.of_tokens(tokens, 16, **identity)
    for worker, blocks in ((A, plain), (B, other)):
        router.apply_kv_stored(worker, EPOCH, parent=None, block_hashes=blocks, local_hashes=blocks.local, now=0)

    selections = [router.select(replace(query(), block_hashes={16: blocks}), now=1) for blocks in (plain, other)]

    assert [(selection.worker, selection.overlap_blocks) for selection in selections] == [(A, 3), (B, 3)]


def test_worker_of_another_block_size_is_cold_and_counts_its_own_blocks() -> None:
    router = core(A)
    router.put_worker(record(B, block_size=32), now=0)

    selection = router.select(query(64), now=1)

    assert {each.worker: each.new_blocks for each in selection.candidates} == {A: 4, B: 2}
    assert router.block_sizes("m") == {16, 32}


def test_select_books_nothing() -> None:
    router = core(A, policy=PromptSimilarity())

    selection = router.select(query(text="x", session_id="s"), now=1)

    assert selection.worker == A
    assert router.workers(now=1)[0].load == RouterLoad()
    assert router.select(query(text="x"), now=1).note == "first without a prompt"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_same_seed_gives_the_same_picks_whatever_the_order_of_arrival(temperature: float) -> None:
    asked = [
        query(64, start=7 * (number % 3), overrides=CostOverrides(temperature=temperature)) for number in range(12)
    ]
    orders = [[A, B, C], [C, A, B], [B, C, A]]
    picks = []

    for order in orders:
        router = core(*order, seed=42)
        for worker in order:
            router.apply_load(worker, report(1), now=1)
            hold(router, worker, asked[0], blocks=1 + (worker == B))
        picks.append([router.reserve(key(number), each, now=1).worker for number, each in enumerate(asked)])

    assert picks[0] == picks[1] == picks[2]
    assert len(set(picks[0])) > 1


def test_decision_can_be_taken_again_from_its_explanation() -> None:
    policy = KvAware(CostKnobs(temperature=5.0))
    router = core(A, B, C, policy=policy)

    for number in range(20):
        selection = router.reserve(key(number), query(start=number), now=1).selection
        assert selection.query is not None
        again = policy.select(selection.query, selection.candidates, random.Random(selection.seed))

        assert again.worker == selection.worker


# --- idempotency ------------------------------------------------------------------------------------------------------


def test_same_reserve_again_gets_the_same_answer_and_books_once() -> None:
    router = core(A, B, C)

    first = router.reserve(key(1), query(), now=1)
    again = [router.reserve(key(1), query(), now=2) for _ in range(5)]

    assert again == [first] * 5
    assert sum(snapshot.reservations for snapshot in router.workers(now=2)) == 1


def test_same_reserve_again_is_the_same_after_a_worker_of_another_block_size_came() -> None:
    router = core(A)
    first = router.reserve(key(1), query(), now=1)
    rehashed = replace(query(), block_hashes={16: query().block_hashes[16], 32: sequence_hashes([8, 9])})

    again = router.reserve(key(1), rehashed, now=2)

    assert again == first


@pytest.mark.parametrize(
    "other",
    [query(80), query(64, start=1), query(text="x"), query(session_id="s"), replace(query(), expected_output_tokens=9)],
)
def test_same_key_with_other_content_conflicts_and_changes_nothing(other: RoutingQuery) -> None:
    router = core(A)
    router.reserve(key(1), query(), now=1)
    before = router.workers(now=1)

    with pytest.raises(ConflictError) as caught:
        router.reserve(key(1), other, now=1)

    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert router.workers(now=1) == before


def test_key_of_an_ended_booking_is_refused_and_the_next_attempt_is_free() -> None:
    router = core(A)
    router.reserve(key(1), query(), now=1)
    router.release(key(1), now=1)

    with pytest.raises(ConflictError):
        router.reserve(key(1), query(), now=2)

    assert router.reserve(key(1, attempt=2), query(), now=2).worker == A


def test_key_of_an_ended_booking_is_refused_before_anybody_is_chosen() -> None:
    router = core(A)
    router.reserve(key(1), query(), now=1)
    router.release(key(1), now=1)
    router.remove_worker(A.worker_id, EPOCH, now=1)

    with pytest.raises(ConflictError):
        router.reserve(key(1), query(), now=2)


@pytest.mark.parametrize("restarts", [True, False])
def test_answer_of_a_dead_incarnation_is_not_given_again(*, restarts: bool) -> None:
    router = core(A, B)
    hold(router, A, query())
    router.reserve(key(1), query(), now=1)
    if restarts:
        router.put_worker(record(A, Epoch(8)), now=2)
    else:
        router.remove_worker(A.worker_id, EPOCH, now=2)

    with pytest.raises(ConflictError) as caught:
        router.reserve(key(1), query(), now=2)

    assert caught.value.reason is Reason.ALREADY_EXISTS


def test_release_is_idempotent_and_an_unknown_key_is_not_found() -> None:
    router = core(A)
    router.reserve(key(1), query(), now=1)

    outcomes = [router.release(key(1), now=now) for now in (2, 3, 302)]

    assert outcomes == [True, False, False]
    for act in (
        lambda: router.release(key(1), now=302.1),
        lambda: router.release(key(2), now=3),
        lambda: router.report_progress(key(2), prefill_complete=True, now=3),
    ):
        with pytest.raises(NotKnownError) as caught:
            act()
        assert caught.value.reason is Reason.NOT_FOUND


def test_progress_moves_the_booked_load() -> None:
    router = core(A)
    router.reserve(key(1), query(), now=1)
    loads = []

    for progress in ({}, {"output_blocks": 2}, {"prefill_complete": True}, {"prefill_complete": True}):
        router.report_progress(key(1), now=1, **progress)
        loads.append(router.workers(now=1)[0].load)

    assert loads == [RouterLoad(1, 64, 4), RouterLoad(1, 64, 6), RouterLoad(1, 0, 6), RouterLoad(1, 0, 6)]


def test_output_of_a_request_of_known_length_counts_for_less_towards_its_end() -> None:
    router = core(A)
    router.reserve(key(1), replace(query(), expected_output_tokens=64), now=1)
    blocks = []

    for _ in range(4):
        router.report_progress(key(1), output_blocks=1, now=1)
        blocks.append(router.workers(now=1)[0].load.decode_blocks)

    assert blocks == [5, 6, 6, 6]  # 4 of the prompt, and 0.75, 1.25, 1.5 and 1.5, rounded up


def test_booking_that_reports_miss_is_ended_and_its_answer_forgotten() -> None:
    router = core(A)
    router.reserve(key(1), query(), now=1)
    router.report_progress(key(1), accepted_load_sequence=5, now=1)

    result = router.apply_load(A, report(6), now=2)

    assert result.released == (key(1),)
    assert router.workers(now=2)[0].load == RouterLoad()
    with pytest.raises(ConflictError):
        router.reserve(key(1), query(), now=2)


def test_booking_expires_when_no_report_shows_it() -> None:
    router = core(A)
    first = router.reserve(key(1), query(), now=0)
    router.reserve(key(2), query(), now=0)
    router.apply_load(A, report(1, at=20, shows=[first.reservation_id]), now=20)

    assert router.expire(now=30) == (key(2),)
    assert router.expire(now=50) == (key(1),)
    assert router.release(key(1), now=51) is False


# --- who may be chosen ------------------------------------------------------------------------------------------------


def test_overloaded_worker_is_skipped_whatever_it_has_cached() -> None:
    router = core(A, B, rules=RoutingRules(overload=OverloadRules(max_waiting_requests=2)))
    hold(router, A, query())
    router.apply_load(A, replace(report(1), waiting_requests=3), now=1)

    selection = router.select(query(), now=1)

    assert selection.worker == B
    assert [(each.worker, why) for each, why in selection.excluded] == [(A, "overloaded: 3 requests wait inside it")]


@pytest.mark.parametrize("pinned", [None, A.worker_id])
def test_all_or_the_pinned_worker_overloaded_is_an_error_at_once(pinned: WorkerId | None) -> None:
    router = core(A, B, rules=RoutingRules(overload=OverloadRules(max_requests_per_slot=1.0)))
    router.apply_load(A, replace(report(1, active_requests=4), max_requests=4), now=1)
    if pinned is None:
        router.apply_load(B, replace(report(1, active_requests=2), max_requests=2), now=1)

    with pytest.raises(BackOffError) as caught:
        router.reserve(key(1), query(pinned_worker=pinned), now=1)

    assert caught.value.reason is Reason.OVERLOADED
    assert sum(snapshot.reservations for snapshot in router.workers(now=1)) == 0
    with pytest.raises(NotKnownError):
        router.release(key(1), now=1)


def test_own_bookings_overload_a_worker_before_it_reports_them() -> None:
    router = core(A, rules=RoutingRules(overload=OverloadRules(max_block_usage=1.0)))
    router.put_worker(record(A, total_blocks=6), now=0)
    router.reserve(key(1), query(64), now=1)

    with pytest.raises(BackOffError, match="8 of 6 blocks active"):
        router.reserve(key(2), query(64, start=9), now=1)

    assert router.reserve(key(3), query(96), now=1).worker == A


def test_missing_label_is_named() -> None:
    router = core(A)

    with pytest.raises(TryElsewhereError, match="zone=west") as caught:
        router.select(query(required_labels={"zone": "west"}), now=1)

    assert caught.value.reason is Reason.NO_MATCHING_WORKER


def test_no_worker_and_unknown_model_are_told_apart() -> None:
    empty, router = core(), core(A)
    router.put_worker(record(P, role=WorkerRole.PREFILL, models=("n",)), now=0)

    for asked_of, asked, error, reason in (
        (empty, query(), TryElsewhereError, Reason.NO_WORKERS),
        (router, query(model="z"), NotKnownError, Reason.UNKNOWN_MODEL),
        (router, query(model="n"), TryElsewhereError, Reason.NO_WORKERS),
    ):
        with pytest.raises(error) as caught:
            asked_of.select(asked, now=1)
        assert caught.value.reason is reason


def test_only_candidates_of_the_asked_role_are_scored() -> None:
    router = core(A)
    router.put_worker(record(P, role=WorkerRole.PREFILL), now=0)

    picks = {
        role: router.select(replace(query(), role=role), now=1) for role in (WorkerRole.DECODE, WorkerRole.PREFILL)
    }

    assert {role: [each.worker for each in pick.candidates] for role, pick in picks.items()} == {
        WorkerRole.DECODE: [A],
        WorkerRole.PREFILL: [P],
    }


def test_stale_worker_gets_nothing_until_it_reports_again() -> None:
    router = core(A, B, C)
    hold(router, A, query())
    for worker in (B, C):
        router.apply_load(worker, report(1, at=3), now=3)

    stale = router.select(query(), now=3.5)
    router.apply_load(A, report(1, at=4), now=4)
    fresh = router.select(query(), now=4)

    assert stale.worker in (B, C)
    assert not stale.is_staleness_ignored
    assert [why for _, why in stale.excluded] == ["stale: 3.5 s old"]
    assert fresh.worker == A


def test_staleness_of_most_workers_is_our_fault_and_ignored() -> None:
    router = core(A, B, C)
    hold(router, A, query())
    router.apply_load(C, report(1, at=3), now=3)

    selection = router.select(query(), now=3.5)

    assert selection.worker == A
    assert selection.is_staleness_ignored
    assert [(each.worker, each.is_stale, each.is_saturated) for each in selection.candidates] == [
        (A, True, False),
        (B, True, False),
        (C, False, False),
    ]


def test_staleness_counts_while_just_half_of_a_role_is_stale_whoever_serves_the_model() -> None:
    router = core(A, B)
    router.put_worker(record(C, models=("n",)), now=0)
    router.put_worker(record(WorkerRank(WorkerId("n/decode/d")), models=("n",)), now=3)
    router.apply_load(B, report(1, at=3), now=3)

    half = router.select(query(), now=3.5)
    router.apply_load(C, report(1, at=4), now=4)
    fewer = router.select(query(), now=4.5)
    most = router.select(query(), now=6.5)

    assert [half.worker, fewer.worker] == [B, B]
    assert [each.is_staleness_ignored for each in (half, fewer, most)] == [False, False, True]


def test_degraded_index_counts_for_nothing_until_it_is_reset() -> None:
    router = core(A, B)
    hold(router, A, query())

    router.degrade_worker_index(A, EPOCH)
    degraded = router.overlaps(query())
    router.reset_worker_index(A, EPOCH, now=1)
    hold(router, A, query(), blocks=2)

    assert degraded == {A: 0, B: 0}
    assert router.overlaps(query()) == {A: 2, B: 0}
    assert not any(snapshot.is_index_degraded for snapshot in router.workers(now=1))


def test_session_stays_on_its_worker_while_that_may_be_chosen() -> None:
    router = core(A, B, C)
    home = router.reserve(key(1), query(session_id="s"), now=1).worker

    later = [router.reserve(key(2 + n), query(start=50 + 9 * n, session_id="s"), now=1).worker for n in range(4)]
    router.remove_worker(home.worker_id, EPOCH, now=2)
    moved = [router.reserve(key(9 + n), query(start=99, session_id="s"), now=2).worker for n in range(3)]

    assert later == [home] * 4
    assert len(set(moved)) == 1
    assert moved[0] != home


def test_session_is_free_again_some_time_after_its_last_booking() -> None:
    router = core(A, B, rules=RoutingRules(session_ttl_s=10))
    hold(router, B, query())
    router.reserve(key(1), query(session_id="s", pinned_worker=A.worker_id), now=1)

    picks = [router.select(query(session_id="s"), now=now).worker for now in (11, 11.5)]

    assert picks == [A, B]


def test_sessions_are_bounded_and_of_one_model_and_role() -> None:
    router = core(A, B, rules=RoutingRules(max_sessions=1))
    router.put_worker(record(P, role=WorkerRole.PREFILL), now=0)
    asked = query(session_id="s", pinned_worker=A.worker_id)
    router.reserve(key(1), asked, now=1)
    held = router.select(query(session_id="s", overrides=CostOverrides(request_weight=99)), now=1)

    router.reserve(key(2), replace(query(session_id="s"), role=WorkerRole.PREFILL), now=1)
    forgotten = router.select(query(session_id="s", overrides=CostOverrides(request_weight=99)), now=1)

    assert held.worker == A
    assert forgotten.worker == B


# --- workers come and go ----------------------------------------------------------------------------------------------


def test_restart_voids_what_was_known_of_the_incarnation_before() -> None:
    router = core(A)
    hold(router, A, query())
    router.apply_load(A, report(900, active_requests=3), now=1)
    router.degrade_worker_index(A, EPOCH)
    router.reserve(key(1), query(), now=1)

    change = router.put_worker(record(A, Epoch(8)), now=2)

    assert (change.outcome, change.released) == (RosterOutcome.RESTARTED, (key(1),))
    snapshot = router.workers(now=2)[0]
    assert (snapshot.load, snapshot.report, snapshot.load_age_s, snapshot.index_age_s) == (RouterLoad(), None, 0, None)
    assert (snapshot.indexed_blocks, snapshot.reservations, snapshot.is_index_degraded) == (0, 0, False)
    assert router.overlaps(query()) == {A: 0}
    assert router.release(key(1), now=2) is False


def test_word_of_an_incarnation_that_is_not_live_changes_nothing() -> None:
    router = core(A)
    hold(router, A, query(), blocks=2)
    before = router.workers(now=1)
    old, hashes = Epoch(6), query().block_hashes[16]

    answers = [
        router.put_worker(record(A, old), now=1).outcome,
        router.remove_worker(A.worker_id, old, now=1).outcome,
        router.apply_load(A, report(1, epoch=old), now=1).outcome,
        router.apply_load(B, report(1), now=1).outcome,
        router.apply_kv_stored(A, old, parent=None, block_hashes=hashes, now=1),
        router.apply_kv_removed(A, old, block_hashes=hashes, now=1),
        router.apply_kv_cleared(A, old, now=1),
        router.reset_worker_index(A, old, now=1),
        router.degrade_worker_index(A, old),
        router.degrade_worker_index(WorkerRank(A.worker_id, 1), EPOCH),
    ]

    assert answers == [
        RosterOutcome.STALE_EPOCH,
        RosterOutcome.STALE_EPOCH,
        ReportOutcome.STALE_EPOCH,
        ReportOutcome.UNKNOWN_WORKER,
        None,
        False,
        False,
        False,
        False,
        False,
    ]
    assert router.workers(now=1) == before


def test_removed_worker_is_gone_with_its_bookings() -> None:
    router = core(A, B)
    hold(router, A, query())
    router.reserve(key(1), query(), now=1)

    change = router.remove_worker(A.worker_id, EPOCH, now=1)

    assert (change.outcome, change.released) == (RosterOutcome.REMOVED, (key(1),))
    assert [snapshot.worker for snapshot in router.workers(now=1)] == [B]
    assert tuple(router.dump_index()) == ()
    assert router.record(A.worker_id) is None
    assert router.reserve(key(1, attempt=2), query(), now=1).worker == B


def test_draining_keeps_the_bookings_and_takes_no_more() -> None:
    router = core(A, B)
    hold(router, A, query())
    router.reserve(key(1), query(), now=1)

    change = router.put_worker(record(A, draining=True), now=1)

    assert (change.outcome, change.released) == (RosterOutcome.UPDATED, ())
    assert router.workers(now=1)[0].reservations == 1
    assert router.select(query(), now=1).worker == B


def test_indexed_blocks_follow_the_events() -> None:
    router = core(A)
    hashes = query().block_hashes[16]
    counts = []

    for outcome in (
        router.apply_kv_stored(A, EPOCH, parent=None, block_hashes=hashes[:3], now=1),
        router.apply_kv_stored(A, EPOCH, parent=hashes[2], block_hashes=hashes[3:], now=1),
        router.apply_kv_stored(A, EPOCH, parent=None, block_hashes=hashes, now=1),
    ):
        assert outcome is not None
        assert outcome.result is StoreResult.STORED
        counts.append(outcome.stored)
    router.apply_kv_removed(A, EPOCH, block_hashes=hashes[2:], now=2)

    assert counts == [3, 1, 0]
    snapshot = router.workers(now=5)[0]
    assert (snapshot.indexed_blocks, snapshot.index_age_s) == (2, 3)
    assert [(held.parent, held.block_hash) for held in router.dump_index(A.worker_id)] == [
        (None, hashes[0]),
        (hashes[0], hashes[1]),
    ]
    assert tuple(router.dump_index(B.worker_id)) == ()
    assert router.index_stats.pairs == 2
    router.apply_kv_cleared(A, EPOCH, now=6)
    assert router.workers(now=6)[0].indexed_blocks == 0


def test_ranks_are_candidates_of_their_own() -> None:
    router = core()
    router.put_worker(record(A, ranks=3), now=0)
    second = WorkerRank(A.worker_id, 1)
    hold(router, second, query())

    selection = router.select(query(), now=1)

    assert selection.worker == second
    assert len(selection.candidates) == 3


def test_a_queue_is_no_worker_to_route_to() -> None:
    router = core(A)
    router.put_worker(record(P, role=WorkerRole.QUEUE), now=0)

    assert [snapshot.worker for snapshot in router.workers(now=1)] == [A]
    assert router.block_sizes("m") == {16}


# --- where knowledge of caches comes from ----------------------------------------------------------------------------


def test_with_the_index_off_overlap_is_0_everywhere() -> None:
    router = core(A, B, rules=RoutingRules(index_mode=IndexMode.OFF))
    hold(router, A, query())
    router.reserve(key(1), query(), now=1)

    assert router.overlaps(query()) == {A: 0, B: 0}
    assert router.select(query(), now=1).overlap_blocks == 0
    assert (tuple(router.dump_index()), router.index_stats.pairs) == ((), 0)


def test_approximate_index_knows_what_was_booked_until_that_is_too_old() -> None:
    router = RoutingCore(US, policy=KvAware(), rng=random.Random(1), index=ApproximateIndex(ttl_s=100))
    for worker in (A, B):
        router.put_worker(record(worker), now=0)
    hold(router, B, query())

    router.select(query(), now=1)
    before = router.overlaps(query())
    home = router.reserve(key(1), query(pinned_worker=A.worker_id), now=1)
    router.release(key(1), now=2)
    after, again = router.overlaps(query()), router.select(query(), now=2)
    router.expire(now=102)

    assert home.overlap_blocks == 0
    assert (before, after) == ({A: 0, B: 0}, {A: 4, B: 0})
    assert (again.worker, again.overlap_blocks) == (A, 3)
    assert router.overlaps(query()) == {A: 0, B: 0}


def test_approximate_index_forgets_a_worker_that_is_gone() -> None:
    router = core(A, rules=RoutingRules(index_mode=IndexMode.APPROXIMATE))
    router.reserve(key(1), query(), now=1)

    router.put_worker(record(A, Epoch(8)), now=2)

    assert router.overlaps(query()) == {A: 0}


# --- what is measured -------------------------------------------------------------------------------------------------


def test_every_stage_of_a_decision_is_measured_when_there_is_a_timer() -> None:
    seen: list[tuple[str, float]] = []
    ticks = iter([10.0, 11.0, 13.0, 17.0, 18.0])
    router = RoutingCore(
        US,
        policy=KvAware(),
        rng=random.Random(1),
        timer=lambda: next(ticks),
        observe_stages=lambda stage, seconds: seen.append((stage, seconds)),
    )
    router.put_worker(record(A), now=0)

    router.reserve(key(1), query(), now=1)

    assert seen == [("match", 1.0), ("load", 2.0), ("select", 4.0), ("total", 8.0)]


# --- the estimate of a remote prefill ---------------------------------------------------------------------------------

REMOTE = RoutingRules(remote_prefill=RemotePrefillRules(min_uncached_tokens=32))


@pytest.mark.parametrize(
    ("cached", "prefill", "reason", "booked_tokens"),
    [
        pytest.param(0, {}, RemotePrefillReason.REMOTE, 0, id="cold"),
        pytest.param(2, {}, RemotePrefillReason.REMOTE, 0, id="at the threshold"),
        pytest.param(3, {}, RemotePrefillReason.FEW_UNCACHED_TOKENS, 16, id="mostly cached"),
        pytest.param(0, {"draining": True}, RemotePrefillReason.NO_CAPABLE_WORKER, 64, id="it drains"),
        pytest.param(0, {"block_size": 32}, RemotePrefillReason.NO_CAPABLE_WORKER, 64, id="other block size"),
        pytest.param(0, {"models": ("n",)}, RemotePrefillReason.NO_CAPABLE_WORKER, 64, id="other model"),
        pytest.param(0, None, RemotePrefillReason.NO_CAPABLE_WORKER, 64, id="none"),
    ],
)
def test_prefill_that_will_run_elsewhere_is_not_booked(
    cached: int, prefill: Mapping[str, Any] | None, reason: RemotePrefillReason, booked_tokens: int
) -> None:
    router = core(A, rules=REMOTE)
    if prefill is not None:
        router.put_worker(record(P, role=WorkerRole.PREFILL, **prefill), now=0)
    hold(router, A, query(), blocks=cached)

    selection = router.reserve(key(1), query(), now=1).selection

    assert selection.remote_prefill is not None
    assert selection.remote_prefill.reason is reason
    assert router.workers(now=1)[0].load == RouterLoad(1, booked_tokens, 4)


def test_without_a_rule_there_is_no_estimate() -> None:
    router = core(A)
    router.put_worker(record(P, role=WorkerRole.PREFILL), now=0)

    assert router.select(query(), now=1).remote_prefill is None


# --- any policy -------------------------------------------------------------------------------------------------------


class Custom:
    """A policy that answers, learns and forgets as told, an exception being raised."""

    def __init__(self, answer: object, *, fault: Exception | None = None) -> None:
        self._answer = answer
        self._fault = fault

    def select(self, query: RoutingQuery, candidates: Sequence[object], rng: random.Random) -> Selection | WorkerRank:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer  # type: ignore[return-value]  # anything may come from outside

    def booked(self, query: RoutingQuery, worker: WorkerRank) -> None:
        if self._fault:
            raise self._fault

    def forget_worker(self, worker_id: WorkerId) -> None:
        if self._fault:
            raise self._fault


def test_policy_may_answer_with_a_bare_worker() -> None:
    router = core(A, B, policy=Custom(B))

    selection = router.select(query(), now=1)

    assert (selection.worker, selection.policy, selection.cost, selection.fallback) == (B, "Custom", None, "")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        pytest.param(ZeroDivisionError("oops"), "Custom raised ZeroDivisionError('oops')", id="raises"),
        pytest.param(SystemExit("bye"), "Custom raised SystemExit('bye')", id="exits"),
        pytest.param(FixRequestError(Reason.INVALID_FIELD, "no"), "Custom raised FixRequestError", id="refuses"),
        pytest.param(C, "which is no candidate", id="names a stranger"),
        pytest.param(None, "named None, which is no candidate", id="names nobody"),
        pytest.param("n/decode/a", "which is no candidate", id="names a string"),
        pytest.param(
            Selection(worker=A, policy="x", scores=(None,)),  # type: ignore[arg-type]  # on purpose
            "Custom raised AttributeError",
            id="scores that cannot be read",
        ),
        pytest.param(
            Selection(worker=A, policy="x", scores=(Scored(A, 1.0), Scored(B, math.nan))),
            f"Custom gave {B.worker_id} a cost of nan",
            id="a cost that nothing compares with",
        ),
    ],
)
def test_policy_that_fails_is_replaced_by_the_least_cost_and_that_is_said(answer: object, why: str) -> None:
    router = core(A, B, policy=Custom(answer))
    hold(router, B, query())

    reservation = router.reserve(key(1), query(), now=1)

    assert reservation.worker == B
    assert why in reservation.selection.fallback
    assert reservation.selection.policy == "kv_aware"


def test_policy_may_leave_the_choice_among_some_to_another() -> None:
    class AllButTheFirst:
        def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
            return KvAware().select(query, candidates[1:], rng)

    router = core(A, B, C, policy=AllButTheFirst())
    hold(router, C, query(), blocks=3)

    selection = router.select(query(), now=1)

    assert (selection.worker, selection.cost, selection.overlap_blocks) == (C, 4 - 3 + 4, 3)
    assert [(verdict.candidate.worker, verdict.cost) for verdict in selection.explain()] == [(C, 5), (B, 8), (A, None)]


def test_policy_that_fails_to_learn_or_forget_breaks_nothing() -> None:
    router = core(A, policy=Custom(A, fault=RuntimeError("full")))

    reservation = router.reserve(key(1), query(), now=1)
    change = router.remove_worker(A.worker_id, EPOCH, now=1)

    assert reservation.selection.note == "booked raised RuntimeError('full')"
    assert change.policy_fault == "forget_worker raised RuntimeError('full')"
    assert change.released == (key(1),)


def test_facts_of_a_selection_are_the_routers_whatever_the_policy_claims() -> None:
    claimed = Selection(worker=A, policy="x", epoch=Epoch(99), overlap_blocks=99, cost=-1, scores=(Scored(A, 2.5),))
    router = core(A, policy=Custom(claimed))

    selection = router.select(query(), now=1)

    assert (selection.epoch, selection.overlap_blocks, selection.cost) == (EPOCH, 0, 2.5)


def test_similar_prompts_land_together_and_a_dead_workers_prompts_are_forgotten() -> None:
    router = core(A, B, policy=PromptSimilarity())
    prompts = [
        "Tell me a joke",
        "Which team won 2020 World Series",
        "Tell me a fact",
        "This is prefill disagg serving example",
    ]

    landed = [router.reserve(key(number), query(text=text), now=1).worker for number, text in enumerate(prompts)]
    router.remove_worker(A.worker_id, EPOCH, now=2)
    alone = router.reserve(key(8), query(text="Tell me a fact"), now=2).worker
    router.put_worker(record(A, Epoch(8)), now=3)
    back = router.reserve(key(9), query(text="Tell me a fact"), now=3)

    assert landed == [A, B, A, A]
    assert alone == B
    assert (back.worker, back.selection.note) == (A, "first without a prompt")


def test_round_robin_turns_with_each_booking_and_not_with_each_question() -> None:
    router = core(A, B, C, policy=RoundRobin())

    picks = []
    for number in range(4):
        router.select(query(), now=1)
        picks.append(router.reserve(key(number), query(), now=1).worker)

    assert picks == [A, B, C, A]


# --- explanations -----------------------------------------------------------------------------------------------------


def test_explanation_of_a_booking_shows_everybody() -> None:
    router = core(A, B, C)
    router.put_worker(record(C, draining=True), now=0)
    hold(router, B, query())
    router.reserve(key(1), query(), now=1)

    selection = router.explain(key(1))

    assert [(verdict.candidate.worker, verdict.cost, verdict.lost) for verdict in selection.explain()] == [
        (B, 5.0, ""),
        (A, 8.0, "cost 8 is above 5"),
    ]
    assert [(candidate.worker, why) for candidate, why in selection.excluded] == [(C, "draining")]


def test_latest_explanations_are_kept_within_their_bound() -> None:
    router = core(A, B, rules=RoutingRules(max_explained=4))

    for number in range(3):
        router.reserve(key(number), query(), now=1)

    with pytest.raises(NotKnownError) as caught:
        router.explain(key(0))
    assert caught.value.reason is Reason.NOT_FOUND
    assert [len(router.explain(key(number)).candidates) for number in (1, 2)] == [2, 2]


def test_long_prompts_count_towards_the_bound() -> None:
    router = core(A, rules=RoutingRules(max_explained=10))

    for number in range(2):
        router.reserve(key(number), query(16 * 16 * 8), now=1)

    with pytest.raises(NotKnownError):
        router.explain(key(0))
    assert router.explain(key(1)).worker == A


def test_explanations_stay_bounded_when_a_key_is_booked_anew_long_after() -> None:
    router = core(A, rules=RoutingRules(max_explained=2))

    for turn in range(5):
        router.reserve(key(1), query(start=turn), now=1_000 * turn)
        router.release(key(1), now=1_000 * turn)

    assert router.explain(key(1)).query == query(start=4)
    router.reserve(key(2), query(), now=5_000)
    assert router.explain(key(1)).query == query(start=4)
