"""Attention of the rows of one step over a paged KV cache: decoding rows together, a chunk of a prompt by itself.

Rows that decode have one query and many keys each: those of like length are padded to the longest and computed at
once. A padded place may hold anything, NaN included: its score becomes -inf, and its value 0.
"""

from collections.abc import Sequence
from math import prod
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmesh.engines.numpy_llama_weights import Floats

Ints = npt.NDArray[np.intp]

_MAX_SCORES = 2**24
"""Attention scores held at once: a long chunk over a long sequence is computed in parts."""
_MAX_GATHERED = 2**25
"""Numbers of keys and values copied out of their blocks at once, unless a single sequence has more."""
_ALWAYS_PADDED_TOKENS = 64
_MAX_PADDING = 2
"""A row is computed with those up to so many times as long, and a little more: padding costs less than another call."""


class Scratch:
    """Memory for copies that do not outlive the next: fresh memory for each would cost more than the copying."""

    def __init__(self) -> None:
        """Start with none."""
        self._numbers: Floats = np.empty(0)

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Floats:
        """Return an array of anything; the next call overwrites it."""
        size = prod(shape)
        if size > len(self._numbers) or self._numbers.dtype != dtype:
            self._numbers = np.empty(size, dtype=dtype)
        return self._numbers[:size].reshape(shape)


class Attention(Protocol):
    """Some rows of a step, and the KV that they see."""

    @property
    def rows(self) -> Ints | slice:
        """Which rows of the step."""

    def attend(self, queries: Floats, layer: int) -> Floats:
        """Attend from (rows, heads, head_dim); return (rows, heads x head_dim). The rows' own KV is written already."""


