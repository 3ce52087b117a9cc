"""The options of the simulated engine, as a dataclass and as `--engine-option NAME=VALUE` text."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvmesh.core.step_cost import StepCost
from kvmesh.engines.options import check_ranges, invalid_option, number, parse_options

_COST = StepCost()
_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class SimulatedOptions:
    """What a simulated engine has and how long its steps take.

    Raises:
        FixRequestError: INVALID_FIELD, naming the option and its range.
    """

    total_blocks: int = number(16_384, 1, 2**24)
    """Blocks in the KV pool."""
    block_size: int = number(64, 1, 65_536)
    """Tokens in a block."""
    block_bytes: int = number(64, _HASH_BYTES, 2**24)
    """Bytes of real memory per block, a multiple of 8; what a transport moves."""
    max_sequences: int = number(256, 1, 65_536)
    """Requests that run at once; never more than `max_batched_tokens`, as each decodes one token per step."""
    max_batched_tokens: int = number(8_192, 1, 2**24)
    """Tokens computed in one step: one per decoding request, the rest for chunks of prompts."""
    max_context_tokens: int = number(131_072, 2, 2**31)
    """Tokens of prompt and output together; never more than the pool holds."""
    vocab_size: int = number(32_000, 1, 2**24)
    """Token ids are 0 .. vocab_size - 1."""
    output_token_ids: tuple[int, ...] = ()
    """Ids that output is drawn from; () = the whole vocabulary but `eos_token_ids`. As text: `5,6,32-126`."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a sequence; the first of them is the one that is produced. As text: `1,2`."""
    eos_rate: float = number(0.0, 0.0, 1.0)
    """Probability, per output token, that the sequence ends there; 0 = every output has `max_tokens` tokens."""
    step_base_s: float = number(_COST.base_s, 0.0, 60.0)
    """Seconds of a step, whatever is in it."""
    decode_s_per_sequence: float = number(_COST.decode_s_per_sequence, 0.0, 60.0)
    """Seconds that each decoding request adds to a step."""
    decode_s_per_block: float = number(_COST.decode_s_per_block, 0.0, 60.0)
    """Seconds that each block of a decoding request adds to a step."""
    prefill_tokens_per_s: float = number(_COST.prefill_tokens_per_s, 1e-3, 1e12)
    """Prompt tokens computed per second."""
    speedup: float = number(1.0, 0.0, 1e9)
    """Divides every duration; 0 = as fast as the machine can."""

    def __post_init__(self) -> None:
        """Check every range and what ties options together."""
        check_ranges(self)
        if self.block_bytes % _HASH_BYTES:
            raise invalid_option("block_bytes", f"is {self.block_bytes}, not a multiple of {_HASH_BYTES}")
        for name in ("output_token_ids", "eos_token_ids"):
            outside = [token for token in getattr(self, name) if not 0 <= token < self.vocab_size]
            if outside:
                raise invalid_option(name, f"has {outside[0]}, not in 0..{self.vocab_size - 1}")
        if self.eos_rate and not self.eos_token_ids:
            raise invalid_option("eos_rate", "is above 0, but eos_token_ids is empty")
        if not self.output_token_ids and len(set(self.eos_token_ids)) == self.vocab_size:
            raise invalid_option("eos_token_ids", "leaves no token to draw output from")

    @property
    def step_cost(self) -> StepCost:
        """The cost model, at speedup 1."""
        return StepCost(
            self.step_base_s, self.decode_s_per_sequence, self.decode_s_per_block, self.prefill_tokens_per_s
        )


def parse(options: Mapping[str, str]) -> SimulatedOptions:
    """Read options from text. Raises: FixRequestError(INVALID_FIELD) as `parse_options`."""
    return parse_options(SimulatedOptions, options, engine="simulated")
