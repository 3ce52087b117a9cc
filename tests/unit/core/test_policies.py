import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.core.candidates import Candidate, CostOverrides, RoutingHints, RoutingQuery, Selection
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import WorkerId, WorkerRank
from kvmesh.core.policies.cost_choice import ImbalanceGuard, softmax_weights
from kvmesh.core.policies.kv_aware import CostKnobs, KvAware
from kvmesh.core.policies.least_loaded import LeastLoaded
from kvmesh.core.policies.policy import BUILTIN_POLICIES, Policy, build_policy, name_of
from kvmesh.core.policies.prompt_similarity import PromptSimilarity
from kvmesh.core.policies.random_choice import RandomChoice
from kvmesh.core.policies.round_robin import RoundRobin

A, B, C, D = (WorkerRank(WorkerId(f"n/decode/{name}")) for name in "abcd")


def ask(
    tokens: int = 0, *, text: str | None = None, model: str = "m", overrides: CostOverrides | None = None
) -> RoutingQuery:
    hints = RoutingHints(overrides=overrides or CostOverrides())
    return RoutingQuery(model=model, prompt_tokens=tokens, prompt_text=text, hints=hints)


def warm(worker: WorkerRank, overlap: int, decode: int, *, requests: int = 0) -> Candidate:
    return Candidate(
        worker=worker, block_size=16, overlap_blocks=overlap, active_blocks=decode, active_requests=requests
    )


def plain(count: int) -> list[Candidate]:
    return [Candidate(worker=worker, block_size=16) for worker in (A, B, C, D)[:count]]


def costs(selection: Selection) -> dict[WorkerRank, float]:
    return {scored.worker: scored.cost for scored in selection.scores}


def of_costs(*wanted: float) -> list[Candidate]:
    """Candidates that cost so many blocks of 2 tokens for a query of no tokens."""
    return [
        Candidate(worker=worker, block_size=2, active_prefill_tokens=round(2 * cost))
        for worker, cost in zip((A, B, C, D), wanted, strict=False)
    ]


@pytest.mark.parametrize(("wanted", "chosen"), [((5, 3, 7, 3.5), B), ((4,), A), ((9, 8, 1), C)])
def test_least_cost_wins(wanted: tuple[float, ...], chosen: WorkerRank) -> None:
    selection = KvAware().select(ask(), of_costs(*wanted), random.Random(1))

    assert selection.worker == chosen
    assert tuple(costs(selection).values()) == wanted


def test_equal_costs_are_both_drawn() -> None:
    rng = random.Random(1)

    drawn = {KvAware().select(ask(), of_costs(3, 3), rng).worker for _ in range(120)}

    assert drawn == {A, B}


def test_temperature_draws_by_softmax_over_range_normalised_costs() -> None:
    weights = softmax_weights([0, 3, 9], 1.0)

    assert [weight / sum(weights) for weight in weights] == pytest.approx([0.4798, 0.3438, 0.1765], abs=5e-5)


def test_draws_at_a_temperature_follow_the_weights() -> None:
    policy, rng = KvAware(CostKnobs(temperature=1.0)), random.Random(1)

    drawn = Counter(policy.select(ask(), of_costs(0, 3, 9), rng).worker for _ in range(6_000))

    assert [drawn[worker] / 6_000 for worker in (A, B, C)] == pytest.approx([0.4798, 0.3438, 0.1765], abs=0.03)


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=8), st.floats(1e-300, 1e6))
def test_softmax_weights_are_finite_and_the_least_cost_weighs_most(values: list[float], temperature: float) -> None:
    weights = softmax_weights(values, temperature)

    assert all(math.isfinite(weight) and 0 <= weight <= 1 for weight in weights)
    assert weights[values.index(min(values))] == 1


def test_cached_prefix_weighs_against_load() -> None:
    candidates = [warm(A, 2, 10), warm(B, 5, 5), warm(C, 8, 9)]

    selection = KvAware().select(ask(160), candidates, random.Random(1))

    assert costs(selection) == {A: 18, B: 10, C: 11}
    assert selection.worker == B


