"""Moves blocks between pools of one process by copying them: the transport of a mesh in one process."""

import uuid
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.transports.blocks import Pool, check_pairing, check_source, copy_blocks, failed


class MemoryNetwork:
    """The pools served within one process, by agent name; the composition root makes one."""

    def __init__(self) -> None:
        """Start with none."""
        self.pools: dict[str, Pool] = {}
        self.reach = f"memory@{uuid.uuid4().hex[:16]}"
        """Another process has another network, though its workers call their transport by the same name."""


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

    @property
    def reach(self) -> str:
        """`memory@<network>`."""
        return self._network.reach

    def allocate(self, blocks: int, block_bytes: int) -> npt.NDArray[np.uint8] | None:
        """Any memory of this process will do."""
        return None

    async def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> str:
        """Let others of this process pull from `memory`, under the same name."""
        self._network.pools[agent_name] = memory
        self._served.add(agent_name)
        return agent_name

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        """Copy blocks from another pool of this process."""
        check_pairing(source_block_ids, target, target_block_ids)
        source = self._network.pools.get(agent_name)
        if source is None:
            raise failed(f"nobody serves KV blocks as {agent_name}")
        check_source(agent_name, source, source_block_ids, block_bytes=int(target.shape[1]))
        return await copy_blocks(source, source_block_ids, target, target_block_ids)

    async def aclose(self) -> None:
        """Serve nothing any more."""
        for agent_name in self._served:
            self._network.pools.pop(agent_name, None)
        self._served.clear()
