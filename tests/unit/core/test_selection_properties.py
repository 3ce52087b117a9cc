"""Random fleets, loads, caches and hints: the choice on columns is the one that objects, one by one, would give."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.core.candidates import Candidate, CostOverrides, RoutingHints, RoutingQuery
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.errors import MeshError, Reason
from kvmesh.core.hashing import sequence_hashes
from kvmesh.core.ids import AttemptKey, Epoch, LocalHash, RequestId, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.load_report import LoadReport, RouterLoad
from kvmesh.core.policies.cost_choice import ImbalanceGuard
from kvmesh.core.policies.kv_aware import CostKnobs, KvAware
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore, RoutingRules

NAMES = tuple("abcde")
EPOCH = Epoch(7)
STALE_AFTER_S = 3.0
NOW = 10.0
LABELS = st.dictionaries(st.sampled_from("xy"), st.sampled_from("12"), max_size=2)


@dataclass(frozen=True)
class Booked:
    """One booking and where it went."""

    worker: WorkerRank
    path: tuple[int, ...]
    prompt_tokens: int


@dataclass
class Fleet:
    """All that was ever told to the router, and nothing worked out of it."""

    records: dict[WorkerId, WorkerRecord] = field(default_factory=dict)
    reports: dict[WorkerRank, LoadReport] = field(default_factory=dict)
    cached: dict[WorkerRank, tuple[int, ...]] = field(default_factory=dict)
    degraded: set[WorkerRank] = field(default_factory=set)
    bookings: list[Booked] = field(default_factory=list)


RECORDS = st.builds(
    WorkerRecord,
    worker_id=st.sampled_from(NAMES).map(WorkerId),
    epoch=st.just(EPOCH),
    models=st.sampled_from([("m",), ("m",), ("m", "n"), ("n",)]),
    block_size=st.sampled_from([4, 4, 8]),
    total_blocks=st.sampled_from([0, 12, 30]),
    max_requests=st.sampled_from([0, 1, 4]),
    labels=LABELS,
    ranks=st.integers(1, 3),
    draining=st.sampled_from([False, False, False, True]),
)
REPORTS = st.builds(
    LoadReport,
    epoch=st.just(EPOCH),
    sequence=st.just(1),
    received_at=st.sampled_from([NOW, NOW, NOW - STALE_AFTER_S, NOW - 4]),
    unrouted=st.builds(RouterLoad, st.integers(0, 4), st.integers(0, 90), st.integers(0, 9)),
    total_blocks=st.sampled_from([0, 20]),
    max_requests=st.sampled_from([0, 2]),
    waiting_requests=st.integers(0, 3),
)
PATHS = st.lists(st.sampled_from([0, 0, 1]), max_size=6).map(tuple)
"""Local hashes of a prompt's blocks; a narrow tree, so that prompts share prefixes."""
WORKER_IDS = st.frozensets(st.sampled_from(NAMES).map(WorkerId), max_size=3)
OVERRIDES = st.builds(
    CostOverrides,
    overlap_credit=st.sampled_from([None, 0.0, 1.0, 1.5]),
    prefill_scale=st.sampled_from([None, 1.0, 2.25]),
    request_weight=st.sampled_from([None, 0.0, 3.1]),
)
HINTS = st.one_of(
    st.just(RoutingHints()),
    st.builds(
        RoutingHints,
        pinned_worker=st.one_of(st.none(), st.none(), st.sampled_from(NAMES).map(WorkerId)),
        pinned_rank=st.sampled_from([None, None, 0, 1]),
        allowed_workers=WORKER_IDS,
        excluded_workers=WORKER_IDS,
        required_labels=st.one_of(st.just({}), LABELS),
        preferred_labels=LABELS,
        overrides=OVERRIDES,
    ),
)
RULES = st.builds(
    OverloadRules,
    max_block_usage=st.sampled_from([None, None, 0.8]),
    max_prefill_tokens=st.sampled_from([None, None, 60]),
    max_requests_per_slot=st.sampled_from([None, None, 1.0]),
    max_waiting_requests=st.sampled_from([None, None, 1]),
)
KNOBS = st.builds(
    CostKnobs,
    overlap_credit=st.sampled_from([1.0, 0.7]),
    prefill_scale=st.sampled_from([1.0, 0.3]),
    request_weight=st.sampled_from([0.0, 1.7]),
)
GUARDS = st.one_of(
    st.none(), st.builds(ImbalanceGuard, absolute=st.integers(0, 2), relative=st.sampled_from([1.0, 2.0]))
)