@pytest.mark.parametrize(
    ("tokens", "overlap", "decode", "overrides", "warm_cost", "cold_cost", "chosen"),
    [
        pytest.param(64, 2, 3, {"prefill_scale": 2.0}, 7, 8, A, id="scale 2 favours the cache"),
        pytest.param(128, 4, 5, {"overlap_credit": 1.0}, 9, 8, B, id="credit 1 favours the idle worker"),
        pytest.param(128, 4, 5, {"overlap_credit": 1.5}, 7, 8, A, id="credit 1.5 favours the cache"),
        pytest.param(64, 4, 0, {"overlap_credit": 9.0}, 0, 4, A, id="credit never makes prefill negative"),
    ],
)
def test_knobs_of_the_request_and_of_the_router_do_the_same(
    *,
    tokens: int,
    overlap: int,
    decode: int,
    overrides: dict[str, float],
    warm_cost: float,
    cold_cost: float,
    chosen: WorkerRank,
) -> None:
    candidates = [warm(A, overlap, decode), warm(B, 0, 0)]

    by_request = KvAware().select(ask(tokens, overrides=CostOverrides(**overrides)), candidates, random.Random(1))
    by_router = KvAware(CostKnobs(**overrides)).select(ask(tokens), candidates, random.Random(1))

    assert by_request.worker == by_router.worker == chosen
    assert costs(by_request) == costs(by_router) == {A: warm_cost, B: cold_cost}
    assert by_request.knobs == by_router.knobs


@pytest.mark.parametrize(("weight", "cost"), [(32, 228), (0, 100)])
def test_active_requests_count_by_their_weight(weight: float, cost: float) -> None:
    policy = KvAware(CostKnobs(request_weight=weight))

    selection = policy.select(ask(), [warm(A, 0, 100, requests=4)], random.Random(1))

    assert costs(selection) == {A: cost}


def test_every_term_of_the_cost_is_shown() -> None:
    candidate = Candidate(
        worker=A,
        block_size=16,
        overlap_blocks=2,
        active_prefill_tokens=24,
        active_blocks=5,
        new_blocks=3,
        active_requests=2,
    )
    policy = KvAware(CostKnobs(overlap_credit=0.5, prefill_scale=2.0, request_weight=10.0))

    selection = policy.select(ask(40), [candidate], random.Random(1))

    terms = selection.scores[0].terms
    assert terms is not None
    assert (terms.prefill_blocks, terms.credit_blocks) == (4.0, 1.0)
    assert (terms.prefill_cost, terms.decode_cost, terms.request_cost) == (6.0, 8, 20.0)
    assert terms.cost == 34.0


GUARD = ImbalanceGuard(absolute=5, relative=2.0)


def test_guard_sends_everything_to_the_idle_worker_whatever_the_other_has_cached() -> None:
    candidates = [warm(A, 9, 0, requests=20), warm(B, 0, 0, requests=0)]
    policy, unguarded = KvAware(imbalance_guard=GUARD), KvAware()

    guarded_picks = {policy.select(ask(160), candidates, random.Random(seed)).worker for seed in range(5)}
    free_picks = {unguarded.select(ask(160), candidates, random.Random(seed)).worker for seed in range(5)}

    assert guarded_picks == {B}
    assert free_picks == {A}


@pytest.mark.parametrize(
    ("busy", "idle", "is_barred"),
    [
        pytest.param(5, 0, False, id="not above the absolute bound"),
        pytest.param(6, 0, True, id="above both"),
        pytest.param(20, 10, False, id="not above the relative bound"),
        pytest.param(21, 10, True, id="just above both"),
    ],
)
def test_guard_bars_only_beyond_both_bounds(busy: int, idle: int, *, is_barred: bool) -> None:
    candidates = [warm(A, 9, 0, requests=busy), warm(B, 0, 0, requests=idle)]

    selection = KvAware(imbalance_guard=GUARD).select(ask(160), candidates, random.Random(1))

    assert selection.worker == (B if is_barred else A)


def test_guard_leaves_affinity_among_the_rest() -> None:
    candidates = [warm(A, 9, 0, requests=20), warm(B, 0, 0), warm(C, 5, 0, requests=1)]

    selection = KvAware(imbalance_guard=GUARD).select(ask(160), candidates, random.Random(1))

    assert selection.worker == C


