"""The weights of a Llama model, read from the safetensors files of its folder and laid out for the forward pass."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from xxhash import xxh3_128

from kvmesh.engines.numpy_llama_config import LlamaConfig, unusable_model

Floats = npt.NDArray[np.floating[Any]]

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_HEADER_LENGTH_BYTES = 8
_MAX_COPIED_HEAD_BYTES = 2**26
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; matrices are (in, out), contiguous: products with few rows are then some times as fast."""

    attention_norm: Floats
    qkv: Floats
    """Queries of every head, then keys, then values."""
    output: Floats
    mlp_norm: Floats
    gate_up: Floats
    """The gate, then what it gates."""
    down: Floats


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A model in memory: read-only, and shared by every engine that runs it."""

    config: LlamaConfig
    embedding: Floats
    """Shape (vocab_size, hidden_size)."""
    layers: tuple[LayerWeights, ...]
    norm: Floats
    head: Floats
    """Shape (hidden_size, vocab_size)."""
    fingerprint: str
    """Of the architecture and every stored weight: equal in each process that loads the same model, however sharded."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of every array."""
        return self.embedding.dtype


def check_weight_files(folder: Path) -> None:
    """Refuse a folder without weights before time is spent on others. Raises: FixRequestError(INVALID_FIELD)."""
    _weight_files(folder)


def load_weights(folder: Path, *, dtype: str) -> LlamaWeights:
    """Read a model as float32 or float64; blocks on the disk.

    Raises:
        FixRequestError: INVALID_FIELD on engine.model, naming the file or tensor that is missing or broken.
    """
    config = LlamaConfig.read(folder)
    stored: dict[str, npt.NDArray[Any]] = {}
    for file in _weight_files(folder):
        stored |= _map_tensors(folder, file)
    tensors = _Tensors(folder, stored, np.dtype(dtype))
    embedding = tensors.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    head = embedding if config.has_tied_head else tensors.take("lm_head.weight", config.vocab_size, config.hidden_size)
    return LlamaWeights(
        config=config,
        embedding=embedding,
        layers=tuple(_layer(tensors, config, index) for index in range(config.layers)),
        norm=tensors.take("model.norm.weight", config.hidden_size),
        # A large head that is the embedding too is not worth a second copy: its products are long in any layout.
        head=head.T if config.has_tied_head and head.nbytes > _MAX_COPIED_HEAD_BYTES else _turned(head),
        fingerprint=_fingerprint(config, stored),
    )


@dataclass(frozen=True, slots=True)
class _Tensors:
    folder: Path
    stored: Mapping[str, npt.NDArray[Any]]
    dtype: np.dtype[Any]

    def take(self, name: str, *shape: int) -> Floats:
        stored = self.stored.get(name)
        if stored is None:
            raise unusable_model(self.folder, f"no weights are named {name}")
        if stored.shape != shape:
            raise unusable_model(self.folder, f"{name} has shape {stored.shape}, and config.json says {shape}")
        if stored.dtype == np.uint16:  # bfloat16 is the upper half of a float32
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(self.dtype)


def _layer(tensors: _Tensors, config: LlamaConfig, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}"
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = [
        tensors.take(f"{prefix}.self_attn.{name}_proj.weight", size, hidden)
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size))
    ]
    gate_up = [tensors.take(f"{prefix}.mlp.{name}_proj.weight", inner, hidden) for name in ("gate", "up")]
    return LayerWeights(
        attention_norm=tensors.take(f"{prefix}.input_layernorm.weight", hidden),
        qkv=_turned(np.concatenate(attention)),
        output=_turned(tensors.take(f"{prefix}.self_attn.o_proj.weight", hidden, q_size)),
        mlp_norm=tensors.take(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=_turned(np.concatenate(gate_up)),
        down=_turned(tensors.take(f"{prefix}.mlp.down_proj.weight", hidden, inner)),
    )


def _turned(matrix: Floats) -> Floats:
    """Return a stored (out, in) as (in, out)."""
    return np.ascontiguousarray(matrix.T)


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / _SINGLE_FILE, folder / _INDEX_FILE
    if single.is_file():
        return [single]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError as exc:
        raise unusable_model(folder, f"has neither {_SINGLE_FILE} nor {_INDEX_FILE}") from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise unusable_model(folder, f"{_INDEX_FILE} cannot be read: {exc!r}") from exc
    files = [folder / str(name) for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise unusable_model(folder, f"{_INDEX_FILE} names {missing[0]}, which is not there")
    return files


def _map_tensors(folder: Path, file: Path) -> dict[str, npt.NDArray[Any]]:
    """Map a file's tensors into memory without reading them.

    The library checks the file; its numpy door has no bfloat16, so the tensors are found in the checked header here.
    """
    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except (SafetensorError, OSError) as exc:
        raise unusable_model(folder, f"{file.name} is no safetensors file: {exc}") from exc
    content = np.memmap(file, dtype=np.uint8, mode="r")
    start = _HEADER_LENGTH_BYTES + int.from_bytes(content[:_HEADER_LENGTH_BYTES].tobytes(), "little")
    header = json.loads(content[_HEADER_LENGTH_BYTES:start].tobytes())
    header.pop("__metadata__", None)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        stored = _STORED.get(entry["dtype"])
        if stored is None:
            raise unusable_model(folder, f"{name} is {entry['dtype']}; numpy_llama reads {', '.join(_STORED)}")
        first, last = entry["data_offsets"]
        tensors[name] = content[start + first : start + last].view(np.dtype(stored)).reshape(entry["shape"])
    return tensors


def _fingerprint(config: LlamaConfig, stored: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = xxh3_128(repr(config).encode())
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}".encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
