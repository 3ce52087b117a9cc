"""The port behind which every way of moving KV blocks stands. Serving pulls: see docs/architecture.md.

A late reader harms only itself, and learns from KvTransfer.Release, before a token is produced, that it was late; a
late writer would corrupt somebody else's memory. So there is a `pull` and no push.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Transport(Protocol):
    """Moves blocks from a served pool into a local one. One object per worker."""

    @property
    def name(self) -> str:
        """What people call it, e.g. `memory`."""

    @property
    def reach(self) -> str:
        """What two workers must have in common to move blocks: the name, and how far it reaches unless everywhere.

        Tasks and handoffs carry it, e.g. `shared_memory@1f0c9a52d3b8e647`: another host has another one.
        """

    def allocate(self, blocks: int, block_bytes: int) -> npt.NDArray[np.uint8] | None:
        """Return a zeroed pool, shape (blocks, block_bytes), that can be served; None: it serves any memory.

        No memory is taken until it is written. Called before `serve`, once per pool.

        Raises: TryElsewhereError(KV_TRANSFER_FAILED) when there is no room; the pool may then lie elsewhere, and others
        cannot pull from it.
        """

    async def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> str:
        """Let others pull from `memory`, shape (blocks, block_bytes); return the name under which they do.

        `agent_name` is unique per epoch, and the public name made of it is understood by this kind of transport only.

        Raises: TryElsewhereError(KV_TRANSFER_FAILED) when this memory cannot be served.
        """

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        """Copy blocks into `target`, shape (total_blocks, bytes_per_block); return the bytes moved.

        `agent_name` is a public one. The caller bounds the time; once this has returned or raised, cancelled or not,
        nothing writes to `target` any more.

        Raises: TryElsewhereError(KV_TRANSFER_FAILED) when the source is gone, stalls, has blocks of another size, or a
        block is not there; the target blocks are then in no defined state, all others are as before.
        """

    async def aclose(self) -> None:
        """Stop serving and free what was registered. Idempotent."""
