"""A pool of KV blocks with a prefix cache: who owns which block, which to evict, and what to tell the routers.

A block is in exactly one state:

    free      nobody's
    private   held once, by a running request or an import; its content is not whole yet and nobody else sees it
    held      in the prefix cache, held by one or more requests and pins
    idle      in the prefix cache, held by nobody: the only state that may be evicted

    free -> private (allocate) -> held (seal) <-> idle (give_back / hold_prefix) -> free (eviction, clear)
    private -> free (give_back)

Laws, checked by `check_integrity`:
    - every block is in one state, and the cache has one block per sequence hash;
    - closed prefix: the parent of a cached block is cached, and held if the block is held;
    - in eviction order a block comes before its parent.

The last law makes leaf-first LRU O(1) without counting children. Holders always hold a sequence from block 0 on and
give it back deepest block first, so a parent is never idle for longer than its child: the block that is idle longest
has no cached child.
"""

from collections import OrderedDict
from collections.abc import Sequence

from kvmesh.core.ids import SequenceHash
from kvmesh.core.kv_events import KvEvent, KvEventLog


class BlockPool:
    """The blocks `0 .. total_blocks - 1`. It counts and names them; their bytes are the engine's."""

    def __init__(self, total_blocks: int) -> None:
        """Start with every block free."""
        self.total_blocks = total_blocks
        self._free = list(range(total_blocks - 1, -1, -1))
        self._holds = [0] * total_blocks
        self._hash_of: list[SequenceHash | None] = [None] * total_blocks
        self._parent_of: list[SequenceHash | None] = [None] * total_blocks
        self._cache: dict[SequenceHash, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._events = KvEventLog()

    @property
    def active_blocks(self) -> int:
        """Blocks held by anyone; O(1)."""
        return self.total_blocks - len(self._free) - len(self._idle)

    @property
    def available_blocks(self) -> int:
        """Blocks that `allocate` could give now, by eviction too; O(1)."""
        return len(self._free) + len(self._idle)

    @property
    def cached_blocks(self) -> int:
        """Blocks in the prefix cache, held or idle; O(1)."""
        return len(self._cache)

    def holds(self, block: int) -> int:
        """Count the holds on a block: 0 if it is free or idle, 1 if it is private."""
        return self._holds[block]

    def cached_prefix(self, block_hashes: Sequence[SequenceHash]) -> int:
        """Count the leading blocks of a sequence, from block 0 on, that are cached."""
        depth = 0
        parent: SequenceHash | None = None
        for block_hash in block_hashes:
            block = self._cache.get(block_hash)
            if block is None or self._parent_of[block] != parent:
                break
            depth += 1
            parent = block_hash
        return depth

    def has_room(self, block_hashes: Sequence[SequenceHash], blocks: int, *, spare: int = 0) -> bool:
        """Tell whether a sequence of `blocks` blocks could be had now, its cached prefix reused, with `spare` left."""
        cache, holds = self._cache, self._holds
        available = self.available_blocks - spare
        for depth in range(self.cached_prefix(block_hashes)):
            blocks -= 1
            if not holds[cache[block_hashes[depth]]]:
                available -= 1  # idle now, and held then: it can be reused, but not evicted
        return blocks <= available

    def hold_prefix(self, block_hashes: Sequence[SequenceHash]) -> list[int]:
        """Hold the longest cached prefix of a sequence and return its block ids; end it with `give_back`.

        What is no chain from block 0 on is not held, whatever hashes it names: that would break the prefix law.
        """
        cache, holds, idle, parent_of = self._cache, self._holds, self._idle, self._parent_of
        held: list[int] = []
        parent: SequenceHash | None = None
        for block_hash in block_hashes:
            block = cache.get(block_hash)
            if block is None or parent_of[block] != parent:
                break
            parent = block_hash
            if not holds[block]:
                del idle[block]
            holds[block] += 1
            held.append(block)
        return held

    def allocate(self, count: int) -> list[int] | None:
        """Make `count` blocks private to the caller, evicting idle ones if need be; None, and no change, if too few."""
        if count > self.available_blocks:
            return None
        for _ in range(count - len(self._free)):
            self._evict()
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holds[block] = 1
        return taken

    def seal(self, block: int, block_hash: SequenceHash, *, parent: SequenceHash | None, local_hash: int) -> int:
        """Make a private block, whole now, part of the cache and return the block to use from here on.

        If the hash is cached already the caller's own block is freed and it holds the cached one instead. The caller
        must hold `parent`.
        """
        assert self._holds[block] == 1, f"block {block} is not private"
        assert self._hash_of[block] is None, f"block {block} is sealed already"
        assert parent is None or parent in self._cache, f"the parent of block {block} is not cached"
        cached = self._cache.get(block_hash)
        if cached is not None:
            assert self._parent_of[cached] == parent, f"block {cached} follows another block"
            if not self._holds[cached]:
                del self._idle[cached]
            self._holds[cached] += 1
            self._holds[block] = 0
            self._free.append(block)
            return cached
        self._cache[block_hash] = block
        self._hash_of[block] = block_hash
        self._parent_of[block] = parent
        self._events.stored(parent, block_hash, local_hash)
        return block

    def give_back(self, blocks: Sequence[int]) -> None:
        """End one hold on each of `blocks`, in sequence order: private ones become free, cached ones stay cached."""
        holds, hash_of = self._holds, self._hash_of
        for block in reversed(blocks):
            assert holds[block] > 0, f"block {block} is not held"
            holds[block] -= 1
            if holds[block]:
                continue
            if hash_of[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def clear(self) -> None:
        """Forget every idle block; what is held stays cached."""
        if not self._idle:
            return
        if len(self._idle) < len(self._cache):
            while self._idle:
                self._evict()
            return
        for block in self._idle:
            self._hash_of[block] = self._parent_of[block] = None
            self._free.append(block)
        self._idle.clear()
        self._cache.clear()
        self._events.cleared()

    def drain_events(self) -> tuple[KvEvent, ...]:
        """Return and forget the events since the last call, in order."""
        return self._events.drain()

    def check_integrity(self) -> None:
        """Assert the laws at the top of this file; O(total_blocks), for tests and idle moments."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert all(self._holds[block] == 0 and self._hash_of[block] is None for block in free), "a free block is in use"
        assert sum(block_hash is not None for block_hash in self._hash_of) == len(self._cache), (
            "a block is cached twice"
        )
        age = {block: position for position, block in enumerate(self._idle)}
        for block, block_hash in enumerate(self._hash_of):
            if block_hash is None:
                assert self._holds[block] == (0 if block in free else 1), f"private block {block} leaked or shared"
                continue
            assert self._cache[block_hash] == block, f"block {block} is not the cached one of its hash"
            assert (block in age) == (self._holds[block] == 0), f"block {block} is idle and held, or neither"
            parent = self._parent_of[block]
            if parent is None:
                continue
            assert parent in self._cache, f"the parent of block {block} is not cached"
            above = self._cache[parent]
            assert self._holds[above] > 0 or age[above] > age.get(block, age[above]), (
                f"block {above} would go too early"
            )

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        block_hash = self._hash_of[block]
        assert block_hash is not None, f"idle block {block} is not cached"
        del self._cache[block_hash]
        self._hash_of[block] = self._parent_of[block] = None
        self._free.append(block)
        self._events.removed(block_hash)