def plan_attention(
    blocks: Sequence[Sequence[int]],
    positions: Ints,
    counts: Sequence[int],
    kv: Floats,
    *,
    heads: int,
    scratch: Scratch,
) -> list[Attention]:
    """Return attentions that take every row once: `counts[i]` rows in order, at `positions`, of the sequence i.

    `blocks` are those of each sequence from its block 0 on; `scratch` is used until the last attention is.
    """
    plan: list[Attention] = []
    singles: list[int] = []
    first_rows: Ints = np.cumsum(counts) - np.asarray(counts)
    for index, count in enumerate(counts):
        if count == 1:
            singles.append(index)
            continue
        first = int(first_rows[index])
        start = int(positions[first])
        used = blocks[index][: -(-(start + count) // kv.shape[3])]
        paged = _Paged(np.asarray(used, dtype=np.intp)[np.newaxis], kv, scratch)
        plan.append(_Chunk(paged, slice(first, first + count), start=start))
    if singles:
        rows = first_rows[singles]
        stops: Ints = positions[rows] + 1
        numbers_of_a_position = max(heads, 2 * kv.shape[4] * kv.shape[5])
        plan += [
            _Decodes(
                _Paged(_tables([blocks[singles[place]] for place in group], stops[group], kv), kv, scratch),
                rows[group],
                stops[group],
            )
            for group in _group(stops, most=_MAX_GATHERED // numbers_of_a_position)
        ]
    return plan


class _Paged:
    """Reads keys and values of sequences out of their blocks."""

    def __init__(self, tables: Ints, kv: Floats, scratch: Scratch) -> None:
        """Read the blocks `tables` (sequences, blocks)."""
        assert kv.flags.c_contiguous, "what is written later would not be seen"
        _, layers, _, block_size, kv_heads, head_dim = kv.shape
        self._blocks: Floats = kv.reshape(-1, block_size * kv_heads * head_dim)
        # Of the keys of layer 0, and of the values: those of another layer lie 2 rows further.
        self._table = np.stack((tables, tables)) * (2 * layers) + np.arange(2)[:, np.newaxis, np.newaxis]
        self._shape = (2, len(tables), tables.shape[1] * block_size, kv_heads, head_dim)
        self._scratch = scratch

    def read(self, layer: int) -> tuple[Floats, Floats]:
        """Return copies of keys and values, (sequences, positions, kv_heads, head_dim), until the next read."""
        copied = self._scratch.array((*self._table.shape, self._blocks.shape[1]), self._blocks.dtype)
        # No index is out of range; to raise for one, numpy would copy twice.
        self._blocks.take(self._table + 2 * layer, axis=0, out=copied, mode="clip")
        keys, values = copied.reshape(self._shape)
        return keys, values


class _Decodes:
    """The last tokens of several sequences, a row each."""

    def __init__(self, paged: _Paged, rows: Ints, stops: Ints) -> None:
        self.rows: Ints | slice = rows
        longest, shortest = int(stops.max()), int(stops.min())
        self._paged = paged
        self._longest, self._shortest = longest, shortest
        self._padding = np.arange(shortest, longest) >= stops[:, np.newaxis]

    def attend(self, queries: Floats, layer: int) -> Floats:
        count, heads, dim = queries.shape
        keys, values = self._paged.read(layer)
        kv_heads = keys.shape[2]
        rows = queries.reshape(count, kv_heads, heads // kv_heads, dim)
        scores = (rows * dim**-0.5) @ keys[:, : self._longest].transpose(0, 2, 3, 1)
        if self._shortest < self._longest:
            ragged = scores[..., self._shortest :]
            np.copyto(ragged, -np.inf, where=self._padding[:, np.newaxis, np.newaxis])
            values[:, self._shortest : self._longest][self._padding] = 0.0
        _softmax(scores)
        attended: Floats = scores @ values[:, : self._longest].transpose(0, 2, 1, 3)
        return attended.reshape(count, heads * dim)


class _Chunk:
    """A run of tokens of one sequence."""

    def __init__(self, paged: _Paged, rows: slice, *, start: int) -> None:
        self.rows: Ints | slice = rows
        self._paged = paged
        self._start = start
        self._stop = start + rows.stop - rows.start

    def attend(self, queries: Floats, layer: int) -> Floats:
        (keys,), (values,) = self._paged.read(layer)
        part = max(_MAX_SCORES // (queries.shape[1] * self._stop), 1)
        parts = []
        for first in range(0, len(queries), part):
            some = queries[first : first + part]
            stop = self._start + first + len(some)
            parts.append(_attend_causally(some, keys[:stop], values[:stop]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _tables(blocks: Sequence[Sequence[int]], stops: Ints, kv: Floats) -> Ints:
    """Return the blocks of sequences up to their stops, (sequences, blocks), each padded with one of its own."""
    tables = np.empty((len(blocks), -(-int(stops.max()) // kv.shape[3])), dtype=np.intp)
    for table, held in zip(tables, blocks, strict=True):
        used = held[: len(table)]
        table[: len(used)] = used
        table[len(used) :] = used[-1]
    return tables


def _group(stops: Ints, *, most: int) -> list[Ints]:
    """Return groups of like lengths, longest first, of at most `most` padded positions unless one row has more."""
    order = np.argsort(-stops, kind="stable")
    lengths = stops[order]
    groups, first = [], 0
    while first < len(order):
        longest = int(lengths[first])
        shortest = (longest - _ALWAYS_PADDED_TOKENS) / _MAX_PADDING
        last = int(np.searchsorted(-lengths, -shortest, side="right"))
        last = min(last, first + max(most // longest, 1))
        groups.append(np.sort(order[first:last]))
        first = last
    return groups


def _attend_causally(queries: Floats, keys: Floats, values: Floats) -> Floats:
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
    _softmax(scores)
    by_group: Floats = (scores @ values.transpose(1, 0, 2)).reshape(kv_heads, group, count, dim)
    return by_group.transpose(2, 0, 1, 3).reshape(count, heads * dim)


def _softmax(scores: Floats) -> None:
    """Turn scores into weights that sum to 1 along the last axis, in place."""
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= np.add.reduce(scores, axis=-1, keepdims=True)
