"""The forward pass of a Llama model over a paged KV cache: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    kv[block, layer, 0 or 1, token, head, dim]      0 = keys, turned by RoPE already; 1 = values

A span is a run of tokens of one sequence whose KV is not computed yet, while that of everything before it is. All spans
of a call share the matrix products. A row's result depends on the other rows only by the rounding of those products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.engines.numpy_llama_attention import Attention, Ints, Scratch, plan_attention
from kvmesh.engines.numpy_llama_config import LlamaConfig
from kvmesh.engines.numpy_llama_weights import Floats, LayerWeights, LlamaWeights


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens at the positions `start .. start + len(token_ids) - 1` of one sequence."""

    token_ids: npt.NDArray[np.uint32]
    start: int
    blocks: Sequence[int]
    """Of the sequence, from its block 0 on; they hold the KV before `start` and take that of the span."""

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + len(self.token_ids)


class LlamaForward:
    """Computes spans with one model, on one thread: between calls it keeps nothing but memory to work in."""

    def __init__(self, weights: LlamaWeights) -> None:
        """Compute in the dtype of the weights."""
        self._weights = weights
        self._config = weights.config
        self._frequencies = rope_frequencies(weights.config)
        self._scratch = Scratch()

    def compute(self, spans: Sequence[Span], kv: Floats) -> Floats:
        """Write the KV of every span into `kv` and return the hidden state of its last token (spans, hidden_size)."""
        weights = self._weights
        counts = [len(span.token_ids) for span in spans]
        positions, blocks, offsets = _slots(spans, counts, block_size=kv.shape[3])
        angles = positions[:, np.newaxis, np.newaxis] * self._frequencies
        cos, sin = np.cos(angles).astype(weights.dtype), np.sin(angles).astype(weights.dtype)
        attentions = plan_attention(
            [span.blocks for span in spans], positions, counts, kv, heads=self._config.heads, scratch=self._scratch
        )
        x: Floats = weights.embedding[np.concatenate([span.token_ids for span in spans])]
        for index, layer in enumerate(weights.layers):
            by_head = self._project(x, layer, cos, sin)
            kv[blocks, index, :, offsets] = by_head[:, self._config.heads :].reshape(
                len(x), 2, self._config.kv_heads, self._config.head_dim
            )
            x = x + self._attend(by_head[:, : self._config.heads], attentions, index) @ layer.output
            x = x + self._feed_forward(x, layer)
        last: Floats = x[np.cumsum(counts) - 1]
        return last

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits of hidden states, shape (rows, vocab_size)."""
        result: Floats = _rms_norm(hidden, self._weights.norm, self._config.norm_eps) @ self._weights.head
        return result

    def _project(self, x: Floats, layer: LayerWeights, cos: Floats, sin: Floats) -> Floats:
        """Return queries, keys, both turned, and values: (rows, heads + 2 kv_heads, head_dim)."""
        config = self._config
        projected: Floats = _rms_norm(x, layer.attention_norm, config.norm_eps) @ layer.qkv
        by_head = projected.reshape(len(x), -1, config.head_dim)
        _rotate(by_head[:, : config.heads + config.kv_heads], cos, sin)
        return by_head

    def _attend(self, queries: Floats, attentions: Sequence[Attention], layer: int) -> Floats:
        """Return what every row of (rows, heads, head_dim) attends to, (rows, heads x head_dim)."""
        if len(attentions) == 1:  # its rows are all rows, and in order
            return attentions[0].attend(queries, layer)
        attended = np.empty((len(queries), self._config.heads * self._config.head_dim), dtype=queries.dtype)
        for attention in attentions:
            attended[attention.rows] = attention.attend(queries[attention.rows], layer)
        return attended

    def _feed_forward(self, x: Floats, layer: LayerWeights) -> Floats:
        gate_up = _rms_norm(x, layer.mlp_norm, self._config.norm_eps) @ layer.gate_up
        inner = self._config.intermediate_size
        gated = _silu(gate_up[:, :inner])
        gated *= gate_up[:, inner:]
        result: Floats = gated @ layer.down
        return result


def rope_frequencies(config: LlamaConfig) -> npt.NDArray[np.float64]:
    """Return the angle per position of each pair of dimensions, shape (head_dim / 2,)."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # 1 where a pair turns often enough within the original context to be kept, 0 where it is to be stretched.
    turns = scaling.original_max_context_tokens * frequencies / (2 * np.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    scaled: npt.NDArray[np.float64] = frequencies * (kept + (1.0 - kept) / scaling.factor)
    return scaled


def _slots(spans: Sequence[Span], counts: Sequence[int], *, block_size: int) -> tuple[Ints, Ints, Ints]:
    """Return, for each row of the spans, its position, the block that takes its KV, and the token's place in that."""
    if max(counts) == 1:
        positions = np.array([span.start for span in spans])
        blocks = np.array([span.blocks[span.start // block_size] for span in spans])
        return positions, blocks, positions % block_size
    positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    indices, offsets = np.divmod(positions, block_size)
    ends = np.cumsum(counts)
    blocks = np.concatenate(
        [
            np.asarray(span.blocks)[indices[end - count : end]]
            for span, count, end in zip(spans, counts, ends, strict=True)
        ]
    )
    return positions, blocks, offsets


def _rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    mean = np.add.reduce(x * x, axis=-1, keepdims=True) / x.shape[-1]
    normed: Floats = x / np.sqrt(mean + eps) * weight
    return normed


def _rotate(x: Floats, cos: Floats, sin: Floats) -> None:
    """Turn each pair (i, i + head_dim / 2) of (tokens, heads, head_dim), in place, by the angle of its position."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = first * cos - second * sin
    second[...] = second * cos + first * sin
    first[...] = turned


def _silu(x: Floats) -> Floats:
    """x * sigmoid(x), by tanh, which does not overflow."""
    sigmoid: Floats = np.tanh(0.5 * x)
    sigmoid *= 0.5
    sigmoid += 0.5
    sigmoid *= x
    return sigmoid
