"""The modelled duration of a step."""

import pytest

from kvmesh.core.step_cost import CurvedStepCost, StepCost

COST = StepCost(base_s=1.0, decode_s_per_sequence=0.1, decode_s_per_block=0.01, prefill_tokens_per_s=100.0)


@pytest.mark.parametrize(
    ("decode_sequences", "decode_blocks", "prefill_tokens", "expected"),
    [
        pytest.param(0, 0, 0, 0.0, id="nothing to compute costs nothing, not even the base"),
        pytest.param(1, 1, 0, 1.11, id="one decode"),
        pytest.param(10, 50, 0, 2.5, id="it grows with the batch and its blocks"),
        pytest.param(0, 0, 200, 3.0, id="a prefill alone"),
        pytest.param(10, 50, 200, 4.5, id="both share the base"),
    ],
)
def test_step_costs_the_sum_of_its_parts(
    decode_sequences: int, decode_blocks: int, prefill_tokens: int, expected: float
) -> None:
    step_s = COST.step_s(
        decode_sequences=decode_sequences, decode_blocks=decode_blocks, prefill_tokens=prefill_tokens
    )  # fmt: skip

    assert step_s == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sequences", "blocks", "prefill_tokens", "expected_ms"),
    [
        pytest.param(1, 10, 0, 5.0, id="alone"),
        pytest.param(64, 64 * 10, 0, 6.6, id="64 sequences of 600 tokens"),
        pytest.param(256, 256 * 16, 0, 12.9, id="256 sequences of 1,000 tokens"),
        pytest.param(0, 0, 512, 39.1, id="a prompt of 512 tokens, the base included"),
    ],
)
def test_defaults_are_those_of_a_mid_size_gpu(
    sequences: int, blocks: int, prefill_tokens: int, expected_ms: float
) -> None:
    step_s = StepCost().step_s(decode_sequences=sequences, decode_blocks=blocks, prefill_tokens=prefill_tokens)

    assert step_s * 1000 == pytest.approx(expected_ms, abs=0.06)


@pytest.mark.parametrize(
    ("tokens", "measured_ms"),
    [(1, 16.516604), (64, 17.474885), (1_000, 32.105859), (4_000, 83.971162), (8_192, 169.136918)],
)
def test_curved_prefills_take_what_was_measured(tokens: int, measured_ms: float) -> None:
    step_s = CurvedStepCost().step_s(decode_sequences=0, decode_blocks=0, prefill_tokens=tokens)

    assert step_s * 1000 == pytest.approx(measured_ms, abs=1e-3)


@pytest.mark.parametrize(
    ("tokens", "measured_ms"), [(2, 5.740103), (1_001, 5.791536), (50_001, 8.256921), (100_001, 10.656738)]
)
def test_curved_decode_steps_take_what_was_measured(tokens: int, measured_ms: float) -> None:
    step_s = CurvedStepCost().step_s(decode_sequences=1, decode_blocks=0, prefill_tokens=0, decode_tokens=tokens)

    assert step_s * 1000 == pytest.approx(measured_ms, abs=1e-3)


def test_curved_prefill_and_decode_in_one_step_add_up() -> None:
    cost = CurvedStepCost(prefill=(1.0, 0.1, 0.01), decode=(2.0, 0.5, -0.01))

    step_s = cost.step_s(decode_sequences=3, decode_blocks=0, prefill_tokens=10, decode_tokens=20)

    assert step_s == pytest.approx((1 + 1 + 1) + (2 + 10 - 4))
    assert cost.step_s(decode_sequences=0, decode_blocks=0, prefill_tokens=0) == 0


@pytest.mark.parametrize("cost", [COST, CurvedStepCost()])
def test_a_run_of_decode_steps_takes_the_sum_of_them(cost: StepCost | CurvedStepCost) -> None:
    run_s = cost.decode_run_s(37, decode_sequences=5, decode_blocks=940, decode_tokens=60_000)

    assert run_s == pytest.approx(
        sum(
            cost.step_s(decode_sequences=5, decode_blocks=940, decode_tokens=60_000 + 5 * step, prefill_tokens=0)
            for step in range(37)
        )
    )
    assert cost.decode_run_s(9, decode_sequences=0, decode_blocks=0, decode_tokens=0) == 0
