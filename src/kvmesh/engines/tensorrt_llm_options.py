"""What the tensorrt_llm engine can be told."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvmesh.engines.options import check_ranges, choice, number, parse_options


@dataclass(frozen=True, slots=True)
class TensorRtLlmOptions:
    """Options of the engine. Raises: FixRequestError(INVALID_FIELD), naming the option and its range."""

    max_sequences: int = number(256, 1, 65_536)
    """Requests in a batch: `max_batch_size`."""
    max_num_tokens: int = number(8_192, 1, 2**31)
    """Tokens computed in one step."""
    max_context_tokens: int = number(0, 0, 2**31)
    """Of prompt and output together: `max_seq_len`; 0 = the model's."""
    block_size: int = number(32, 1, 65_536)
    """Tokens in a block of its KV cache: `tokens_per_block`."""
    tensor_parallel: int = number(1, 1, 1_024)
    """GPUs that share the model."""
    gpu_memory_fraction: float = number(0.9, 0.01, 1.0)
    """Of what the weights leave free, for the KV cache."""
    event_buffer: int = number(1_024, 0, 2**31)
    """KV events it keeps until they are read; 0 = it tells none."""
    transceiver: str = choice("none", "DEFAULT", "UCX", "NIXL", "MPI")
    """What it moves its own KV with, from prefill to decode; none = every request runs here from its first token."""
    first_token_s: float = number(30.0, 0.01, 3_600.0)
    """Longest wait for a request's first output."""
    token_gap_s: float = number(10.0, 0.01, 3_600.0)
    """Longest wait between two outputs of a request."""
    poll_s: float = number(0.05, 0.001, 60.0)
    """Between two questions for KV events, and for figures."""

    def __post_init__(self) -> None:
        """Check every range."""
        check_ranges(self)


def parse(options: Mapping[str, str]) -> TensorRtLlmOptions:
    """Read options from text. Raises: FixRequestError(INVALID_FIELD) as `parse_options`."""
    return parse_options(TensorRtLlmOptions, options, engine="tensorrt_llm")
