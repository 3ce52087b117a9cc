"""The events by which vLLM, and who speaks like it, tells what its prefix cache holds: msgpack -> core.

A batch is `[timestamp, events, rank]`, an event `[type, field, ...]`; both may be maps with the same names instead.
What is not known, types and fields, is ignored and counted: engines add some with every release.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from kvmesh.core.errors import FixRequestError, NotServedError, Reason
from kvmesh.core.foreign_blocks import (
    ExtraKey,
    ForeignCleared,
    ForeignEvent,
    ForeignHash,
    ForeignRemoved,
    ForeignStored,
    Place,
)

_Ignore = Callable[[str], None]

_BATCH = ("ts", "events", "data_parallel_rank")
_FIELDS = {
    "BlockStored": (
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
        "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}  # fmt: skip
"""Names of the fields in the order of the array form."""


@dataclass(frozen=True, slots=True)
class VllmBatch:
    """One message of a publisher."""

    timestamp: float
    events: tuple[ForeignEvent, ...]
    rank: int | None
    """Data-parallel rank, where the publisher says it."""


def decode_batch(payload: bytes, *, on_ignored: _Ignore) -> VllmBatch:
    """Read one message; `on_ignored` is told why something in it is left out.

    Raises:
        FixRequestError: INVALID_FIELD if it is no batch at all.
        NotServedError: UNIMPLEMENTED if what reads msgpack is not installed.
    """
    msgpack = _require("msgpack")
    try:
        batch = _named(msgpack.unpackb(payload, strict_map_key=False), _BATCH, on_ignored)
        timestamp, events, rank = float(batch["ts"]), batch["events"], batch.get("data_parallel_rank")
        decoded = tuple(event for raw in events if (event := _decode_event(raw, on_ignored)) is not None)
    except (msgpack.UnpackException, KeyError, TypeError, ValueError) as exc:
        raise FixRequestError(Reason.INVALID_FIELD, f"no batch of KV events: {exc!r}", field="payload") from exc
    return VllmBatch(timestamp, decoded, rank)


def _require(name: str) -> Any:
    """Import what only this needs. Raises: NotServedError(UNIMPLEMENTED) naming what to install."""
    try:
        return import_module(name)
    except ImportError as exc:
        raise NotServedError(
            Reason.UNIMPLEMENTED, f"engine events need {name}, not installed here: pip install 'kvmesh[vllm-events]'"
        ) from exc


def require_packages() -> Any:
    """Return pyzmq, its asyncio side loaded. Raises: NotServedError(UNIMPLEMENTED) naming what to install."""
    _require("msgpack")
    _require("zmq.asyncio")
    return _require("zmq")


def _decode_event(raw: Any, on_ignored: _Ignore) -> ForeignEvent | None:
    kind = raw.get("type") if isinstance(raw, Mapping) else raw[0] if isinstance(raw, Sequence) and raw else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        on_ignored("unknown_type")
        return None
    try:
        fields = _named(raw if isinstance(raw, Mapping) else raw[1:], _FIELDS[kind], on_ignored)
        return _EVENTS[kind](fields)
    except (KeyError, TypeError, ValueError, OverflowError):
        on_ignored("malformed")
        return None


def _named(raw: Any, names: Sequence[str], on_ignored: _Ignore) -> dict[str, Any]:
    """Return a map, or an array in the order of `names`, by name; what has no name is left out."""
    if isinstance(raw, Mapping):
        if not raw.keys() <= {*names, "type"}:
            on_ignored("extra_field")
        return {name: raw[name] for name in names if name in raw}
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        raise TypeError(f"neither a map nor an array: {type(raw).__name__}")
    if len(raw) > len(names):
        on_ignored("extra_field")
    return dict(zip(names, raw, strict=False))


def _stored(fields: Mapping[str, Any]) -> ForeignStored:
    lora_id, lora = fields.get("lora_id"), fields.get("lora_name")
    parent = fields["parent_block_hash"]
    return ForeignStored(
        block_hashes=_hashes(fields["block_hashes"]),
        parent=_hash(parent) if parent is not None else None,
        token_ids=np.array(fields["token_ids"], dtype=np.uint32),
        block_size=int(fields["block_size"]),
        lora_id=int(lora_id) if lora_id is not None else None,
        lora=str(lora) if lora is not None else None,
        extra_keys=tuple(tuple(map(_extra_key, keys or ())) for keys in fields.get("extra_keys") or ()),
        place=_place(fields),
    )


def _removed(fields: Mapping[str, Any]) -> ForeignRemoved:
    return ForeignRemoved(block_hashes=_hashes(fields["block_hashes"]), place=_place(fields))


def _cleared(_: Mapping[str, Any]) -> ForeignCleared:
    return ForeignCleared()


_EVENTS: dict[str, Callable[[Mapping[str, Any]], ForeignEvent]] = {
    "BlockStored": _stored,
    "BlockRemoved": _removed,
    "AllBlocksCleared": _cleared,
}


def _place(fields: Mapping[str, Any]) -> Place:
    return Place(medium=fields.get("medium"), group=fields.get("group_idx"), kind=fields.get("kv_cache_spec_kind"))


def _hashes(values: Sequence[Any]) -> tuple[ForeignHash, ...]:
    return tuple(map(_hash, values))


def _hash(value: Any) -> ForeignHash:
    if isinstance(value, int | bytes):
        return value
    raise TypeError(f"a block hash is an integer or bytes, not {type(value).__name__}")


def _extra_key(value: Any) -> ExtraKey:
    if isinstance(value, list | tuple) and value:
        return _extra_key(value[0])  # a content's name, then where in the block it begins
    if isinstance(value, int | bytes | str):
        return value
    raise TypeError(f"an extra key is an integer, bytes or a string, not {type(value).__name__}")
