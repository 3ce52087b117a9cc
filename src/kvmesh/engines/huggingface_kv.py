"""The KV of a transformers model in blocks of ours, and the cache class through which the model sees it.

    row((block, layer, 0 or 1, head, token)) = one vector of head_dim numbers      0 = keys, 1 = values

A model hands its new keys and values to `PagedLayer.update`, layer by layer; they are written into their blocks, and
all that the tokens may see is gathered back. Sequences of a batch end in one column: shorter ones are padded on the
left, as transformers itself batches them, with a row of their own (finite, and masked).

On a GPU the blocks live twice: in `memory`, where transports read and write, and on the device. What is computed goes
to both; what arrives from elsewhere is taken over before it is first read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvmesh.engines.numpy_llama_forward import Span

Tensor = Any
"""torch.Tensor: the package may be missing where types are checked."""
ORDER = "layer,kv,head,token,dim"
"""Of the axes in a block."""
BLANK_BYTE = 0xFF
"""Bytes that no number of a KV cache consists of: as float32, float64 and bfloat16 they are a NaN."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token of a model leaves in its cache."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Any
    """torch.dtype."""

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        """Return the axes of a block, in `ORDER`."""
        return self.layers, 2, self.kv_heads, block_size, self.head_dim

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of a block."""
        return prod(self.block_shape(block_size)) * int(self.dtype.itemsize)


class BlockKv:
    """The blocks of one engine, in memory of its caller's and, if need be, on a device."""

    def __init__(
        self, memory: npt.NDArray[np.uint8], shape: KvShape, *, block_size: int, device: str, is_mirrored: bool
    ) -> None:
        """Take `memory`, (blocks, bytes of a block); mirrored: `device` cannot compute on it."""
        self.shape = shape
        self.block_size = block_size
        self.device = torch.device(device)
        self._memory = memory
        self._blocks = torch.from_numpy(memory).view(shape.dtype)
        self._rows_per_layer = 2 * shape.kv_heads * block_size
        self._mirror = torch.zeros_like(self._blocks, device=self.device) if is_mirrored else None
        self._foreign: set[int] = set()
        """Blocks that others may have written since the device saw them."""
        self._head_rows = (
            torch.arange(2 * shape.kv_heads, device=self.device).view(2, 1, shape.kv_heads, 1) * block_size
        )

    def expect(self, blocks: Iterable[int]) -> None:
        """Make blocks blank that others are about to write."""
        chosen = list(blocks)
        self._memory[chosen] = BLANK_BYTE
        if self._mirror is not None:
            self._foreign.update(chosen)

    def is_whole(self, block: int) -> bool:
        """Tell whether every number of a block can be KV, and not all are zero, as memory that nobody wrote."""
        return bool(torch.isfinite(self._blocks[block]).all()) and bool(self._memory[block].any())

    def open(self, spans: Sequence[Span]) -> "PagedStep":
        """Prepare a forward pass over spans of equally many tokens."""
        return PagedStep(self, spans)

    def rows(self, layer: int) -> Tensor:
        """Return the rows to compute on, a layer's first one first: those of another layer lie behind or before."""
        held = self._blocks if self._mirror is None else self._mirror
        return held.view(-1, self.shape.head_dim)[layer * self._rows_per_layer :]

    def row_indices(self, spans: Sequence[Span], positions: npt.NDArray[np.intp]) -> Tensor:
        """Return the rows of layer 0, (2, spans, kv_heads, columns), of each span's `positions`."""
        block_rows = self.shape.layers * self._rows_per_layer
        places = np.empty(positions.shape, dtype=np.int64)
        for place, span, wanted in zip(places, spans, positions, strict=True):
            indices, offsets = np.divmod(wanted, self.block_size)
            place[:] = np.asarray(span.blocks, dtype=np.int64)[indices] * block_rows + offsets
        return self._head_rows + torch.from_numpy(places).to(self.device)[None, :, None, :]

    def take_over(self, spans: Sequence[Span]) -> None:
        """Bring what others wrote of the spans' blocks to the device."""
        if self._mirror is None or not self._foreign:
            return
        arrived = sorted(self._foreign & {block for span in spans for block in span.blocks})
        if arrived:
            self._mirror[arrived] = self._blocks[arrived].to(self.device)
            self._foreign.difference_update(arrived)

    def give_out(self, written: Tensor) -> None:
        """Bring rows that were computed, given as those of layer 0, from the device to where others read them."""
        if self._mirror is None:
            return
        layers = torch.arange(self.shape.layers, device=self.device)[:, None] * self._rows_per_layer
        rows = (layers + written.flatten()).flatten()
        self._blocks.view(-1, self.shape.head_dim).index_copy_(0, rows.cpu(), self.rows(0).index_select(0, rows).cpu())


class PagedStep:
    """One forward pass: what each column of the batch is, and the cache that reads and writes the blocks."""

    def __init__(self, kv: BlockKv, spans: Sequence[Span]) -> None:
        """Line the spans up by their last tokens."""
        stops = np.array([span.stop for span in spans])
        count, reach = len(spans[0].token_ids), int(stops.max())
        columns = np.arange(reach) - (reach - stops)[:, np.newaxis]
        kv.take_over(spans)
        self.reads = kv.row_indices(spans, np.maximum(columns, 0))
        self.writes = self.reads[..., reach - count :].flatten()
        self.seen = reach - count
        self.token_ids = torch.from_numpy(np.stack([span.token_ids for span in spans]).astype(np.int64)).to(kv.device)
        self.positions = torch.from_numpy(np.ascontiguousarray(columns[:, reach - count :])).to(kv.device)
        self.mask = torch.from_numpy((columns >= 0).astype(np.int64)).to(kv.device)
        """(spans, reach): 0 where a shorter sequence is padded."""
        self.cache = Cache(layers=[PagedLayer(kv, self, layer) for layer in range(kv.shape.layers)])


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # the package may be missing where types are checked
    """One layer of a step's cache."""

    is_sliding = False

    def __init__(self, kv: BlockKv, step: PagedStep, layer: int) -> None:
        """Begin before the step's new tokens."""
        super().__init__()
        self._rows = kv.rows(layer)
        self._step = step
        self._seen = step.seen
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to make: the blocks are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' (spans, kv_heads, tokens, head_dim); return those of all that they see."""
        new = torch.stack((key_states, value_states))
        self._rows.index_copy_(0, self._step.writes, new.reshape(-1, new.shape[-1]))
        self._seen = self._step.seen + key_states.shape[-2]
        reads = self._step.reads
        keys, values = self._rows.index_select(0, reads.flatten()).view(*reads.shape, -1)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens the queries see, themselves included, and from which on."""
        return self._step.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens in the cache, padding included."""
        return self._seen

    def get_max_length(self) -> int:
        """Return that there is no most: the batch sees to it."""
        return -1