def ask(
    path: Sequence[int], tokens: int, *, hints: RoutingHints | None = None, vectorised: bool = True
) -> RoutingQuery:
    """A prompt hashed in blocks of 4 tokens, one local hash per element of the path, and of 8, one per pair."""
    pairs = [10 * one + other + 100 for one, other in zip(path[::2], path[1::2], strict=False)]
    made: dict[int, Sequence[SequenceHash]] = {}
    for size, locals_ in ((4, path), (8, pairs)):
        made[size] = PromptBlocks.of_local(locals_, size) if vectorised else sequence_hashes(locals_)
    return RoutingQuery(model="m", prompt_tokens=tokens, block_hashes=made, hints=hints or RoutingHints())


def blocks_of(path: Sequence[int], block_size: int) -> tuple[SequenceHash, ...]:
    return tuple(ask(path, 0, vectorised=False).block_hashes[block_size])


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    fleet = Fleet(records={record.worker_id: record for record in draw(st.lists(RECORDS, min_size=1, max_size=5))})
    for worker in [worker for record in fleet.records.values() for worker in record.worker_ranks]:
        if draw(st.booleans()):
            fleet.reports[worker] = draw(REPORTS)
        fleet.cached[worker] = draw(PATHS)
        if draw(st.integers(0, 5)) == 0:
            fleet.degraded.add(worker)
    return fleet


def router_of(fleet: Fleet, rules: OverloadRules, policy: KvAware, *, order: Sequence[WorkerId]) -> RoutingCore:
    router = RoutingCore(
        RouterId("r"),
        policy=policy,
        rng=random.Random(1),
        rules=RoutingRules(overload=rules, stale_after_s=STALE_AFTER_S),
    )
    for worker_id in order:
        record = fleet.records[worker_id]
        router.put_worker(record, now=NOW - 5)
        for worker in record.worker_ranks:
            if worker in fleet.reports:
                router.apply_load(worker, fleet.reports[worker], now=NOW - 1)
            path = fleet.cached[worker]
            locals_ = ask(path, 0).block_hashes[record.block_size]
            assert isinstance(locals_, PromptBlocks)
            router.apply_kv_stored(
                worker, EPOCH, parent=None, block_hashes=tuple(locals_), local_hashes=locals_.local, now=NOW - 1
            )
            if worker in fleet.degraded:
                router.degrade_worker_index(worker, EPOCH)
    return router


def naive_candidates(fleet: Fleet, query: RoutingQuery, path: Sequence[int], rules: OverloadRules) -> list[Candidate]:
    """Everyone who serves the query, each worked out alone from all that was told."""
    ages = {
        worker: NOW - (fleet.reports[worker].received_at if worker in fleet.reports else NOW - 5)
        for record in fleet.records.values()
        for worker in record.worker_ranks
    }
    is_staleness_ignored = sum(age > STALE_AFTER_S for age in ages.values()) > len(ages) / 2
    return [
        naive_candidate(fleet, query, path, worker, rules, age=ages[worker], ignored=is_staleness_ignored)
        for worker_id in sorted(fleet.records)
        for worker in fleet.records[worker_id].worker_ranks
        if "m" in fleet.records[worker_id].models
    ]


