"""What a KV pool says about its prefix cache, in order: the events every index is built from.

Laws: a stored block's parent is in the cache at that moment; a block is stored once until it is removed; a block is
removed only after every block that follows it.
"""

from dataclasses import dataclass

from kvmesh.core.ids import SequenceHash


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Blocks became prefix cache: `block_hashes[0]` follows `parent`, each further one its predecessor."""

    parent: SequenceHash | None
    """None: the first block begins a sequence."""
    block_hashes: tuple[SequenceHash, ...]
    local_hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks were evicted."""

    block_hashes: tuple[SequenceHash, ...]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """The whole prefix cache is gone."""


KvEvent = BlocksStored | BlocksRemoved | CacheCleared


class KvEventLog:
    """Collects the events of one pool and joins neighbours: a chain stored block by block is one event."""

    def __init__(self) -> None:
        """Start empty."""
        self._done: list[KvEvent] = []
        self._parent: SequenceHash | None = None
        self._stored: list[SequenceHash] = []
        self._locals: list[int] = []
        self._removed: list[SequenceHash] = []

    def stored(self, parent: SequenceHash | None, block: SequenceHash, local: int) -> None:
        """Note one block that entered the cache under `parent`."""
        if not self._stored or self._stored[-1] != parent:
            self._close_run()
            self._parent = parent
        self._stored.append(block)
        self._locals.append(local)

    def removed(self, block: SequenceHash) -> None:
        """Note one evicted block."""
        if self._stored:
            self._close_run()
        self._removed.append(block)

    def cleared(self) -> None:
        """Note that the cache is empty now."""
        self._close_run()
        self._done.append(CacheCleared())

    def drain(self) -> tuple[KvEvent, ...]:
        """Return and forget everything noted so far, in order."""
        self._close_run()
        if not self._done:
            return ()
        events = tuple(self._done)
        self._done.clear()
        return events

    def _close_run(self) -> None:
        if self._stored:
            self._done.append(BlocksStored(self._parent, tuple(self._stored), tuple(self._locals)))
            self._stored.clear()
            self._locals.clear()
        elif self._removed:
            self._done.append(BlocksRemoved(tuple(self._removed)))
            self._removed.clear()
