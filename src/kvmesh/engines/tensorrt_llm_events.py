"""TensorRT-LLM's KV events and figures under our names. Pure.

An event is `{"event_id", "data": {"type": created | stored | removed | updated, ...}}`. Ids count on by one; where one
is missing the buffer ran over, and nothing is claimed any more until it is stored again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvmesh.core.foreign_blocks import ForeignBlocks, ForeignEvent, ForeignRemoved, ForeignStored, Refusal
from kvmesh.core.kv_events import CacheCleared, KvEvent
from kvmesh.engines.engine import EngineLoad


class TensorRtLlmEvents:
    """Translates the events of one pool, in order."""

    def __init__(self, *, block_size: int) -> None:
        """Start with nothing stored."""
        self._block_size = block_size
        self._blocks = ForeignBlocks(block_size=block_size)
        self._last_id: int | None = None

    def translate(self, event: Mapping[str, Any]) -> list[KvEvent]:
        """Return what one event means; what says nothing about a prefix on the GPU means nothing."""
        if event.get("attention_dp_rank"):
            return []  # another rank's pool: a worker is its first rank here
        meant: list[KvEvent] = []
        event_id = int(event["event_id"])
        if self._last_id is not None and event_id != self._last_id + 1:
            self._blocks.forget()
            meant.append(CacheCleared())
        self._last_id = event_id
        for foreign in self._read(event["data"]):
            ours = self._blocks.translate(foreign)
            if ours is not None and not isinstance(ours, Refusal):
                meant.append(ours)
        return meant

    def _read(self, data: Mapping[str, Any]) -> list[ForeignEvent]:
        match data["type"]:
            case "stored":
                return self._stored(data["parent_hash"], data["blocks"])
            case "removed":
                return [ForeignRemoved(block_hashes=tuple(data["block_hashes"]))]
            case "updated" if ((data.get("cache_level") or {}).get("new_value") or 0) > 0:
                return [ForeignRemoved(block_hashes=(data["block_hash"],))]  # it left the GPU
            case _:
                return []

    def _stored(self, parent: int | None, blocks: Sequence[Mapping[str, Any]]) -> list[ForeignEvent]:
        """One event per block: each may have an adapter, and only the last may be less than full."""
        stored: list[ForeignEvent] = []
        for block in blocks:
            tokens = [token["token_id"] for token in block["tokens"]]
            if len(tokens) != self._block_size or (block.get("cache_level") or 0) > 0:
                break
            stored.append(
                ForeignStored(
                    block_hashes=(block["block_hash"],),
                    parent=parent,
                    token_ids=np.array(tokens, dtype=np.uint32),
                    block_size=self._block_size,
                    lora_id=block.get("lora_id"),
                )
            )
            parent = block["block_hash"]
        return stored


def read_figures(counted: EngineLoad, stat: Mapping[str, Any]) -> EngineLoad:
    """Return the load that one iteration's statistics tell, where they do, in place of what was `counted`."""
    cache = stat.get("kvCacheStats") or {}
    total, used = int(cache.get("maxNumBlocks") or 0), int(cache.get("usedNumBlocks") or 0)
    queued = min(int(stat.get("numQueuedRequests") or 0), counted.active_requests)
    return replace(
        counted,
        active_requests=counted.active_requests - queued,
        waiting_requests=counted.waiting_requests + queued,
        active_blocks=used,
        total_blocks=total or counted.total_blocks,
        cache_usage=used / total if total else 0.0,
        prefix_hit_rate=float(cache.get("cacheHitRate") or 0.0),
    )
