"""The port between a paged batch, which keeps the books, and the model behind it, which fills blocks."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kvmesh.core.ids import SequenceHash
from kvmesh.engines.engine import EngineRequest, KvLayout
from kvmesh.engines.paged_request import PagedRequest

R = TypeVar("R", bound=PagedRequest)
Allocate = Callable[[int, int], npt.NDArray[np.uint8]]
"""Takes blocks and bytes per block, returns a zeroed pool of this shape: where it lies is the caller's business."""


def allocate_here(blocks: int, block_bytes: int) -> npt.NDArray[np.uint8]:
    """Return a pool in this process's own memory, which is taken when a block is first written."""
    return np.zeros((blocks, block_bytes), dtype=np.uint8)


class PagedOptions(Protocol):
    """What a paged engine has, whatever its model; see the options of each engine."""

    @property
    def total_blocks(self) -> int:
        """Blocks in the KV pool."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""

    @property
    def max_sequences(self) -> int:
        """Requests that run at once."""

    @property
    def max_batched_tokens(self) -> int:
        """Tokens computed in one step."""

    @property
    def max_context_tokens(self) -> int:
        """Tokens of prompt and output together."""


class PagedModel(Protocol[R]):
    """Computes the KV of requests into the blocks that the batch gave them; it owns the bytes, never the blocks."""

    @property
    def layout(self) -> KvLayout:
        """The shape of a block."""

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """The pool as bytes, shape (total_blocks, bytes_per_block)."""

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 .. vocab_size - 1."""

    @property
    def max_context_tokens(self) -> int:
        """Tokens of prompt and output together that it can attend to."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence."""

    def open(self, request: EngineRequest, *, limit: int, arrival: int) -> R:
        """Return the state of a new request; arguments as in `PagedRequest`."""

    def compute_prompt(self, request: R, *, stop: int) -> None:
        """Write the KV of `request.computed .. stop - 1`; at its target the request can draw, unless prefill-only."""

    def compute_decode(self, requests: Sequence[R]) -> None:
        """Write the KV of each request's last token; then each can draw the next one."""

    def seal(self, block: int, block_hash: SequenceHash) -> None:
        """Learn that a block is whole, just before others may see it."""

    def blank(self, blocks: Sequence[int]) -> None:
        """Make blocks that are about to be imported tell-tale: what was there cannot pass for what should arrive."""

    def find_wrong(self, blocks: Sequence[int], block_hashes: Sequence[SequenceHash]) -> list[int]:
        """Return the indices of imported blocks that cannot be what their hashes name, as far as the model can tell."""

    def step_s(self, *, decode_sequences: int, decode_blocks: int, prefill_tokens: int) -> float:
        """Return the modelled seconds that a step still has to take; 0 if its time has passed in computing it."""
