"""A Llama that learns, in numpy: the forward pass of whole rows, its gradient by hand, and AdamW.

    rows (rows, length) of tokens hold several documents each; a token attends to those before it in its own document

Every parameter is a view into one flat vector, and so is its gradient: the optimiser steps over all of them at once.
Matrices are (out, in), as in the files of Hugging Face; queries, keys and values are one matrix, gate and up another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

_HIDDEN = -1e30
"""The score of a token that must not be seen."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The architecture; the embedding is the output head too."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.hidden_size // self.heads

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter."""
        hidden, kv_size = self.hidden_size, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, hidden), "norm": (hidden,)}
        for layer in range(self.layers):
            shapes |= {
                f"{layer}.attention_norm": (hidden,),
                f"{layer}.qkv": (hidden + 2 * kv_size, hidden),
                f"{layer}.output": (hidden, hidden),
                f"{layer}.mlp_norm": (hidden,),
                f"{layer}.gate_up": (2 * self.intermediate_size, hidden),
                f"{layer}.down": (hidden, self.intermediate_size),
            }
        return shapes


@dataclass(frozen=True, slots=True)
class Rows:
    """What one step learns from."""

    tokens: Ints
    """Shape (rows, length)."""
    documents: Ints
    """Same shape: which document of its row a token belongs to."""
    weights: Floats
    """Same shape: how much it counts that this token is followed by the next one of the row; 0 at a row's end."""


class Parameters:
    """Named views into one flat vector."""

    def __init__(self, shape: Shape, dtype: npt.DTypeLike = np.float32) -> None:
        """Start with zeros."""
        self.flat: Floats = np.zeros(sum(prod(size) for size in shape.tensors.values()), dtype=dtype)
        self._views: dict[str, Floats] = {}
        start = 0
        for name, size in shape.tensors.items():
            self._views[name] = self.flat[start : start + prod(size)].reshape(size)
            start += prod(size)

    def __getitem__(self, name: str) -> Floats:
        return self._views[name]

    def views(self) -> Mapping[str, Floats]:
        """Return every parameter by name."""
        return self._views


def draw_parameters(shape: Shape, rng: np.random.Generator, dtype: npt.DTypeLike = np.float32) -> Parameters:
    """Return parameters to start from: what a layer adds to its input is small at first."""
    drawn = Parameters(shape, dtype)
    for name, tensor in drawn.views().items():
        if tensor.ndim == 1:
            tensor[:] = 1.0
            continue
        scale = 1.0 / sqrt(tensor.shape[1])
        if name.endswith(("output", "down")):
            scale /= sqrt(2 * shape.layers)
        tensor[:] = rng.standard_normal(tensor.shape) * scale
    return drawn


