"""A transport of any kind whose pulls stop where a test wants them to, or arrive spoiled."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.transports.transport import Transport


class HeldPulls:
    """Pulls by another transport; lets everything through until an event is cleared."""

    def __init__(self, inner: Transport, *, spoil: Callable[[npt.NDArray[np.uint8]], None] | None = None) -> None:
        """Own `inner`; `spoil` may change the bytes of the last block of each pull, where they have arrived."""
        self._inner = inner
        self._spoil = spoil
        self.begin = asyncio.Event()
        """Pulls wait for it before they ask for anything."""
        self.end = asyncio.Event()
        """Pulls wait for it once their blocks are here."""
        self.begin.set()
        self.end.set()
        self.reached = asyncio.Event()
        """A pull was asked for."""
        self.arrived = asyncio.Event()
        """The blocks of a pull are here."""

    @property
    def name(self) -> str:
        """That of the other."""
        return self._inner.name

    @property
    def reach(self) -> str:
        """That of the other."""
        return self._inner.reach

    def allocate(self, blocks: int, block_bytes: int) -> npt.NDArray[np.uint8] | None:
        """As the other does."""
        return self._inner.allocate(blocks, block_bytes)

    async def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> str:
        """As the other does."""
        return await self._inner.serve(agent_name, memory)

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        """Wait, pull, wait."""
        self.reached.set()
        await self.begin.wait()
        moved = await self._inner.pull(
            agent_name, source_block_ids=source_block_ids, target=target, target_block_ids=target_block_ids
        )
        if self._spoil is not None:
            self._spoil(target[target_block_ids[-1]])
        self.arrived.set()
        await self.end.wait()
        return moved

    async def aclose(self) -> None:
        """Close the other."""
        await self._inner.aclose()
