"""The options of the numpy_llama engine, as a dataclass and as `--engine-option NAME=VALUE` text."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvmesh.engines.options import check_ranges, choice, number, parse_options


@dataclass(frozen=True, slots=True)
class NumpyLlamaOptions:
    """What a numpy_llama engine has besides its model.

    Raises:
        FixRequestError: INVALID_FIELD, naming the option and its range.
    """

    total_blocks: int = number(1_024, 1, 2**24)
    """Blocks in the KV pool; memory is taken when a block is first written."""
    block_size: int = number(16, 1, 65_536)
    """Tokens in a block."""
    max_sequences: int = number(64, 1, 65_536)
    """Requests that run at once; never more than `max_batched_tokens`, as each decodes one token per step."""
    max_batched_tokens: int = number(512, 1, 2**24)
    """Tokens computed in one step: one per decoding request, the rest for chunks of prompts."""
    max_context_tokens: int = number(131_072, 2, 2**31)
    """Tokens of prompt and output together; never more than the model was made for, or than the pool holds."""
    dtype: str = choice("float32", "float64")
    """Of weights, arithmetic and KV. float64 for exact comparisons of tokens."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a sequence. As text: `1,2`."""

    def __post_init__(self) -> None:
        """Check every range."""
        check_ranges(self)


def parse(options: Mapping[str, str]) -> NumpyLlamaOptions:
    """Read options from text. Raises: FixRequestError(INVALID_FIELD) as `parse_options`."""
    return parse_options(NumpyLlamaOptions, options, engine="numpy_llama")
