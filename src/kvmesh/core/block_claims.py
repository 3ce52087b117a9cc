"""Pins and imports: holds on blocks of a pool that outlive a request and are known to others by an id.

A `Pin` belongs to whoever asked for it and is given back by `unpin`, exactly once. An `Import` belongs to whoever began
it and ends, exactly once, in `commit_import` (its blocks become prefix cache, held by the pin that it returns) or in
`abort_import` (its blocks are free again).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.core.block_pool import BlockPool
from kvmesh.core.errors import BackOffError, FixRequestError, NotKnownError, Reason, TryElsewhereError
from kvmesh.core.ids import SequenceHash

_RETRY_AFTER_S = 0.1
"""A pool that is full of running requests gains blocks within a few steps."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Blocks held in the pool, not evictable until `unpin`."""

    pin_id: int
    block_ids: tuple[int, ...]
    block_hashes: tuple[SequenceHash, ...]


@dataclass(frozen=True, slots=True)
class Import:
    """Blocks allocated to receive KV from elsewhere; not yet visible to anyone."""

    import_id: int
    block_ids: tuple[int, ...]
    first_block: int
    """Index in the prompt of the first of them."""
    block_hashes: tuple[SequenceHash, ...] = ()
    """What is to arrive in `block_ids`, in that order."""


class BlockClaims:
    """The pins and imports of one pool. Ids are never reused."""

    def __init__(self, pool: BlockPool, *, reserved_blocks: int = 0) -> None:
        """Start with none. Imports leave `reserved_blocks` to be had.

        What is imported stays pinned until the request that it is for has run: a pool full of imports, with no block
        left for any of those requests, would be stuck.
        """
        self._pool = pool
        self._reserved_blocks = reserved_blocks
        self._pins: dict[int, Pin] = {}
        self._imports: dict[int, Import] = {}
        self._last_id = 0

    @property
    def pins(self) -> int:
        """Pins not given back yet."""
        return len(self._pins)

    @property
    def pinned_blocks(self) -> int:
        """Distinct blocks held by pins; O(pinned blocks)."""
        return len({block for pin in self._pins.values() for block in pin.block_ids})

    @property
    def imports(self) -> int:
        """Imports neither committed nor aborted."""
        return len(self._imports)

    def pin_prefix(self, block_hashes: Sequence[SequenceHash]) -> Pin:
        """Hold the longest cached prefix, possibly none of it, until `unpin`."""
        return self._new_pin(self._pool.hold_prefix(block_hashes), block_hashes)

    def unpin(self, pin_id: int) -> None:
        """Give a pin back.

        Raises:
            NotKnownError: NOT_FOUND if it is not held.
        """
        pin = self._pins.pop(pin_id, None)
        if pin is None:
            raise NotKnownError(Reason.NOT_FOUND, f"pin {pin_id} is not held")
        self._pool.give_back(pin.block_ids)

    def begin_import(self, block_hashes: Sequence[SequenceHash], *, first_block: int) -> Import:
        """Allocate private blocks for the blocks `first_block` and on of a sequence.

        Raises:
            FixRequestError: INVALID_FIELD `first_block` if it lies outside of the sequence.
            BackOffError: OVERLOADED if too few blocks are free or idle, the reserved ones not counted.
        """
        if not 0 <= first_block <= len(block_hashes):
            raise FixRequestError(
                Reason.INVALID_FIELD, f"first_block {first_block} is not in 0..{len(block_hashes)}", field="first_block"
            )
        wanted = tuple(block_hashes[first_block:])
        available = max(self._pool.available_blocks - self._reserved_blocks, 0)
        blocks = self._pool.allocate(len(wanted)) if len(wanted) <= available else None
        if blocks is None:
            raise BackOffError(
                Reason.OVERLOADED,
                f"{len(wanted)} blocks wanted, {available} of {self._pool.total_blocks} to be had",
                retry_after_s=_RETRY_AFTER_S,
            )
        opened = Import(self._next_id(), tuple(blocks), first_block, wanted)
        self._imports[opened.import_id] = opened
        return opened

    def open_import(self, import_id: int) -> Import:
        """Return an open import.

        Raises:
            NotKnownError: NOT_FOUND if it is not open.
        """
        opened = self._imports.get(import_id)
        if opened is None:
            raise NotKnownError(Reason.NOT_FOUND, f"import {import_id} is not open")
        return opened

    def commit_import(
        self, import_id: int, block_hashes: Sequence[SequenceHash], *, local_hashes: Sequence[int]
    ) -> Pin:
        """Seal an import's blocks and pin the whole sequence; hashes are those of the sequence from block 0.

        Raises:
            NotKnownError: NOT_FOUND if it is not open.
            TryElsewhereError: KV_TRANSFER_FAILED, and the import is aborted, if the sequence is another one than was
                begun or its blocks before the import are cached no more.
        """
        opened = self.open_import(import_id)
        first = opened.first_block
        if tuple(block_hashes[first:]) != opened.block_hashes or len(local_hashes) != len(block_hashes):
            self.abort_import(import_id)
            raise TryElsewhereError(Reason.KV_TRANSFER_FAILED, f"import {import_id} was begun for another sequence")
        held = self._pool.hold_prefix(block_hashes[:first])
        if len(held) < first:
            self._pool.give_back(held)
            self.abort_import(import_id)
            raise TryElsewhereError(
                Reason.KV_TRANSFER_FAILED, f"{first - len(held)} blocks before import {import_id} are cached no more"
            )

        del self._imports[import_id]
        parent = block_hashes[first - 1] if first else None
        for index, block in enumerate(opened.block_ids, first):
            held.append(self._pool.seal(block, block_hashes[index], parent=parent, local_hash=local_hashes[index]))
            parent = block_hashes[index]
        return self._new_pin(held, block_hashes)

    def abort_import(self, import_id: int) -> None:
        """Free an import's blocks.

        Raises:
            NotKnownError: NOT_FOUND if it is not open.
        """
        self._pool.give_back(self.open_import(import_id).block_ids)
        del self._imports[import_id]

    def check_integrity(self) -> None:
        """Assert that every claim has its holds in the pool, and that the pool's own laws hold."""
        self._pool.check_integrity()
        claims: Counter[int] = Counter()
        for pin in self._pins.values():
            claims.update(pin.block_ids)
        for opened in self._imports.values():
            claims.update(opened.block_ids)
        assert all(self._pool.holds(block) >= count for block, count in claims.items()), "a claim without its hold"

    def _new_pin(self, blocks: Sequence[int], block_hashes: Sequence[SequenceHash]) -> Pin:
        pin = Pin(self._next_id(), tuple(blocks), tuple(block_hashes[: len(blocks)]))
        self._pins[pin.pin_id] = pin
        return pin

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id