def test_cold_prompts_spread() -> None:
    rng = random.Random(1)

    drawn = Counter(KvAware(imbalance_guard=GUARD).select(ask(160), plain(4), rng).worker for _ in range(400))

    assert set(drawn) == {A, B, C, D}
    assert max(drawn.values()) < 150


@pytest.mark.parametrize(("absolute", "relative"), [(-1, 2.0), (5, 0.5), (5, float("nan"))])
def test_guard_out_of_range_is_refused(absolute: int, relative: float) -> None:
    with pytest.raises(FixRequestError):
        ImbalanceGuard(absolute=absolute, relative=relative)


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        worker=st.builds(WorkerRank, st.sampled_from("abcd").map(WorkerId), st.integers(0, 1)),
        block_size=st.just(16),
        overlap_blocks=st.integers(0, 3),
        active_blocks=st.integers(0, 3),
        active_requests=st.integers(0, 30),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda candidate: candidate.worker,
)


@given(data=st.data(), candidates=CANDIDATES, seed=st.integers(0, 2**64 - 1), temperature=st.sampled_from([0.0, 0.7]))
def test_same_seed_picks_the_same_whatever_the_order_of_candidates(
    data: st.DataObject, candidates: list[Candidate], seed: int, temperature: float
) -> None:
    shuffled = data.draw(st.permutations(candidates))
    query = ask(64, text="tell me", overrides=CostOverrides(temperature=temperature))

    for factory in BUILTIN_POLICIES.values():
        picks = [picks_of(factory(), query, order, seed) for order in (candidates, shuffled)]

        assert picks[0] == picks[1]
        assert set(picks[0]) <= {candidate.worker for candidate in candidates}


def picks_of(policy: Policy, query: RoutingQuery, candidates: Sequence[Candidate], seed: int) -> list[WorkerRank]:
    rng = random.Random(seed)
    answers = [policy.select(query, candidates, rng) for _ in range(4)]
    return [answer.worker if isinstance(answer, Selection) else answer for answer in answers]


def book(policy: RoundRobin | PromptSimilarity, query: RoutingQuery, candidates: Sequence[Candidate]) -> WorkerRank:
    worker = policy.select(query, candidates, random.Random(1)).worker
    policy.booked(query, worker)
    return worker


def test_round_robin_takes_the_workers_in_turn() -> None:
    policy = RoundRobin()

    assert [book(policy, ask(), plain(3)) for _ in range(5)] == [A, B, C, A, B]


def test_round_robin_does_not_move_on_without_a_booking() -> None:
    policy = RoundRobin()
    book(policy, ask(), plain(3))

    asked = [policy.select(ask(), plain(3), random.Random(1)).worker for _ in range(3)]

    assert asked == [B, B, B]


def test_round_robin_goes_on_after_a_worker_that_left_and_counts_models_apart() -> None:
    policy = RoundRobin()
    book(policy, ask(), plain(3))
    book(policy, ask(), plain(3))
    left = [candidate for candidate in plain(3) if candidate.worker != B]

    assert book(policy, ask(model="other"), left) == A
    assert [book(policy, ask(), left) for _ in range(3)] == [C, A, C]


def test_least_loaded_takes_the_fewest_requests_and_ignores_the_cache() -> None:
    candidates = [warm(A, 9, 0, requests=2), warm(B, 0, 50, requests=1), warm(C, 0, 0, requests=1)]
    rng = random.Random(1)

    drawn = {LeastLoaded().select(ask(160), candidates, rng).worker for _ in range(60)}

    assert drawn == {B, C}


def test_random_choice_is_uniform() -> None:
    rng = random.Random(1)

    drawn = Counter(RandomChoice().select(ask(), plain(3), rng).worker for _ in range(3_000))

    assert [drawn[worker] / 3_000 for worker in (A, B, C)] == pytest.approx([1 / 3] * 3, abs=0.04)


