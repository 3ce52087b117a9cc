"""What one pool's subscribers may ask for: the batches of KV events after a position, or the whole cache.

Laws:
    - the position counts batches, from 0 before the first; a batch is never split, merged or renumbered in here;
    - the ring holds the latest batches: a position older than the ring, or beyond the newest, gets a snapshot;
    - a snapshot lists parents before children. A block that was removed while blocks below it are still cached stays in
      the table as a ghost until those are gone: a snapshot stores it and then removes it, so that its reader learns
      where the blocks below belong.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from kvmesh.core.ids import SequenceHash
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent

_MAX_UNITS = 32_768
"""Blocks of a batch, an event counting as two: about 600 kB on the wire."""
_EVENT_UNITS = 2


@dataclass(frozen=True, slots=True)
class KvBatch:
    """Events that belong together, at most 32,768 blocks of them."""

    sequence: int
    """Position after this batch."""
    events: tuple[KvEvent, ...]
    published_at: float = 0.0
    """When the first of them happened, on the publisher's clock."""


@dataclass(slots=True)
class _Block:
    parent: SequenceHash | None
    local_hash: int
    children: int = 0
    """Blocks of the table, ghosts too, that follow this one."""
    is_ghost: bool = False


class KvHistory:
    """The table of one pool's cached blocks and a ring of its latest batches; not thread-safe."""

    def __init__(self, *, ring_size: int = 1024) -> None:
        """Start empty, at position 0."""
        self._blocks: dict[SequenceHash, _Block] = {}  # a parent is older than its children, so it comes first
        self._ring: deque[KvBatch] = deque(maxlen=ring_size)
        self._sequence = 0
        self.unknown_parents = 0
        """Stored events left out because the pool did not hold their parent."""

    @property
    def sequence(self) -> int:
        """The newest position."""
        return self._sequence

    @property
    def blocks(self) -> frozenset[SequenceHash]:
        """Every cached block; O(blocks)."""
        return frozenset(key for key, block in self._blocks.items() if not block.is_ghost)

    def publish(self, events: Sequence[KvEvent], *, now: float = 0.0) -> None:
        """Take in what the pool says happened; O(blocks of the events)."""
        for batch in _batches(event for event in events if self._apply(event)):
            self._sequence += 1
            self._ring.append(KvBatch(self._sequence, batch, now))

    def since(self, position: int) -> tuple[KvBatch, ...] | None:
        """Return the batches after `position`, () at the newest; None where only a snapshot can answer."""
        missing = self._sequence - position
        if not 0 <= missing <= len(self._ring):
            return None
        return tuple(islice(self._ring, len(self._ring) - missing, None))

    def snapshot(self) -> Iterator[tuple[KvEvent, ...]]:
        """Return the cache as it is now, in parts like batches; at least one. Later changes do not show in it."""
        rows = [(key, block.parent, block.local_hash) for key, block in self._blocks.items()]
        ghosts = tuple(key for key, block in self._blocks.items() if block.is_ghost)
        return _snapshot_parts(rows, ghosts)

    def _apply(self, event: KvEvent) -> bool:
        match event:
            case BlocksStored():
                return self._store(event)
            case BlocksRemoved(block_hashes):
                for key in block_hashes:
                    self._remove(key)
            case CacheCleared():
                self._blocks.clear()
        return True

    def _store(self, event: BlocksStored) -> bool:
        parent = event.parent
        if parent is not None and ((above := self._blocks.get(parent)) is None or above.is_ghost):
            self.unknown_parents += 1
            return False
        for key, local_hash in zip(event.block_hashes, event.local_hashes, strict=True):
            block = self._blocks.get(key)
            if block is not None:
                block.is_ghost = False
            else:
                self._blocks[key] = _Block(parent, local_hash)
                if parent is not None:
                    self._blocks[parent].children += 1
            parent = key
        return True

    def _remove(self, key: SequenceHash) -> None:
        block = self._blocks.get(key)
        if block is None:
            return
        block.is_ghost = True
        name: SequenceHash | None = key
        while name is not None and (block := self._blocks[name]).is_ghost and not block.children:
            del self._blocks[name]
            name = block.parent
            if name is not None:
                self._blocks[name].children -= 1


def _batches(events: Iterable[KvEvent]) -> Iterator[tuple[KvEvent, ...]]:
    """Cut events into batches within the bound; an event too long for one is cut too."""
    batch: list[KvEvent] = []
    units = 0
    for event in events:
        for piece in _pieces(event):
            size = _units(piece)
            if units + size > _MAX_UNITS:
                yield tuple(batch)
                batch, units = [], 0
            batch.append(piece)
            units += size
    if batch:
        yield tuple(batch)


def _units(event: KvEvent) -> int:
    return _EVENT_UNITS + (0 if isinstance(event, CacheCleared) else len(event.block_hashes))


def merge(batches: Iterable[KvBatch]) -> Iterator[KvBatch]:
    """Join neighbouring batches within the bound of one: the position is that after the last joined."""
    events: list[KvEvent] = []
    units = sequence = 0
    published_at = 0.0
    for batch in batches:
        size = sum(_units(event) for event in batch.events)
        if events and units + size > _MAX_UNITS:
            yield KvBatch(sequence, tuple(events), published_at)
            events, units = [], 0
        if not events:
            published_at = batch.published_at
        events += batch.events
        units += size
        sequence = batch.sequence
    if events:
        yield KvBatch(sequence, tuple(events), published_at)


def _pieces(event: KvEvent) -> Iterator[KvEvent]:
    most = _MAX_UNITS - _EVENT_UNITS
    if _units(event) <= _MAX_UNITS:
        yield event
    elif isinstance(event, BlocksStored):
        for at in range(0, len(event.block_hashes), most):
            parent = event.block_hashes[at - 1] if at else event.parent
            yield BlocksStored(parent, event.block_hashes[at : at + most], event.local_hashes[at : at + most])
    elif isinstance(event, BlocksRemoved):
        for at in range(0, len(event.block_hashes), most):
            yield BlocksRemoved(event.block_hashes[at : at + most])


def _snapshot_parts(
    rows: list[tuple[SequenceHash, SequenceHash | None, int]], ghosts: tuple[SequenceHash, ...]
) -> Iterator[tuple[KvEvent, ...]]:
    def events() -> Iterator[KvEvent]:
        yield from _runs(rows)
        if ghosts:
            yield BlocksRemoved(ghosts)

    if not rows:
        yield ()
    yield from _batches(events())


def _runs(rows: list[tuple[SequenceHash, SequenceHash | None, int]]) -> Iterator[BlocksStored]:
    """Join rows that follow each other into one event, so that a chain costs 16 bytes a block."""
    start = 0
    for at in range(1, len(rows) + 1):
        is_joined = at < len(rows) and rows[at][1] == rows[at - 1][0] and at - start < _MAX_UNITS - _EVENT_UNITS
        if is_joined:
            continue
        run = rows[start:at]
        if run:
            yield BlocksStored(run[0][1], tuple(row[0] for row in run), tuple(row[2] for row in run))
        start = at
