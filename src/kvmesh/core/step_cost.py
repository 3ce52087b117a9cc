"""How long one batch step of a modelled engine takes.

    step_s = base_s
           + decode_sequences * decode_s_per_sequence     launch, sampling and the matrix rows of each sequence
           + decode_blocks    * decode_s_per_block        reading the KV blocks of the decoding sequences
           + prefill_tokens   / prefill_tokens_per_s      compute-bound

Linear on purpose: decode is bound by memory traffic (the weights, `base_s`, plus KV), prefill by arithmetic, and the
part of attention that grows with the square of a prompt is small below some 10k tokens. The defaults are those of an
8B model on a mid-size GPU: a decode step of 5 ms alone, 6.5 ms with 64 sequences of 600 tokens, 13 ms with 256
sequences of 1,000 tokens; a prompt of 512 tokens costs 34 ms.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients of the formula above."""

    base_s: float = 0.005
    decode_s_per_sequence: float = 15e-6
    decode_s_per_block: float = 1e-6
    prefill_tokens_per_s: float = 15_000.0
    """Above 0."""

    def step_s(self, *, decode_sequences: int, decode_blocks: int, prefill_tokens: int) -> float:
        """Return the modelled seconds of one step; 0 if it computes nothing.

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
