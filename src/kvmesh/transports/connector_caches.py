"""The KV caches of a connector: what an array says of itself, and how two sides tell each other.

Metadata: "kvmC", version u16, two bytes of nothing, size u32 (little-endian), `size` bytes of JSON, the rest is NIXL's.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.transports.nixl_agent import MemoryKind, Places, Region

_HEAD = struct.Struct("<4sHxxI")
_MAGIC = b"kvmC"
_VERSION = 1
_CACHE_DIMENSIONS = 4
_INTERFACES: dict[MemoryKind, str] = {"VRAM": "__cuda_array_interface__", "DRAM": "__array_interface__"}


@dataclass(frozen=True, slots=True)
class RegisteredCaches:
    """The layers of one side: what both must have alike, and where they lie."""

    addresses: tuple[int, ...]
    """By layer."""
    shape: tuple[int, ...]
    """Of one layer: (blocks, block_size, heads, head_dim)."""
    dtype: str
    block_bytes: int
    kind: MemoryKind
    device: int

    @property
    def blocks(self) -> int:
        """How many each layer has."""
        return self.shape[0]

    @property
    def layout(self) -> tuple[object, ...]:
        """What two sides must have alike: layers, block_size, heads, head_dim, dtype."""
        return len(self.addresses), *self.shape[1:], self.dtype

    def regions(self) -> list[Region]:
        """Return the memory of each layer."""
        size = self.blocks * self.block_bytes
        return [Region(address, size, self.device, self.kind) for address in self.addresses]

    def places(self) -> Places:
        """Return every block of every layer: block b of layer l is at l * blocks + b."""
        return np.concatenate([region.places(self.blocks) for region in self.regions()])

    def indices(self, block_ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """Return where blocks are in `places`, layer by layer. Raises: FixRequestError."""
        ids = np.asarray(block_ids, dtype=np.int64)
        if ids.ndim != 1 or not ids.size or ids.min() < 0 or ids.max() >= self.blocks:
            raise FixRequestError(
                Reason.INVALID_FIELD, f"block ids are one or more of 0 .. {self.blocks - 1}", field="block_ids"
            )
        layers = np.arange(len(self.addresses), dtype=np.int64)[:, np.newaxis] * self.blocks
        return (layers + ids).ravel().astype(np.int32)

    def metadata(self, native: bytes) -> bytes:
        """Return all that another side needs: this, and what NIXL says."""
        head = json.dumps(asdict(self)).encode()
        return _HEAD.pack(_MAGIC, _VERSION, len(head)) + head + native


def describe(kv_caches: Sequence[object], *, device: int) -> RegisteredCaches:
    """Look at arrays. Raises: FixRequestError(INVALID_FIELD)."""
    found = [_interface(cache) for cache in kv_caches]
    if not found:
        raise FixRequestError(Reason.INVALID_FIELD, "there is no layer", field="kv_caches")
    kinds = {(kind, said["shape"], said["typestr"]) for kind, said in found}
    if len(kinds) != 1:
        raise FixRequestError(Reason.INVALID_FIELD, f"layers differ: {sorted(map(str, kinds))}", field="kv_caches")
    kind, shape, dtype = kinds.pop()
    if len(shape) != _CACHE_DIMENSIONS or 0 in shape or any(said.get("strides") is not None for _, said in found):
        raise FixRequestError(
            Reason.INVALID_FIELD,
            f"a KV cache has the shape (blocks, block_size, heads, head_dim), in C order, not {shape}",
            field="kv_caches",
        )
    return RegisteredCaches(
        addresses=tuple(int(said["data"][0]) for _, said in found),
        shape=tuple(shape),
        dtype=dtype,
        block_bytes=int(np.prod(shape[1:])) * np.dtype(dtype).itemsize,
        kind=kind,
        device=device if kind == "VRAM" else 0,
    )


def _interface(array: object) -> tuple[MemoryKind, dict[str, Any]]:
    """Return what an array says of itself. Raises: FixRequestError(INVALID_FIELD)."""
    interfaces: tuple[tuple[MemoryKind, str], ...] = (
        ("VRAM", "__cuda_array_interface__"),
        ("DRAM", "__array_interface__"),
    )
    for kind, name in interfaces:
        said = getattr(array, name, None)
        if said is not None:
            if said["data"][1]:
                raise FixRequestError(Reason.INVALID_FIELD, "a KV cache is read-only", field="kv_caches")
            return kind, said
    raise FixRequestError(Reason.INVALID_FIELD, f"{type(array).__name__} is no array", field="kv_caches")


def read_metadata(metadata: bytes) -> tuple[RegisteredCaches, bytes]:
    """Read metadata: the caches, and what is NIXL's. Raises: FixRequestError(INVALID_FIELD)."""
    try:
        magic, version, size = _HEAD.unpack_from(metadata)
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError(f"no metadata of version {_VERSION}")
        said = cast(dict[str, Any], json.loads(metadata[_HEAD.size : _HEAD.size + size]))
        caches = RegisteredCaches(**said | {"addresses": tuple(said["addresses"]), "shape": tuple(said["shape"])})
    except (struct.error, ValueError, TypeError, KeyError) as exc:
        raise FixRequestError(Reason.INVALID_FIELD, f"no metadata of a connector: {exc}", field="metadata") from exc
    return caches, metadata[_HEAD.size + size :]
