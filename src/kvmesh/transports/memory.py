"""Moves blocks between pools of one process by copying them: the transport of a mesh in one process."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from kvmesh.core.errors import Reason, TryElsewhereError

INLINE_BYTES = 1 << 20
"""Copies up to this size are done on the event loop: a thread costs more than they do."""


class MemoryNetwork:
    """The pools served within one process, by agent name; the composition root makes one."""

    def __init__(self) -> None:
        """Start with none."""
        self.pools: dict[str, npt.NDArray[np.uint8]] = {}


class MemoryTransport:
    """One worker's end of a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork) -> None:
        """Join a network."""
        self._network = network
        self._served: set[str] = set()

    @property
    def name(self) -> str:
        """`memory`."""
        return "memory"

    def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> None:
        """Let others of this process pull from `memory`."""
        self._network.pools[agent_name] = memory
        self._served.add(agent_name)

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        """Copy blocks from another pool of this process."""
        source = self._network.pools.get(agent_name)
        if source is None:
            raise TryElsewhereError(Reason.KV_TRANSFER_FAILED, f"nobody serves KV blocks as {agent_name}")
        if source.shape[1] != target.shape[1]:
            raise TryElsewhereError(
                Reason.KV_TRANSFER_FAILED, f"blocks of {source.shape[1]} bytes cannot be pulled into {target.shape[1]}"
            )
        if len(source_block_ids) != len(target_block_ids):
            raise TryElsewhereError(
                Reason.KV_TRANSFER_FAILED, f"{len(source_block_ids)} blocks do not fit into {len(target_block_ids)}"
            )
        if not _holds(source, source_block_ids) or not _holds(target, target_block_ids):
            raise TryElsewhereError(Reason.KV_TRANSFER_FAILED, f"{agent_name} or the puller has no such block")
        size = len(source_block_ids) * int(source.shape[1])
        if size <= INLINE_BYTES:
            _copy(source, source_block_ids, target, target_block_ids)
        else:
            await _copy_in_thread(source, source_block_ids, target, target_block_ids)
        return size

    async def aclose(self) -> None:
        """Serve nothing any more."""
        for agent_name in self._served:
            self._network.pools.pop(agent_name, None)
        self._served.clear()


async def _copy_in_thread(
    source: npt.NDArray[np.uint8],
    source_block_ids: Sequence[int],
    target: npt.NDArray[np.uint8],
    target_block_ids: Sequence[int],
) -> None:
    """Copy, and return or raise only when the thread has stopped writing: its target is somebody else's afterwards."""
    copying = asyncio.ensure_future(asyncio.to_thread(_copy, source, source_block_ids, target, target_block_ids))
    try:
        await asyncio.shield(copying)
    except asyncio.CancelledError:
        while not copying.done():
            with suppress(asyncio.CancelledError):  # a second one: raised below, once nobody writes any more
                await asyncio.wait([copying])
        raise


def _holds(pool: npt.NDArray[np.uint8], block_ids: Sequence[int]) -> bool:
    return not block_ids or (min(block_ids) >= 0 and max(block_ids) < pool.shape[0])


def _copy(
    source: npt.NDArray[np.uint8],
    source_block_ids: Sequence[int],
    target: npt.NDArray[np.uint8],
    target_block_ids: Sequence[int],
) -> None:
    target[list(target_block_ids)] = source[list(source_block_ids)]
