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
        """The name that both sides must have in common, e.g. `memory`."""

    def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> None:
        """Let others pull from `memory`, shape (total_blocks, bytes_per_block), under a name unique per epoch."""

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        """Copy blocks into `target`, shape (total_blocks, bytes_per_block); return the bytes moved.

        The caller bounds the time; once cancelled, this returns when nothing writes to `target` any more.

        Raises: TryElsewhereError(KV_TRANSFER_FAILED) when the source is gone, has blocks of another size, or a block is
        not there; the target blocks are then in no defined state, all others are as before.
        """

    async def aclose(self) -> None:
        """Stop serving and free what was registered."""
