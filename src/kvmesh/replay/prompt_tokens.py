"""From the hash_ids of a trace to prompts: the same tokens for the same id, everywhere and always.

A block repeats the digits of its hash_id, least significant first, from end to end: any 11 tokens in a row spell the id
out, so that blocks of different ids differ, and with them the smaller blocks that the mesh cuts them into. The digits
are ids of printable ASCII, which a byte tokenizer has as well; below 128, each is one byte on the wire.
"""

from collections.abc import Sequence

import numpy as np

from kvmesh.replay.trace import BLOCK_TOKENS

FIRST_TOKEN_ID = 32
"""Digit 0; digit 63 is 95."""
_DIGIT_BITS = 6
_SHIFTS = np.arange(0, 64, _DIGIT_BITS, dtype=np.uint64)
_DIGIT_MASK = np.uint64(2**_DIGIT_BITS - 1)
_PLACES = np.arange(BLOCK_TOKENS) % len(_SHIFTS)


def prompt_tokens(hash_ids: Sequence[int], input_length: int) -> bytes:
    """Return a prompt of `input_length` token ids, one per byte; the last block is cut."""
    ids = np.array(hash_ids, dtype=np.uint64)
    digits = (ids[:, np.newaxis] >> _SHIFTS & _DIGIT_MASK).astype(np.uint8) + np.uint8(FIRST_TOKEN_ID)
    return digits[:, _PLACES].tobytes()[:input_length]
