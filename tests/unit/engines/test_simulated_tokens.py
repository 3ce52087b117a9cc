"""Output tokens depend on prompt, seed and position, and on nothing else."""

import numpy as np
import numpy.typing as npt

from kvmesh.engines.simulated_options import SimulatedOptions
from kvmesh.engines.simulated_tokens import CHUNK_TOKENS, OutputTokens

MASK = 2**64 - 1


def prompt(*tokens: int) -> npt.NDArray[np.uint32]:
    return np.array(tokens, dtype=np.uint32)


def splitmix(state: int, position: int) -> int:
    """SplitMix64's output `position` (from 0), from its published definition."""
    mixed = (state + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def test_tokens_are_those_of_splitmix_from_the_published_definition() -> None:
    tokens = OutputTokens(SimulatedOptions(vocab_size=1_000))

    assert splitmix(1234567, 0) == 6457827717110365317  # the reference implementation's first output for this seed
    for start in (0, 1234567, MASK):
        for position in (0, CHUNK_TOKENS):
            expected = [splitmix(start, position + index) % 1_000 for index in range(CHUNK_TOKENS)]
            assert tokens.chunk(start, position) == expected


def test_same_prompt_says_the_same_on_any_engine() -> None:
    one, other = (OutputTokens(SimulatedOptions(total_blocks=blocks)) for blocks in (10, 20))

    assert one.chunk(one.start(prompt(1, 2), 3), 0) == other.chunk(other.start(prompt(1, 2), 3), 0)


def test_prompt_and_seed_each_change_the_start() -> None:
    tokens = OutputTokens(SimulatedOptions())
    starts = {tokens.start(prompt(*ids), seed) for ids in ((1,), (2,), (1, 2), (1, 0)) for seed in (None, 0, 1)}

    assert len(starts) == 12


def test_output_is_drawn_from_the_given_ids_only() -> None:
    tokens = OutputTokens(SimulatedOptions(output_token_ids=(65, 66, 67)))

    assert set(tokens.chunk(5, 0)) == {65, 66, 67}


def test_end_tokens_are_not_drawn_from_the_whole_vocabulary() -> None:
    tokens = OutputTokens(SimulatedOptions(vocab_size=4, eos_token_ids=(0, 2)))

    assert set(tokens.chunk(5, 0)) == {1, 3}
    assert tokens.end_token == 0


def test_no_sequence_ends_by_itself_at_rate_0_and_every_one_at_once_at_rate_1() -> None:
    never = OutputTokens(SimulatedOptions(eos_token_ids=(1,)))
    always = OutputTokens(SimulatedOptions(eos_token_ids=(1,), eos_rate=1.0))

    assert never.ending(5, 0) is None
    assert always.ending(5, 0) == 0
    assert always.ending(5, CHUNK_TOKENS) == CHUNK_TOKENS


def test_sequences_end_at_the_given_rate() -> None:
    tokens = OutputTokens(SimulatedOptions(eos_token_ids=(1,), eos_rate=0.1))
    ends = [tokens.ending(start, 0) for start in range(400)]
    mean = sum(CHUNK_TOKENS if end is None else end for end in ends) / len(ends)

    assert 7.5 < mean < 10.5  # geometric: 9 tokens before the end, standard error 0.5