JOKE, TEAM, FACT = "Tell me a joke", "Which team won 2020 World Series", "Tell me a fact"
SERVING = "This is prefill disagg serving example"


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_similar_prompts_meet_on_one_worker(order: tuple[int, ...]) -> None:
    policy = PromptSimilarity()
    candidates = [plain(2)[index] for index in order]

    landed = [book(policy, ask(text=prompt), candidates) for prompt in (JOKE, TEAM, FACT, SERVING)]

    assert landed == [A, B, A, A]


@pytest.mark.parametrize(
    ("prompt", "to_joke", "to_team"), [(TEAM, 0.217, 1.0), (FACT, 0.714, None), (SERVING, 0.269, 0.229)]
)
def test_similarity_is_that_of_difflib(prompt: str, to_joke: float, to_team: float | None) -> None:
    policy = PromptSimilarity()
    policy.booked(ask(text=JOKE), A)
    policy.booked(ask(text=TEAM), B)

    similarity = costs(policy.select(ask(text=prompt), plain(2), random.Random(1)))

    assert similarity[A] == pytest.approx(-to_joke, abs=5e-4)
    assert to_team is None or similarity[B] == pytest.approx(-to_team, abs=5e-4)


def test_worker_keeps_its_first_prompt_only() -> None:
    policy = PromptSimilarity()
    policy.booked(ask(text=JOKE), A)
    policy.booked(ask(text=TEAM), A)

    selection = policy.select(ask(text=TEAM), plain(1), random.Random(1))

    assert -costs(selection)[A] == pytest.approx(0.217, abs=5e-4)


def test_cold_workers_are_taken_in_the_order_of_their_names() -> None:
    policy = PromptSimilarity()
    unlike = ["aaaa", "bbbb", "cccc", "dddd"]

    landed = [book(policy, ask(text=prompt), plain(4)[::-1]) for prompt in unlike]

    assert landed == [A, B, C, D]


def test_dead_workers_prompts_are_forgotten() -> None:
    policy = PromptSimilarity()
    policy.booked(ask(text=TEAM), A)
    policy.booked(ask(text=JOKE), B)

    policy.forget_worker(B.worker_id)
    policy.forget_worker(B.worker_id)

    assert book(policy, ask(text=FACT), plain(2)) == B
    assert -costs(policy.select(ask(text=FACT), plain(2), random.Random(1)))[B] == 1.0


def test_similar_prompt_of_a_worker_that_may_not_be_chosen_does_not_count() -> None:
    policy = PromptSimilarity()
    policy.booked(ask(text=JOKE), A)
    policy.booked(ask(text=TEAM), B)

    assert policy.select(ask(text=FACT), plain(2)[1:], random.Random(1)).worker == B


def test_prompts_of_different_models_are_not_compared() -> None:
    policy = PromptSimilarity()
    policy.booked(ask(text=JOKE, model="other"), B)

    assert book(policy, ask(text=JOKE), plain(2)) == A


def test_threshold_is_inclusive_and_its_range_is_checked() -> None:
    half = PromptSimilarity(threshold=0.5)
    half.booked(ask(text="ab"), B)

    selection = half.select(ask(text="ac"), plain(2), random.Random(1))

    assert selection.worker == B
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(FixRequestError):
            PromptSimilarity(threshold=threshold)


def test_similarity_without_text_is_refused() -> None:
    with pytest.raises(FixRequestError) as caught:
        PromptSimilarity().select(ask(), plain(2), random.Random(1))

    assert caught.value.field == "prompt_text"


@pytest.mark.parametrize(
    "name", ["kv_aware", "least_work", "round_robin", "random", "least_loaded", "prompt_similarity"]
)
def test_built_in_policy_is_made_by_its_name(name: str) -> None:
    policy = build_policy(name)

    assert name_of(policy) == name
    assert build_policy(name) is not policy


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("roundrobin", "the nearest is round_robin"),
        ("vllm", "known: kv_aware, least_work, round_robin, random, least_loaded, prompt_similarity"),
    ],
)
def test_unknown_policy_is_refused_with_a_close_name_or_with_all(name: str, hint: str) -> None:
    with pytest.raises(FixRequestError, match=f"{hint}$") as caught:
        build_policy(name)

    assert caught.value.reason is Reason.INVALID_FIELD
