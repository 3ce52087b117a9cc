"""The options of the huggingface engine, as a dataclass and as `--engine-option NAME=VALUE` text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvmesh.engines.options import check_ranges, choice, invalid_option, number, parse_options

_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


@dataclass(frozen=True, slots=True)
class HuggingFaceOptions:
    """What a huggingface engine has besides its model.

    Raises:
        FixRequestError: INVALID_FIELD, naming the option and its range.
    """

    total_blocks: int = number(1_024, 1, 2**24)
    """Blocks in the KV pool; on a CPU memory is taken when a block is first written."""
    block_size: int = number(16, 1, 65_536)
    """Tokens in a block."""
    max_sequences: int = number(64, 1, 65_536)
    """Requests that run at once; never more than `max_batched_tokens`, as each decodes one token per step."""
    max_batched_tokens: int = number(512, 1, 2**24)
    """Tokens computed in one step: one per decoding request, the rest for chunks of prompts."""
    max_context_tokens: int = number(131_072, 2, 2**31)
    """Tokens of prompt and output together; never more than the model was made for, or than the pool holds."""
    dtype: str = choice("float32", "float64", "bfloat16")
    """Of weights, arithmetic and KV. float64 for exact comparisons of tokens."""
    device: str = "cpu"
    """Where it computes: `cpu`, `cuda`, or one GPU of several as `cuda:1`."""
    threads: int = number(0, 0, 4_096)
    """CPU threads of torch in this process; 0 = all cores, too many where several workers share a machine."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a sequence. As text: `1,2`."""

    def __post_init__(self) -> None:
        """Check every range."""
        check_ranges(self)
        if not _DEVICE.fullmatch(self.device):
            raise invalid_option("device", f"is {self.device!r}, not cpu, cuda or cuda:N")


def parse(options: Mapping[str, str]) -> HuggingFaceOptions:
    """Read options from text. Raises: FixRequestError(INVALID_FIELD) as `parse_options`."""
    return parse_options(HuggingFaceOptions, options, engine="huggingface")
