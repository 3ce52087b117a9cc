"""The prompts of a trace as block hashes, without tokens to hash.

A trace names the 512-token blocks of a prompt. The same name after another beginning is another block, so each
(what came before, name) gets a number of its own, and a block of B tokens within it the hash number * 512/B + position:
unique, the same wherever two prompts begin alike, and computed without hashing a token.
"""

from collections.abc import Sequence
from itertools import count

import numpy as np

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import SequenceHash
from kvmesh.replay.trace import BLOCK_TOKENS, TraceRow

_FIRST_OUTPUT_HASH = 2**62
"""Far above every prompt block's."""


class TraceBlocks:
    """Names the blocks of the prompts of one trace; the same for every policy that is compared."""

    def __init__(self, rows: Sequence[TraceRow], *, block_size: int) -> None:
        """Number the blocks of all rows. Raises: FixRequestError(INVALID_FIELD) if B does not divide 512."""
        if not 1 <= block_size <= BLOCK_TOKENS or BLOCK_TOKENS % block_size:
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"block size {block_size} does not divide the {BLOCK_TOKENS} tokens that a hash_id stands for",
                field="block_size",
            )
        self.rows = rows
        self.block_size = block_size
        self._parts = np.arange(BLOCK_TOKENS // block_size)
        numbers: dict[tuple[int, int], int] = {}
        self._numbers: list[list[int]] = []
        for row in rows:
            parent = 0
            chain = []
            for hash_id in row.hash_ids:
                parent = numbers.setdefault((parent, hash_id), len(numbers) + 1)
                chain.append(parent)
            self._numbers.append(chain)

    def full_blocks(self, row: int) -> tuple[SequenceHash, ...]:
        """Return the hashes of the full blocks of a row's prompt."""
        return self._hashes(row, self.rows[row].input_length // self.block_size)

    def begun_blocks(self, row: int) -> tuple[SequenceHash, ...]:
        """Return the hashes of all blocks of a row's prompt, the last one too where it is not full."""
        return self._hashes(row, -(-self.rows[row].input_length // self.block_size))

    def _hashes(self, row: int, blocks: int) -> tuple[SequenceHash, ...]:
        numbers = np.array(self._numbers[row])
        return tuple((numbers[:, np.newaxis] * len(self._parts) + self._parts).ravel()[:blocks].tolist())


class OutputHashes:
    """Hashes of blocks that output fills: each another one, as no prompt of a trace names them."""

    def __init__(self) -> None:
        """Begin above every prompt's."""
        self._numbers = count(_FIRST_OUTPUT_HASH)

    def __call__(self) -> SequenceHash:
        """Return the next one."""
        return SequenceHash(next(self._numbers))
