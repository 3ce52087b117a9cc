"""Options as text: what is wrong is named, with its range or with the name that was meant."""

import pytest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.step_cost import StepCost
from kvmesh.engines import echo, simulated_options
from kvmesh.engines.echo import EchoOptions
from kvmesh.engines.simulated_options import SimulatedOptions


def test_no_options_are_the_defaults() -> None:
    options = simulated_options.parse({})

    assert (options.total_blocks, options.block_size) == (16_384, 64)
    assert (options.max_sequences, options.max_batched_tokens) == (256, 8_192)
    assert options.speedup == 1.0
    assert echo.parse({}) == EchoOptions()


def test_text_becomes_numbers_and_ids() -> None:
    options = simulated_options.parse(
        {
            "total_blocks": "512", "speedup": "0", "step_base_s": "1e-3", "vocab_size": "300",
            "output_token_ids": "5, 7,32-35", "eos_token_ids": "1,2",
        }
    )  # fmt: skip

    assert (options.total_blocks, options.speedup, options.step_base_s) == (512, 0.0, 0.001)
    assert options.output_token_ids == (5, 7, 32, 33, 34, 35)
    assert options.eos_token_ids == (1, 2)
    assert options.step_cost == StepCost(base_s=0.001)


@pytest.mark.parametrize(
    ("name", "nearest"), [("total_block", "total_blocks"), ("speed_up", "speedup"), ("block-size", "block_size")]
)
def test_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(FixRequestError, match=rf"simulated engine: the nearest is {nearest}$") as caught:
        simulated_options.parse({name: "1"})

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("total_blocks", "0", "not in 1..16777216", id="below the range"),
        pytest.param("eos_rate", "1.5", "not in 0.0..1.0", id="above the range"),
        pytest.param("speedup", "nan", "not a number in 0.0", id="no number at all"),
        pytest.param("block_size", "16.5", "not a whole number in 1..65536", id="a fraction"),
        pytest.param("block_size", "", "not a whole number in 1..65536", id="nothing"),
        pytest.param("block_bytes", "12", "not a multiple of 8", id="part of a hash"),
        pytest.param("output_token_ids", "5,x", "token ids separated by commas", id="no id"),
        pytest.param("output_token_ids", "9-5", "token ids separated by commas", id="a range backwards"),
        pytest.param("output_token_ids", "0-99999999999", "token ids separated by commas", id="a range without end"),
        pytest.param("output_token_ids", "32000", "not in 0..31999", id="an id beyond the vocabulary"),
        pytest.param("eos_rate", "0.5", "eos_token_ids is empty", id="an end without an id for it"),
    ],
)
def test_bad_value_names_the_option_and_what_it_takes(name: str, value: str, message: str) -> None:
    with pytest.raises(FixRequestError) as caught:
        simulated_options.parse({name: value})

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, name)
    assert message in caught.value.message


def test_vocabulary_of_end_tokens_alone_is_refused() -> None:
    with pytest.raises(FixRequestError) as caught:
        SimulatedOptions(vocab_size=2, eos_token_ids=(0, 1))

    assert caught.value.field == "eos_token_ids"


def test_echo_names_its_own_options() -> None:
    with pytest.raises(FixRequestError, match="echo engine: the nearest is max_sequences"):
        echo.parse({"max_sequence": "1"})
    with pytest.raises(FixRequestError, match=r"not in 1\.\.65536"):
        echo.parse({"max_sequences": "0"})
