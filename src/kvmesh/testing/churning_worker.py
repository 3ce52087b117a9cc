"""A worker whose cache never rests: it runs made-up prompts through a real pool, breaks off, and starts again."""

import random
from collections.abc import Sequence

from kvmesh.core.block_pool import BlockPool
from kvmesh.core.hashing import sequence_hashes
from kvmesh.core.ids import Epoch, LocalHash, SequenceHash
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.testing.scripted_worker import ScriptedWorker

_FAMILIES = 24
"""Prompts begin in one of so many ways, so that they share prefixes."""
_DEPTHS = (1, 24)
"""Blocks of a prompt."""
_CLEARS = 0.001
"""Share of steps that drop the whole cache."""


class ChurningWorker:
    """One worker over all its incarnations; each rank has a pool of its own."""

    def __init__(
        self, discovery: MemoryDiscovery, number: int, *, seed: int, blocks: int, ranks: int, ring: int
    ) -> None:
        """Be worker `number` from `start` on, with `blocks` blocks per rank."""
        self.steps = self.restarts = self.disconnects = self.bursts = 0
        self._discovery = discovery
        self._number = number
        self._rng = random.Random(seed)
        self._blocks = blocks
        self._ranks = ranks
        self._ring = ring
        self._pools: list[BlockPool] = []
        self._worker: ScriptedWorker | None = None
        self._is_connected = False

    @property
    def scripted(self) -> ScriptedWorker:
        """The present incarnation."""
        assert self._worker is not None, "not started"
        return self._worker

    async def start(self) -> None:
        """Begin an incarnation with an empty cache, higher than those before."""
        epoch = Epoch(self._worker.record.epoch + 1 if self._worker is not None else 1)
        self._pools = [BlockPool(self._blocks) for _ in range(self._ranks)]
        self._worker = await ScriptedWorker.start(
            self._discovery, self._number, ring_size=self._ring, epoch=epoch, ranks=self._ranks
        )
        self._is_connected = True

    async def restart(self) -> None:
        """End this incarnation, in good order or not, and begin the next."""
        self.restarts += 1
        await (self.scripted.stop() if self._rng.random() < 0.5 else self.scripted.crash())
        await self.start()

    async def disconnect(self) -> None:
        """Break every stream; the cache goes on changing."""
        self.disconnects += 1
        self._is_connected = False
        await self.scripted.break_streams()

    async def connect(self) -> None:
        """Serve again where it served before. Idempotent."""
        if not self._is_connected:
            await self.scripted.serve(port=self.scripted.port)
            self._is_connected = True

    async def aclose(self) -> None:
        """Close the server."""
        if self._worker is not None:
            await self._worker.aclose()

    def step(self) -> None:
        """Run one prompt through the cache of one rank, and tell it."""
        self.steps += 1
        rng = self._rng
        rank = rng.randrange(self._ranks)
        pool = self._pools[rank]
        if rng.random() < _CLEARS:
            pool.clear()
        else:
            _run_prompt(pool, _made_up_prompt(rng))
        self.scripted.events.publish_kv(pool.drain_events(), rank=rank)

    def burst(self) -> None:
        """Change the cache so much at once that the ring cannot tell it any more."""
        self.bursts += 1
        for _ in range(2 * self._ring * self._ranks):
            self.step()

    def table(self, rank: int) -> frozenset[SequenceHash]:
        """Return the blocks that one rank's pool holds, by the pool itself."""
        return frozenset(self._pools[rank]._cache)


def _made_up_prompt(rng: random.Random) -> Sequence[LocalHash]:
    """Return local hashes; prompts of one family part at a random depth."""
    family = rng.randrange(_FAMILIES)
    depth = rng.randint(*_DEPTHS)
    parting = rng.randint(0, depth)
    branch = rng.randrange(4)
    return [
        LocalHash(1 + family * 1_000_000 + at * 1_000 + (branch + 1 if at >= parting else 0)) for at in range(depth)
    ]


def _run_prompt(pool: BlockPool, local: Sequence[LocalHash]) -> None:
    hashes = sequence_hashes(local)
    held = pool.hold_prefix(hashes)
    fresh = pool.allocate(len(hashes) - len(held))
    if fresh is None:
        pool.give_back(held)
        return
    for at, block in enumerate(fresh, start=len(held)):
        parent = hashes[at - 1] if at else None
        held.append(pool.seal(block, hashes[at], parent=parent, local_hash=local[at]))
    pool.give_back(held)
