"""The forward pass of a Llama model over a paged KV cache: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    kv[block, layer, 0 or 1, token, head, dim]      0 = keys, turned by RoPE already; 1 = values

A span is a run of tokens of one sequence whose KV is not computed yet, while that of everything before it is. All spans
of a call share the matrix products; attention is computed span by span. A row's result depends on the other rows only
by the rounding of those products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.engines.numpy_llama_config import LlamaConfig
from kvmesh.engines.numpy_llama_weights import Floats, LlamaWeights

_MAX_SCORES = 2**24
"""Attention scores held at once: a long span over a long sequence is computed in parts."""


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
    """Computes spans with one model; stateless but for what follows from its configuration."""

    def __init__(self, weights: LlamaWeights) -> None:
        """Compute in the dtype of the weights."""
        self._weights = weights
        self._config = weights.config
        self._frequencies = rope_frequencies(weights.config)

    def compute(self, spans: Sequence[Span], kv: Floats) -> Floats:
        """Write the KV of every span into `kv` and return the hidden state of its last token (spans, hidden_size)."""
        config, weights = self._config, self._weights
        positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        ends = np.cumsum([len(span.token_ids) for span in spans])
        blocks, offsets = _slots(spans, block_size=kv.shape[3])
        angles = positions[:, np.newaxis, np.newaxis] * self._frequencies
        cos, sin = np.cos(angles).astype(weights.dtype), np.sin(angles).astype(weights.dtype)
        x: Floats = weights.embedding[np.concatenate([span.token_ids for span in spans])]
        for index, layer in enumerate(weights.layers):
            projected = _rms_norm(x, layer.attention_norm, config.norm_eps) @ layer.qkv
            by_head = projected.reshape(len(x), -1, config.head_dim)
            queries, keys, values = np.split(by_head, (config.heads, config.heads + config.kv_heads), axis=1)
            turned = _rotate(queries, cos, sin)
            kv[blocks, index, 0, offsets] = _rotate(keys, cos, sin)
            kv[blocks, index, 1, offsets] = values
            attended = [
                self._attend(turned[end - len(span.token_ids) : end], span, kv, index)
                for span, end in zip(spans, ends, strict=True)
            ]
            x = x + np.concatenate(attended) @ layer.output
            gate, up = np.split(_rms_norm(x, layer.mlp_norm, config.norm_eps) @ layer.gate_up, 2, axis=1)
            x = x + (_silu(gate) * up) @ layer.down
        last: Floats = x[ends - 1]
        return last

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits of hidden states, shape (rows, vocab_size)."""
        result: Floats = _rms_norm(hidden, self._weights.norm, self._config.norm_eps) @ self._weights.head
        return result

    def _attend(self, queries: Floats, span: Span, kv: Floats, layer: int) -> Floats:
        """Attend from the span's queries (tokens, heads, head_dim) to everything up to each; (tokens, heads x dim)."""
        config = self._config
        used = np.asarray(span.blocks[: -(-span.stop // kv.shape[3])])
        keys, values = (
            kv[used, layer, which].reshape(-1, config.kv_heads, config.head_dim)[: span.stop] for which in (0, 1)
        )
        part = max(_MAX_SCORES // (config.heads * span.stop), 1)
        parts = []
        for first in range(0, len(queries), part):
            some = queries[first : first + part]
            stop = span.start + first + len(some)
            parts.append(_attention(some, keys[:stop], values[:stop]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


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


def _slots(spans: Sequence[Span], *, block_size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return, for each row of the spans, the block that takes its KV and the token's place in it."""
    blocks, offsets = [], []
    for span in spans:
        indices, places = np.divmod(np.arange(span.start, span.stop), block_size)
        blocks.append(np.asarray(span.blocks)[indices])
        offsets.append(places)
    return np.concatenate(blocks), np.concatenate(offsets)


def _attention(queries: Floats, keys: Floats, values: Floats) -> Floats:
    """Attend from the last `len(q)` positions (tokens, heads, dim) to all of `keys` (positions, kv_heads, dim)."""
    count, heads, dim = queries.shape
    stop, kv_heads, _ = keys.shape
    group = heads // kv_heads
    # The queries of a group meet the same keys: they are rows of one matrix per KV head.
    rows = queries.reshape(count, kv_heads, group, dim).transpose(1, 2, 0, 3).reshape(kv_heads, group * count, dim)
    scores = (rows * dim**-0.5) @ keys.transpose(1, 2, 0)
    if count > 1:
        future = np.triu(np.ones((count, count), dtype=bool), k=1)
        scores.reshape(kv_heads, group, count, stop)[..., stop - count :][..., future] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    by_group: Floats = (scores @ values.transpose(1, 0, 2)).reshape(kv_heads, group, count, dim)
    return by_group.transpose(2, 0, 1, 3).reshape(count, heads * dim)


def _rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    normed: Floats = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return normed


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Turn each pair (i, i + head_dim / 2) of (tokens, heads, head_dim) by the angle of its position."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _silu(x: Floats) -> Floats:
    """x * sigmoid(x), by tanh, which does not overflow."""
    result: Floats = x * (0.5 * np.tanh(0.5 * x) + 0.5)
    return result