def naive_candidate(
    fleet: Fleet,
    query: RoutingQuery,
    path: Sequence[int],
    worker: WorkerRank,
    rules: OverloadRules,
    *,
    age: float,
    ignored: bool,
) -> Candidate:
    record, report = fleet.records[worker.worker_id], fleet.reports.get(worker)
    size = record.block_size
    wanted = blocks_of(path, size)
    held = set(blocks_of(fleet.cached[worker], size))
    overlap = 0
    while overlap < min(len(wanted), max(query.prompt_tokens - 1, 0) // size) and wanted[overlap] in held:
        overlap += 1
    here = [booking for booking in fleet.bookings if booking.worker == worker]
    booked_blocks = {block for booking in here for block in blocks_of(booking.path, size)}
    unhashed = sum(max(booking.prompt_tokens // size - len(blocks_of(booking.path, size)), 0) for booking in here)
    unrouted = report.unrouted if report is not None else RouterLoad()
    active = 0
    while active < len(wanted) and wanted[active] in booked_blocks:
        active += 1
    new_blocks = max(query.prompt_tokens // size, len(wanted)) - active
    active_blocks = len(booked_blocks) + unhashed + unrouted.decode_blocks
    prefill_tokens = unrouted.prefill_tokens + sum(naive_uncached(fleet, booking) for booking in here)
    requests = len(here) + unrouted.active_requests
    total_blocks = record.total_blocks or (report.total_blocks if report is not None else 0)
    max_requests = record.max_requests or (report.max_requests if report is not None else 0)
    waiting = report.waiting_requests if report is not None else 0
    overload = rules.broken_by(
        decode_blocks=active_blocks + new_blocks,
        total_blocks=total_blocks,
        prefill_tokens=prefill_tokens,
        requests=requests,
        slots=max_requests,
        waiting=waiting,
    )
    return Candidate(
        worker=worker,
        epoch=record.epoch,
        block_size=size,
        overlap_blocks=0 if worker in fleet.degraded else overlap,
        active_prefill_tokens=prefill_tokens,
        active_blocks=active_blocks,
        new_blocks=new_blocks,
        active_requests=requests,
        waiting_requests=waiting,
        total_blocks=total_blocks,
        max_requests=max_requests,
        labels=record.labels,
        load_age_s=age,
        is_reported=report is not None,
        index_age_s=1.0,
        is_draining=record.draining,
        is_stale=age > STALE_AFTER_S,
        is_index_degraded=worker in fleet.degraded,
        overload=overload,
        is_saturated=bool(overload) or (age > STALE_AFTER_S and not ignored),
    )


def naive_uncached(fleet: Fleet, booking: Booked) -> int:
    """Prompt tokens that a booking was booked with; caches do not change after bookings here."""
    size = fleet.records[booking.worker.worker_id].block_size
    held, overlap = set(blocks_of(fleet.cached[booking.worker], size)), 0
    wanted = blocks_of(booking.path, size)
    while overlap < min(len(wanted), max(booking.prompt_tokens - 1, 0) // size) and wanted[overlap] in held:
        overlap += 1
    return booking.prompt_tokens - (0 if booking.worker in fleet.degraded else overlap * size)


Excluded = list[tuple[Candidate, str]]


def naive_filter(hints: RoutingHints, everyone: list[Candidate]) -> tuple[list[Candidate], Excluded, Reason | None]:
    """The steps before the policy, candidate by candidate: who is left, who is not, and the refusal if nobody is."""
    kept = everyone
    excluded: Excluded = []

    def drop(why: Callable[[Candidate], str]) -> list[Candidate]:
        excluded.extend((candidate, why(candidate)) for candidate in kept if why(candidate))
        return [candidate for candidate in kept if not why(candidate)]

    steps: tuple[tuple[Reason, Callable[[Candidate], str]], ...] = (
        (Reason.NO_WORKERS, lambda c: "draining" if c.is_draining else ""),
        (Reason.NO_MATCHING_WORKER, lambda c: naive_name_mismatch(c.worker, hints)),
        (Reason.NO_MATCHING_WORKER, lambda c: naive_missing_labels(c, hints)),
        (Reason.OVERLOADED, naive_saturation),
    )
    for refusal, why in steps:
        kept = drop(why)
        if not kept:
            return [], excluded, refusal
    most = max(naive_preferred(candidate, hints) for candidate in kept)
    kept = drop(lambda c: "another has more preferred labels" if naive_preferred(c, hints) < most else "")
    return kept, excluded, None


def naive_name_mismatch(worker: WorkerRank, hints: RoutingHints) -> str:
    if hints.pinned_worker is not None and worker.worker_id != hints.pinned_worker:
        return f"{hints.pinned_worker} is pinned"
    if hints.pinned_worker is not None and hints.pinned_rank is not None and worker.rank != hints.pinned_rank:
        return f"rank {hints.pinned_rank} is pinned"
    if worker.worker_id in hints.excluded_workers:
        return "excluded by the request, or failed an earlier attempt"
    is_allowed = not hints.allowed_workers or worker.worker_id in hints.allowed_workers
    return "" if is_allowed else "not among the allowed workers"


def naive_missing_labels(candidate: Candidate, hints: RoutingHints) -> str:
    missing = [f"{k}={v}" for k, v in sorted(hints.required_labels.items()) if candidate.labels.get(k) != v]
    return f"lacks label {', '.join(missing)}" if missing else ""


def naive_saturation(candidate: Candidate) -> str:
    if not candidate.is_saturated:
        return ""
    return f"overloaded: {candidate.overload}" if candidate.overload else f"stale: {candidate.load_age_s:.1f} s old"


def naive_preferred(candidate: Candidate, hints: RoutingHints) -> int:
    return sum(candidate.labels.get(key) == value for key, value in hints.preferred_labels.items())


def naive_cost(candidate: Candidate, query: RoutingQuery, knobs: CostKnobs) -> float:
    own = query.hints.overrides
    credit = knobs.overlap_credit if own.overlap_credit is None else own.overlap_credit
    scale = knobs.prefill_scale if own.prefill_scale is None else own.prefill_scale
    weight = knobs.request_weight if own.request_weight is None else own.request_weight
    prefill_blocks = (candidate.active_prefill_tokens + query.prompt_tokens) / candidate.block_size
    prefill_cost = scale * max(prefill_blocks - credit * candidate.overlap_blocks, 0.0)
    return prefill_cost + candidate.decode_blocks + weight * candidate.active_requests


def naive_barred(candidates: list[Candidate], guard: ImbalanceGuard | None) -> set[WorkerRank]:
    least = min(candidate.active_requests for candidate in candidates)
    return {
        candidate.worker
        for candidate in candidates
        if guard is not None
        and candidate.active_requests - least > guard.absolute
        and candidate.active_requests > guard.relative * least
    }


@given(
    fleet=fleets(),
    asked=st.lists(st.tuples(PATHS, st.integers(0, 5), HINTS, st.booleans()), min_size=1, max_size=6),
    rules=RULES,
    knobs=KNOBS,
    guard=GUARDS,
)
@settings(max_examples=400, deadline=None)
def test_selection_is_that_of_objects_one_by_one(
    *,
    fleet: Fleet,
    asked: list[tuple[tuple[int, ...], int, RoutingHints, bool]],
    rules: OverloadRules,
    knobs: CostKnobs,
    guard: ImbalanceGuard | None,
) -> None:
    policy = KvAware(knobs, imbalance_guard=guard)
    routers = [
        router_of(fleet, rules, policy, order=order) for order in (list(fleet.records), list(fleet.records)[::-1])
    ]

    for number, (path, beyond, hints, is_booked) in enumerate(asked):
        tokens = 4 * len(path) + beyond
        query = ask(path, tokens, hints=hints)
        outcomes = [decide(router, query, number, is_booked=is_booked) for router in routers]
        assert outcomes[0] == outcomes[1]

        everyone = naive_candidates(fleet, query, path, rules)
        if not everyone:
            assert isinstance(outcomes[0], Reason)
            continue
        kept, excluded, refusal = naive_filter(hints, everyone)
        if refusal is not None:
            assert outcomes[0] is refusal
            continue
        assert not isinstance(outcomes[0], Reason)
        worker, candidates, left_out, costs = outcomes[0]
        assert candidates == kept
        assert left_out == excluded
        assert costs == {candidate.worker: naive_cost(candidate, query, knobs) for candidate in kept}
        barred = naive_barred(kept, guard)
        assert worker not in barred
        assert costs[worker] == min(cost for each, cost in costs.items() if each not in barred)
        if is_booked:
            fleet.bookings.append(Booked(worker, path, tokens))


def decide(
    router: RoutingCore, query: RoutingQuery, number: int, *, is_booked: bool
) -> Reason | tuple[WorkerRank, list[Candidate], Excluded, dict[WorkerRank, float]]:
    """Return what the router decided, all of it as objects, or why it could not."""
    try:
        if is_booked:
            selection = router.reserve(AttemptKey(RequestId(f"r{number}"), 1), query, now=NOW).selection
        else:
            selection = router.select(query, now=NOW)
    except MeshError as error:
        return error.reason
    scores = {scored.worker: scored.cost for scored in selection.scores}
    assert scores == {scored.worker: scored.terms.cost for scored in selection.scores if scored.terms is not None}
    return selection.worker, list(selection.candidates), list(selection.excluded), scores


@given(fleet=fleets(), path=PATHS, later=PATHS)
@settings(max_examples=100, deadline=None)
def test_a_selection_says_for_ever_what_was_true_when_it_was_made(
    fleet: Fleet, path: tuple[int, ...], later: tuple[int, ...]
) -> None:
    fleet.records = {
        worker_id: replace(each, models=("m",), draining=False) for worker_id, each in fleet.records.items()
    }
    fleet.reports.clear()
    router = router_of(fleet, OverloadRules(), KvAware(), order=list(fleet.records))
    selection = router.select(ask(path, 4 * len(path) + 3), now=NOW)
    said = list(selection.candidates), list(selection.scores), selection.explain()

    for number in range(3):
        router.reserve(AttemptKey(RequestId(f"r{number}"), 1), ask(later, 4 * len(later) + 9), now=NOW)
    for record in fleet.records.values():
        router.apply_kv_stored(
            record.worker_ranks[0],
            EPOCH,
            parent=None,
            block_hashes=[SequenceHash(5)],
            local_hashes=[LocalHash(5)],
            now=NOW,
        )
    router.remove_worker(next(iter(fleet.records)), EPOCH, now=NOW)
    router.put_worker(replace(next(iter(fleet.records.values())), worker_id=WorkerId("z")), now=NOW)

    assert (list(selection.candidates), list(selection.scores), selection.explain()) == said