def loss_and_gradient(shape: Shape, parameters: Parameters, rows: Rows) -> tuple[float, Parameters]:
    """Return the mean cross entropy of the tokens that count, and its gradient."""
    gradient = Parameters(shape, parameters.flat.dtype)
    cos, sin = _turns(shape, rows.tokens.shape[1], parameters.flat.dtype)
    mask = _mask(rows.documents, parameters.flat.dtype)
    x: Floats = parameters["embed"][rows.tokens.reshape(-1)]
    layers = []
    for index in range(shape.layers):
        layer = _Layer(shape, parameters, gradient, index=index, rows=rows.tokens.shape, cos=cos, sin=sin)
        x = layer.forward(x, mask)
        layers.append(layer)

    counted = np.flatnonzero(rows.weights.reshape(-1))
    weights = rows.weights.reshape(-1)[counted]
    weights = weights / weights.sum()
    targets = rows.tokens.reshape(-1)[counted + 1]
    final = _Norm(parameters["norm"], gradient["norm"], shape.norm_eps)
    hidden = final.forward(x[counted])
    logits = hidden @ parameters["embed"].T
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    taken = np.arange(len(counted))
    loss = -float(np.sum(weights * np.log(probabilities[taken, targets] + 1e-30)))

    probabilities[taken, targets] -= 1.0
    d_logits = probabilities * weights[:, np.newaxis]
    gradient["embed"][:] = d_logits.T @ hidden
    dx = np.zeros_like(x)
    dx[counted] = final.backward(d_logits @ parameters["embed"])
    for layer in reversed(layers):
        dx = layer.backward(dx)
    np.add.at(gradient["embed"], rows.tokens.reshape(-1), dx)
    return loss, gradient


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), its gradient clipped to a norm of 1."""

    def __init__(self, parameters: Parameters, *, decay: float) -> None:
        """Change `parameters` in place."""
        self._parameters = parameters
        self._decay = decay
        self._mean = np.zeros_like(parameters.flat)
        self._square = np.zeros_like(parameters.flat)
        self._steps = 0

    def step(self, gradient: Parameters, *, rate: float) -> None:
        """Take one step against the gradient."""
        self._steps += 1
        found = gradient.flat
        found *= min(1.0, 1.0 / (float(np.linalg.norm(found)) + 1e-6))
        self._mean += 0.1 * (found - self._mean)
        self._square += 0.01 * (found * found - self._square)
        mean = self._mean / (1.0 - 0.9**self._steps)
        square = self._square / (1.0 - 0.99**self._steps)
        self._parameters.flat -= rate * (mean / (np.sqrt(square) + 1e-8) + self._decay * self._parameters.flat)


class _Norm:
    """RMSNorm of (tokens, hidden)."""

    def __init__(self, weight: Floats, gradient: Floats, eps: float) -> None:
        self._weight, self._gradient, self._eps = weight, gradient, eps

    def forward(self, x: Floats) -> Floats:
        self._scale: Floats = 1.0 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + self._eps)
        self._normed: Floats = x * self._scale
        result: Floats = self._normed * self._weight
        return result

    def backward(self, dy: Floats) -> Floats:
        self._gradient += np.sum(dy * self._normed, axis=0)
        d_normed = dy * self._weight
        along = np.mean(d_normed * self._normed, axis=1, keepdims=True)
        dx: Floats = self._scale * (d_normed - self._normed * along)
        return dx


class _Layer:
    """One decoder layer; `forward` keeps what `backward` needs."""

    def __init__(
        self, shape: Shape, parameters: Parameters, gradient: Parameters, *, index: int, rows: tuple[int, ...],
        cos: Floats, sin: Floats,
    ) -> None:  # fmt: skip
        self._shape = shape
        self._rows, self._length = rows
        self._cos, self._sin = cos, sin
        self._weight = {name: parameters[f"{index}.{name}"] for name in ("qkv", "output", "gate_up", "down")}
        self._gradient = {name: gradient[f"{index}.{name}"] for name in self._weight}
        self._norms = {
            name: _Norm(parameters[f"{index}.{name}"], gradient[f"{index}.{name}"], shape.norm_eps)
            for name in ("attention_norm", "mlp_norm")
        }

    def forward(self, x: Floats, mask: Floats) -> Floats:
        shape, weight = self._shape, self._weight
        self._h = self._norms["attention_norm"].forward(x)
        # (rows, heads, length, dim), the heads being those of queries, keys and values in this order
        by_head = (self._h @ weight["qkv"].T).reshape(self._rows, self._length, -1, shape.head_dim).swapaxes(1, 2)
        turned = _rotate(by_head[:, : shape.heads + shape.kv_heads], self._cos, self._sin)
        self._queries = self._by_group(turned[:, : shape.heads])
        self._keys = turned[:, shape.heads :, np.newaxis]
        self._values = by_head[:, shape.heads + shape.kv_heads :, np.newaxis]
        scores = self._queries @ self._keys.swapaxes(-1, -2)
        scores *= shape.head_dim**-0.5
        scores += mask
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        self._probabilities = scores
        attended = (scores @ self._values).reshape(self._rows, shape.heads, self._length, shape.head_dim)
        self._attended = attended.swapaxes(1, 2).reshape(len(x), -1)
        x = x + self._attended @ weight["output"].T

        self._h2 = self._norms["mlp_norm"].forward(x)
        gate_up = self._h2 @ weight["gate_up"].T
        self._gate, self._up = np.split(gate_up, 2, axis=1)
        self._sigmoid: Floats = 0.5 * np.tanh(0.5 * self._gate) + 0.5
        self._inner = self._gate * self._sigmoid * self._up
        result: Floats = x + self._inner @ weight["down"].T
        return result

    def backward(self, dx: Floats) -> Floats:
        weight, gradient = self._weight, self._gradient
        gradient["down"] += dx.T @ self._inner
        d_inner = dx @ weight["down"]
        swish = self._gate * self._sigmoid
        d_gate = d_inner * self._up * (self._sigmoid + swish * (1.0 - self._sigmoid))
        d_gate_up = np.concatenate((d_gate, d_inner * swish), axis=1)
        gradient["gate_up"] += d_gate_up.T @ self._h2
        dx = dx + self._norms["mlp_norm"].backward(d_gate_up @ weight["gate_up"])

        gradient["output"] += dx.T @ self._attended
        d_qkv = self._backward_attention(dx @ weight["output"])
        gradient["qkv"] += d_qkv.T @ self._h
        result: Floats = dx + self._norms["attention_norm"].backward(d_qkv @ weight["qkv"])
        return result

    def _backward_attention(self, d_attended: Floats) -> Floats:
        shape = self._shape
        by_head = d_attended.reshape(self._rows, self._length, shape.heads, shape.head_dim).swapaxes(1, 2)
        d_out = self._by_group(by_head)
        d_values = (self._probabilities.swapaxes(-1, -2) @ d_out).sum(axis=2)
        d_scores = d_out @ self._values.swapaxes(-1, -2)
        d_scores -= np.sum(d_scores * self._probabilities, axis=-1, keepdims=True)
        d_scores *= self._probabilities
        d_scores *= shape.head_dim**-0.5
        d_queries = (d_scores @ self._keys).reshape(self._rows, shape.heads, self._length, shape.head_dim)
        d_keys = (d_scores.swapaxes(-1, -2) @ self._queries).sum(axis=2)
        turned = _rotate(np.concatenate((d_queries, d_keys), axis=1), self._cos, -self._sin)
        joined = np.concatenate((turned, d_values), axis=1)
        return joined.swapaxes(1, 2).reshape(self._rows * self._length, -1)

    def _by_group(self, heads: Floats) -> Floats:
        """(rows, heads, length, dim) -> (rows, kv_heads, heads of a group, length, dim)."""
        shape = self._shape
        return heads.reshape(self._rows, shape.kv_heads, shape.heads // shape.kv_heads, self._length, shape.head_dim)


def _turns(shape: Shape, length: int, dtype: npt.DTypeLike) -> tuple[Floats, Floats]:
    frequencies = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = np.arange(length)[:, np.newaxis] * frequencies
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def _rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _mask(documents: Ints, dtype: npt.DTypeLike) -> Floats:
    """Return what is added to scores, shape (rows, 1, 1, length, length)."""
    length = documents.shape[1]
    seen = (documents[:, :, np.newaxis] == documents[:, np.newaxis, :]) & np.tri(length, dtype=bool)
    return np.where(seen, 0.0, _HIDDEN).astype(dtype)[:, np.newaxis, np.newaxis]
