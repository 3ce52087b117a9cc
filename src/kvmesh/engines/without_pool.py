"""The part of the engine port that is about blocks, of an engine that has none to hand over."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.core.block_claims import BlockClaims, Import, Pin
from kvmesh.core.block_pool import BlockPool
from kvmesh.core.ids import SequenceHash
from kvmesh.engines.engine import PoolStats


class WithoutPool:
    """Pins are always empty, and still given back exactly once."""

    def __init__(self) -> None:
        """Begin with none."""
        self._claims = BlockClaims(BlockPool(0))

    def pin_prefix(self, block_hashes: Sequence[SequenceHash]) -> Pin:
        """Return an empty pin."""
        return self._claims.pin_prefix(block_hashes)

    def unpin(self, pin_id: int) -> None:
        """Give a pin back."""
        self._claims.unpin(pin_id)

    def begin_import(self, block_hashes: Sequence[SequenceHash], *, first_block: int) -> Import:
        """Refuse to make room for any block: there is no pool."""
        return self._claims.begin_import(block_hashes, first_block=first_block)

    def commit_import(
        self, import_id: int, *, block_hashes: Sequence[SequenceHash], local_hashes: Sequence[int]
    ) -> Pin:
        """End an import of no blocks."""
        return self._claims.commit_import(import_id, block_hashes, local_hashes=local_hashes)

    def abort_import(self, import_id: int) -> None:
        """End an import of no blocks."""
        self._claims.abort_import(import_id)

    def kv_memory(self) -> npt.NDArray[np.uint8] | None:
        """Return None."""
        return None

    def pool_stats(self) -> PoolStats:
        """Return the counts for the leak check."""
        return PoolStats(used_blocks=0, pinned_blocks=0, pins=self._claims.pins, imports=self._claims.imports)
