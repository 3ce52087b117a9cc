"""A whole trace in virtual time."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from kvmesh.core.errors import FixRequestError
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.remote_prefill import RemotePrefillRules
from kvmesh.core.step_cost import CurvedStepCost
from kvmesh.replay.trace import TraceRow, read_trace
from kvmesh.simulate.options import CostModel, Order, SimulationOptions
from kvmesh.simulate.plot import draw
from kvmesh.simulate.prompts import TraceBlocks
from kvmesh.simulate.result import PolicyResult, Spread
from kvmesh.simulate.run import simulate_policy

ALONE = CurvedStepCost()


def row(at_ms: float, tokens: int, *hash_ids: int, output: int = 3) -> TraceRow:
    return TraceRow(at_ms, tokens, output, hash_ids)


def play(rows: list[TraceRow], policy: str = "kv_aware", **options: object) -> PolicyResult:
    given = SimulationOptions(**{"workers": 2, "block_size": 64, **options})  # type: ignore[arg-type]  # by name
    return simulate_policy(given, TraceBlocks(rows, block_size=given.block_size), build_policy(policy))


def conversations(count: int, *, seed: int = 3) -> list[TraceRow]:
    """Some conversations of growing prompts, interleaved."""
    rng = random.Random(seed)
    rows, at_ms, fresh = [], 0.0, 1000
    chains: list[list[int]] = [[0] for _ in range(12)]
    for _ in range(count):
        at_ms += rng.expovariate(1 / 60)
        chain = rng.choice(chains)
        fresh += 2
        chain += [fresh, fresh + 1]
        rows.append(row(at_ms, len(chain) * 512 - rng.randrange(300), *chain, output=rng.randrange(1, 60)))
        if len(chain) > 30:
            del chain[1:]
    return rows


def test_a_request_alone_takes_what_the_cost_model_says() -> None:
    result = play([row(0, 600, 1, 2, output=3)])

    prefill_s = ALONE.step_s(decode_sequences=0, decode_blocks=0, prefill_tokens=600)
    decode_s = sum(
        ALONE.step_s(decode_sequences=1, decode_blocks=10, prefill_tokens=0, decode_tokens=600 + produced)
        for produced in (1, 2)
    )
    assert result.ttft_ms.mean == pytest.approx(prefill_s * 1000, abs=1e-3)
    assert result.e2e_ms.mean == pytest.approx((prefill_s + decode_s) * 1000, abs=1e-3)
    assert result.itl_ms.mean == pytest.approx(decode_s / 2 * 1000, abs=1e-3)


def test_a_prompt_seen_before_is_reused_in_full_blocks_where_it_went() -> None:
    result = play([row(0, 600, 1, 2), row(5_000, 700, 1, 3)], workers=3)

    # 512 tokens are shared, 8 blocks of 64
    assert result.reuse == pytest.approx(512 / (600 + 700))
    assert sorted(result.uncached) == [0, 0, 600 + 700 - 512]


def test_round_robin_takes_turns() -> None:
    result = play([row(5_000 * number, 512, number) for number in range(6)], "round_robin", workers=3)

    assert result.uncached == (1024, 1024, 1024)
    assert result.balance == 1.0


def test_speed_brings_requests_closer_together_and_they_wait() -> None:
    rows = [row(1_000 * number, 4_000, *range(10 * number, 10 * number + 8)) for number in range(20)]

    at_pace, hurried = (play(rows, workers=1, speed=speed) for speed in (1.0, 50.0))

    assert at_pace.ttft_ms.p99 is not None
    assert hurried.ttft_ms.mean is not None
    assert hurried.ttft_ms.mean > at_pace.ttft_ms.p99 * 2


def test_a_small_pool_forgets_what_an_unbounded_one_reuses() -> None:
    rows = [row(2_000 * number, 4_096, *range(8 * (number % 3), 8 * (number % 3) + 8)) for number in range(9)]

    small, unbounded = (play(rows, workers=1, total_blocks=blocks) for blocks in (100, None))

    assert small.reuse == 0
    assert unbounded.reuse == pytest.approx(6 * 4_032 / (9 * 4_096))


@pytest.mark.parametrize("policy", ["kv_aware", "random", "round_robin"])
def test_the_same_seed_gives_the_same_figures(policy: str) -> None:
    rows = conversations(80)

    first, again = (play(rows, policy, seed=7) for _ in range(2))

    assert first == again


def test_another_seed_draws_otherwise() -> None:
    rows = conversations(80)

    assert play(rows, "random", seed=7).uncached != play(rows, "random", seed=8).uncached


def test_the_cached_prefix_decides_unlike_turns() -> None:
    rows = conversations(200)

    assert play(rows, "kv_aware", workers=4).reuse > play(rows, "round_robin", workers=4).reuse + 0.1


def hot_prefix(count: int, *, prefix: int, output: int, seed: int = 1) -> list[TraceRow]:
    """Prompts of 300 tokens behind one that all share, of `prefix` * 512: 10 requests a second."""
    rng = random.Random(seed)
    rows, at_ms = [], 0.0
    for number in range(count):
        at_ms += rng.expovariate(10 / 1000)
        rows.append(row(at_ms, prefix * 512 + 300, *range(1, prefix + 1), 1000 + number, output=output))
    return rows


@pytest.mark.parametrize(("prefix", "output"), [(1, 64), (8, 128)])
def test_at_low_load_the_default_policy_does_not_crowd_a_hot_prefix_onto_one_worker(prefix: int, output: int) -> None:
    rows = hot_prefix(400, prefix=prefix, output=output)

    ours, by_turns = (play(rows, policy, workers=8) for policy in ("least_work", "round_robin"))

    assert ours.ttft_ms.p50 is not None
    assert by_turns.ttft_ms.p50 is not None
    assert ours.ttft_ms.p50 <= 1.1 * by_turns.ttft_ms.p50
    assert ours.balance < 2  # 8 is all on one
    assert ours.reuse > by_turns.reuse - 0.005


def test_at_low_load_the_default_policy_keeps_conversations_where_they_are_cached() -> None:
    rows = conversations(200)

    assert play(rows, "least_work", workers=8).reuse > play(rows, "kv_aware", workers=8).reuse


def test_every_request_ends_and_is_told_of_once() -> None:
    ended: list[int] = []
    rows = conversations(50)
    options = SimulationOptions(workers=2, total_blocks=400)

    result = simulate_policy(
        options, TraceBlocks(rows, block_size=64), build_policy("round_robin"), on_end=ended.append
    )

    assert sorted(ended) == list(range(50))
    assert result.timeline.gap_count.sum() + 50 == sum(row.output_length for row in rows)
    assert (result.timeline.e2e_ms >= result.timeline.ttft_ms).all()


def test_the_linear_model_is_the_simulated_engines_own() -> None:
    result = play([row(0, 600, 1, 2, output=1)], cost_model=CostModel.LINEAR)

    assert result.ttft_ms.mean == pytest.approx(5.0 + 600 / 15.0)


# Prefill elsewhere.


def test_a_long_prompt_is_prefilled_by_a_prefill_worker_and_travels() -> None:
    result = play([row(0, 641, 1, 2, output=1)], workers=1, prefill_workers=1, transfer_s_per_block=1.0)

    away_s = ALONE.step_s(decode_sequences=0, decode_blocks=0, prefill_tokens=640)
    rest_s = ALONE.step_s(decode_sequences=0, decode_blocks=0, prefill_tokens=1)
    assert result.ttft_ms.mean == pytest.approx((away_s + 10 * 1.0 + rest_s) * 1000, abs=1e-3)
    assert result.uncached == (640,)


def test_a_short_prompt_stays_where_it_decodes() -> None:
    result = play([row(0, 200, 1, output=1)], workers=1, prefill_workers=1, transfer_s_per_block=1.0)

    assert result.ttft_ms.mean == pytest.approx(
        ALONE.step_s(decode_sequences=0, decode_blocks=0, prefill_tokens=200) * 1000, abs=1e-3
    )


def test_prefill_workers_reuse_prefixes_and_every_request_ends() -> None:
    rows = conversations(120)
    rules = RemotePrefillRules(min_uncached_tokens=256)

    result = play(rows, workers=2, prefill_workers=2, remote_prefill=rules, total_blocks=2_000)

    assert result.reuse > 0.2
    assert not any(map(float.__ne__, *[result.timeline.ttft_ms.tolist()] * 2))  # none is missing (NaN)
    assert result.timeline.gap_count.sum() + 120 == sum(row.output_length for row in rows)


# One after the other.


def test_in_file_order_begun_blocks_count_and_identical_prompts_are_all_hits() -> None:
    rows = [row(0, 600, 1, 2), row(0, 600, 1, 2), row(0, 1_000, 1, 3)]

    result = play(rows, workers=1, block_size=512, total_blocks=None, order=Order.FILE)

    assert result.reuse == pytest.approx((2 + 1) / 6)
    assert result.uncached == (3,)


def test_in_file_order_times_are_those_of_a_request_alone() -> None:
    rows = [row(0, 600, 1, 2, output=200), row(0, 9_000, *range(10, 28), output=2)]

    in_file_order = play(rows, order=Order.FILE)
    far_apart = play([rows[0], row(90_000, 9_000, *range(10, 28), output=2)])

    assert in_file_order.ttft_ms == far_apart.ttft_ms
    assert in_file_order.e2e_ms == far_apart.e2e_ms
    assert in_file_order.itl_ms.mean == pytest.approx(far_apart.itl_ms.mean)


def test_in_file_order_what_was_computed_is_the_load() -> None:
    rows = [
        row(0, 512 * size, *range(100 * number, 100 * number + size)) for number, size in enumerate((6, 1, 1, 1, 3))
    ]

    result = play(rows, "kv_aware", workers=2, block_size=512, total_blocks=None, order=Order.FILE)

    assert sorted(result.uncached) == [6, 6]


def test_prefill_workers_have_no_place_in_file_order() -> None:
    with pytest.raises(FixRequestError, match="order time"):
        play([row(0, 512, 1)], prefill_workers=1, order=Order.FILE)


# Blocks, figures, plots.


def test_the_same_hash_id_after_another_beginning_is_another_block() -> None:
    blocks = TraceBlocks([row(0, 1_024, 1, 2), row(0, 1_024, 3, 2), row(0, 1_500, 1, 2, 4)], block_size=256)

    first, second, third = (blocks.begun_blocks(number) for number in range(3))

    assert not set(first) & set(second)
    assert third[:4] == first
    assert len(third) == 6
    assert len(blocks.full_blocks(2)) == 5


@pytest.mark.parametrize("block_size", [48, 1024])
def test_a_block_size_that_does_not_divide_the_traces_is_refused(block_size: int) -> None:
    with pytest.raises(FixRequestError, match="does not divide"):
        TraceBlocks([row(0, 512, 1)], block_size=block_size)


def test_a_request_that_fits_into_no_worker_is_refused() -> None:
    with pytest.raises(FixRequestError, match="request 2 of the trace needs 17 blocks"):
        play([row(0, 512, 1), row(0, 1_024, 1, 2, output=5)], total_blocks=16)


def test_percentiles_count_each_value_as_often_as_it_came() -> None:
    spread = Spread.of(np.array([3.0, 1.0, 2.0]), np.array([9.0, 90.0, 1.0]))

    assert spread == Spread(mean=1.19, p50=1.0, p90=1.0, p99=3.0)


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = conversations(60)

    draw([play(rows, policy) for policy in ("kv_aware", "round_robin")], tmp_path / "figure.svg")

    assert "<svg" in (tmp_path / "figure.svg").read_text()


# The real trace, where it is at hand.

REAL_TRACE = os.environ.get("TEST_TRACE", "")
needs_trace = pytest.mark.skipif(
    not REAL_TRACE, reason="set TEST_TRACE to the path of Mooncake's conversation_trace.jsonl"
)


@needs_trace
@pytest.mark.timeout(240)
def test_one_worker_that_never_forgets_reuses_what_is_known_of_the_conversation_trace() -> None:
    rows = read_trace(Path(REAL_TRACE))

    result = play(rows, workers=1, block_size=512, total_blocks=None, order=Order.FILE)

    assert result.timeline.cached.sum() == 105_710
    assert result.timeline.prompt.sum() == 288_500


@needs_trace
@pytest.mark.timeout(240)
def test_four_workers_lose_little_of_it_and_share_the_work() -> None:
    rows = read_trace(Path(REAL_TRACE))

    ours = play(rows, "least_work", workers=4, block_size=512, total_blocks=None, order=Order.FILE)
    turns = play(rows, "round_robin", workers=4, block_size=512, total_blocks=None, order=Order.FILE)

    assert ours.reuse >= 0.98 * 105_710 / 288_500
    assert ours.balance <= 1.05
    assert turns.reuse == pytest.approx(0.1918, abs=5e-5)


@needs_trace
@pytest.mark.timeout(240)
def test_it_agrees_with_another_simulator_on_round_robin() -> None:
    """NVIDIA Dynamo 1.6.1's offline replay of the trace on 8 workers: reuse 0.0817, TTFT 321 ms, ITL 7.6 ms."""
    result = play(read_trace(Path(REAL_TRACE)), "round_robin", workers=8)

    assert result.reuse == pytest.approx(0.0817, rel=0.05)
    assert result.ttft_ms.mean == pytest.approx(321, rel=0.1)
    assert result.itl_ms.mean == pytest.approx(7.6, rel=0.1)
