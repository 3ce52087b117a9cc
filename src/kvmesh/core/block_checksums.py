"""Checksums of KV blocks: what a holder says of the bytes it lends, and what a puller finds in those that arrived."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest


def block_checksums(memory: npt.NDArray[np.uint8], block_ids: Sequence[int]) -> list[int]:
    """Return the xxh3-64 of each of these blocks of a pool, shape (total_blocks, bytes_per_block); O(bytes)."""
    return [xxh3_64_intdigest(np.ascontiguousarray(memory[block]).data) for block in block_ids]


def find_altered(memory: npt.NDArray[np.uint8], block_ids: Sequence[int], checksums: Sequence[int]) -> list[int]:
    """Return the positions in `block_ids` of the blocks that have another checksum than the one given for them."""
    found = block_checksums(memory, block_ids)
    return [position for position, pair in enumerate(zip(found, checksums, strict=True)) if pair[0] != pair[1]]
