"""Checksums of blocks: of their bytes, each alone."""

import numpy as np
import pytest

from kvmesh.core.block_checksums import block_checksums, find_altered

POOL = np.arange(4 * 32, dtype=np.uint8).reshape(4, 32)


def test_checksum_is_xxh3_of_the_blocks_bytes() -> None:
    empty = np.zeros((1, 0), dtype=np.uint8)

    assert block_checksums(empty, [0]) == [0x2D06800538D394C2], "the algorithm's published value for no bytes, seed 0"
    assert block_checksums(POOL, [2, 0]) == [*block_checksums(POOL, [2]), *block_checksums(POOL, [0])]


@pytest.mark.parametrize("byte", [0, 17, 31])
def test_one_changed_bit_is_found_in_its_block(byte: int) -> None:
    target = POOL[[3, 1, 2, 0]].copy()
    target[1, byte] ^= 1

    altered = find_altered(target, [0, 1, 3], block_checksums(POOL, [3, 1, 0]))

    assert altered == [1]


def test_blocks_in_another_order_are_altered() -> None:
    assert find_altered(POOL, [1, 0, 2], block_checksums(POOL, [0, 1, 2])) == [0, 1]
