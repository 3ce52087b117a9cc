"""Another engine's blocks under our names.

An engine names blocks by hashes of its own, which say nothing to others, but tells which tokens are in a block it
stores. So each of its hashes is given ours, from those tokens and from what its parent was given.

Laws:
    - a block is stored for us while the engine holds at least one copy of it, under whatever hashes;
    - only what the engine's accelerator holds for full attention counts: other media and other kinds of cache hold no
      prefix that a request could begin with;
    - a block whose parent is not known here gets no name, and so neither does what follows it;
    - memory is bounded by `max_blocks` names.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from kvmesh.core.hashing import chain_on, local_block_hashes
from kvmesh.core.ids import SequenceHash
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent

ForeignHash = int | bytes
ExtraKey = int | bytes | str
"""What besides its tokens went into a block's hash: an image, an adapter's name, a cache salt."""

_FULL_ATTENTION = frozenset({None, "full_attention", "mla_attention"})
_ACCELERATOR = frozenset({None, "GPU"})
_HEX_DIGITS = 16
"""Of a content hash written in hexadecimal; the first ones are its u64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an engine keeps what an event is about."""

    medium: str | None = None
    """None: not said, so the accelerator."""
    group: int | None = None
    """Of layers that share one cache; None: there is only one."""
    kind: str | None = None
    """Of attention; None: not said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignStored:
    """Blocks came: the first follows `parent`, each further one its predecessor."""

    block_hashes: tuple[ForeignHash, ...]
    parent: ForeignHash | None
    token_ids: NDArray[np.uint32]
    """Of all the blocks, shape (blocks * block_size,)."""
    block_size: int
    lora_id: int | None = None
    lora: str | None = None
    """The adapter's name; None with a `lora_id`: not said."""
    extra_keys: tuple[tuple[ExtraKey, ...], ...] = ()
    """By block; may be empty."""
    place: Place = Place()


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignRemoved:
    """One copy of each of these blocks went."""

    block_hashes: tuple[ForeignHash, ...]
    place: Place = Place()


@dataclass(frozen=True, slots=True)
class ForeignCleared:
    """All went."""


ForeignEvent = ForeignStored | ForeignRemoved | ForeignCleared


class Refusal(Enum):
    """Why an event says nothing to the index."""

    BLOCK_SIZE = "block_size"
    TOKENS = "tokens"
    """Not as many as the blocks have."""
    UNKNOWN_PARENT = "unknown_parent"
    UNKNOWN_LORA = "unknown_lora"
    """An adapter by number only, for which no name is configured."""
    OTHER_MEDIUM = "other_medium"
    OTHER_GROUP = "other_group"
    FULL = "full"


@dataclass(slots=True)
class _Named:
    ours: SequenceHash
    cache_namespace: str | None
    copies: int = 0


class ForeignBlocks:
    """The names of one pool's blocks; not thread-safe."""

    def __init__(
        self, *, block_size: int, lora_names: Mapping[int, str] | None = None, max_blocks: int = 1_048_576
    ) -> None:
        """Name blocks of `block_size` tokens; `lora_names` are those of adapters that events give by number only."""
        self._block_size = block_size
        self._lora_names = dict(lora_names or {})
        self._max_blocks = max_blocks
        self._group: int | None = None
        """The first one of full attention: the others hold the same prefixes."""
        self._named: dict[ForeignHash, _Named] = {}
        self._copies: Counter[SequenceHash] = Counter()

    def __len__(self) -> int:
        return len(self._named)

    def translate(self, event: ForeignEvent) -> KvEvent | Refusal | None:
        """Return what an event means in our names; None: nothing new. O(blocks of the event)."""
        match event:
            case ForeignCleared():
                self.forget()
                return CacheCleared()
            case ForeignStored():
                return self._refusal_of_place(event.place, learn=True) or self._store(event)
            case ForeignRemoved():
                return self._refusal_of_place(event.place, learn=False) or self._remove(event)

    def forget(self) -> None:
        """Drop every name, as when the engine has restarted."""
        self._named.clear()
        self._copies.clear()
        self._group = None

    def _refusal_of_place(self, place: Place, *, learn: bool) -> Refusal | None:
        if (place.medium.upper() if place.medium else None) not in _ACCELERATOR:
            return Refusal.OTHER_MEDIUM
        if place.kind not in _FULL_ATTENTION:
            return Refusal.OTHER_GROUP
        if learn and self._group is None:
            self._group = place.group
        return None if place.group in (None, self._group) else Refusal.OTHER_GROUP

    def _store(self, event: ForeignStored) -> KvEvent | Refusal | None:
        blocks = event.block_hashes
        if event.block_size != self._block_size:
            return Refusal.BLOCK_SIZE
        if not blocks or len(event.token_ids) != len(blocks) * self._block_size:
            return Refusal.TOKENS
        above = self._named.get(event.parent) if event.parent is not None else None
        if above is None and event.parent is not None:
            return Refusal.UNKNOWN_PARENT
        lora = event.lora or (self._lora_names.get(event.lora_id) if event.lora_id is not None else None)
        if lora is None and event.lora_id is not None:
            return Refusal.UNKNOWN_LORA
        fresh = sum(block not in self._named for block in set(blocks))
        if len(self._named) + fresh > self._max_blocks:
            return Refusal.FULL
        contents, salt = _contents(event.extra_keys, lora=lora, begins=above is None)
        cache_namespace = above.cache_namespace if above is not None else salt
        local = local_block_hashes(
            event.token_ids, self._block_size, lora=lora, cache_namespace=cache_namespace, multimodal=contents
        )
        parent = above.ours if above is not None else None
        chain = [parent] if parent is not None else []
        chain_on(chain, local)
        ours = tuple(chain[len(chain) - len(blocks) :])
        is_news = False
        for block, name in zip(blocks, ours, strict=True):
            named = self._named.setdefault(block, _Named(name, cache_namespace))
            named.copies += 1
            self._copies[named.ours] += 1
            is_news |= self._copies[named.ours] == 1
        return BlocksStored(parent, ours, tuple(local)) if is_news else None

    def _remove(self, event: ForeignRemoved) -> KvEvent | None:
        gone = []
        for block in event.block_hashes:
            named = self._named.get(block)
            if named is None:
                continue
            named.copies -= 1
            if not named.copies:
                del self._named[block]
            self._copies[named.ours] -= 1
            if not self._copies[named.ours]:
                del self._copies[named.ours]
                gone.append(named.ours)
        return BlocksRemoved(tuple(gone)) if gone else None


def _contents(
    extra_keys: Sequence[Sequence[ExtraKey]], *, lora: str | None, begins: bool
) -> tuple[dict[int, list[int]], str | None]:
    """Return the hashes of what blocks show, by block, and the cache salt: a name in the first block of a sequence."""
    contents: dict[int, list[int]] = {}
    salt: str | None = None
    for index, keys in enumerate(extra_keys):
        for key in keys:
            if key == lora:
                continue
            if begins and not index and isinstance(key, str) and not _is_content_hash(key):
                salt = key
            else:
                contents.setdefault(index, []).append(_content_hash(key))
    return contents, salt


def _is_content_hash(key: str) -> bool:
    return len(key) >= _HEX_DIGITS and all(digit in "0123456789abcdefABCDEF" for digit in key)


def _content_hash(key: ExtraKey) -> int:
    if isinstance(key, int):
        return key & (2**64 - 1)
    if isinstance(key, str) and _is_content_hash(key):
        return int(key[:_HEX_DIGITS], 16)
    return xxh3_64_intdigest(key.encode() if isinstance(key, str) else key)
