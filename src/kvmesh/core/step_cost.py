"""How long one batch step of a modelled engine takes: two models, a linear one and one with curves.

`StepCost`, the simulated engine's:

    step_s = base_s
           + decode_sequences * decode_s_per_sequence     launch, sampling and the matrix rows of each sequence
           + decode_blocks    * decode_s_per_block        reading the KV blocks of the decoding sequences
           + prefill_tokens   / prefill_tokens_per_s      compute-bound

Linear on purpose: decode is bound by memory traffic (the weights, `base_s`, plus KV), prefill by arithmetic, and the
part of attention that grows with the square of a prompt is small below some 10k tokens. The defaults are those of an
8B model on a mid-size GPU: a decode step of 5 ms alone, 6.5 ms with 64 sequences of 600 tokens, 13 ms with 256
sequences of 1,000 tokens; a prompt of 512 tokens costs 34 ms.

`CurvedStepCost`, with p prefill tokens and t tokens in the KV of the decoding sequences:

    step_s = (p0 + p1 * p + p2 * p^2   if p else 0)
           + (d0 + d1 * t + d2 * t^2   if any sequence decodes else 0)

Its defaults were fitted to what single requests take in the offline replay of NVIDIA Dynamo 1.6.1, prompts of 1 to
8,192 and KV of 1 to 1,000,000 tokens, and reproduce those times to the microsecond.
"""

from dataclasses import dataclass
from typing import Protocol


class StepTimes(Protocol):
    """A model of what steps take. `decode_blocks` and `decode_tokens` count once for each sequence that reads them."""

    def step_s(
        self, *, decode_sequences: int, decode_blocks: int, prefill_tokens: int, decode_tokens: int = 0
    ) -> float:
        """Return the modelled seconds of one step; 0 if it computes nothing."""

    def decode_run_s(self, steps: int, *, decode_sequences: int, decode_blocks: int, decode_tokens: int) -> float:
        """Return the modelled seconds of `steps` steps, each a token of every sequence, in which no block begins.

        The counts are those of the first step. O(1).
        """


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients of the linear formula above."""

    base_s: float = 0.005
    decode_s_per_sequence: float = 15e-6
    decode_s_per_block: float = 1e-6
    prefill_tokens_per_s: float = 15_000.0
    """Above 0."""

    def step_s(
        self, *, decode_sequences: int, decode_blocks: int, prefill_tokens: int, decode_tokens: int = 0
    ) -> float:
        """Return the modelled seconds of one step; 0 if it computes nothing. `decode_tokens` does not matter here.

        `decode_blocks` counts a block once for each decoding sequence that reads it.
        """
        if not decode_sequences and not prefill_tokens:
            return 0.0
        return (
            self.base_s
            + decode_sequences * self.decode_s_per_sequence
            + decode_blocks * self.decode_s_per_block
            + prefill_tokens / self.prefill_tokens_per_s
        )

    def decode_run_s(self, steps: int, *, decode_sequences: int, decode_blocks: int, decode_tokens: int) -> float:
        """Return the modelled seconds of `steps` steps in which no block begins: all alike."""
        return steps * self.step_s(decode_sequences=decode_sequences, decode_blocks=decode_blocks, prefill_tokens=0)


@dataclass(frozen=True, slots=True)
class CurvedStepCost:
    """The coefficients of the curved formula above, in seconds and tokens."""

    prefill: tuple[float, float, float] = (16.50142e-3, 15.18344e-6, 4.20999e-10)
    """p0, p1, p2."""
    decode: tuple[float, float, float] = (5.74e-3, 5.150795e-8, -2.34104e-14)
    """d0, d1, d2."""

    def step_s(
        self, *, decode_sequences: int, decode_blocks: int, prefill_tokens: int, decode_tokens: int = 0
    ) -> float:
        """Return the modelled seconds of one step; 0 if it computes nothing. `decode_blocks` does not matter here."""
        seconds = 0.0
        if prefill_tokens:
            fixed, linear, square = self.prefill
            seconds += fixed + (linear + square * prefill_tokens) * prefill_tokens
        if decode_sequences:
            fixed, linear, square = self.decode
            seconds += fixed + (linear + square * decode_tokens) * decode_tokens
        return seconds

    def decode_run_s(self, steps: int, *, decode_sequences: int, decode_blocks: int, decode_tokens: int) -> float:
        """Return the modelled seconds of `steps` steps: the sum of a quadratic over an arithmetic series."""
        if not decode_sequences:
            return 0.0
        fixed, linear, square = self.decode
        first = fixed + (linear + square * decode_tokens) * decode_tokens
        rise = decode_sequences * (linear + 2 * square * decode_tokens)
        bend = square * decode_sequences * decode_sequences
        return steps * (first + (steps - 1) * (rise / 2 + bend * (2 * steps - 1) / 6))
