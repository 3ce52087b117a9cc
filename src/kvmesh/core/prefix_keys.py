"""Prefix-unique keys of blocks, made from local hashes all at once where the chained hash must go one by one.

    key[i] = sum over j <= i of mix(local[j] + (j + 1) * STEP)   mod 2^64

`mix` is the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection, so two sequences that differ in
one block never share the key of that block. Of others two share one with a chance of 2^-64, the chance of the chained
64-bit hash: n distinct prefixes hold a collision with less than n^2 / 2^65, for 10^7 prefixes 3 in a million. Like that
hash it withstands accidents, not malice; a collision costs one request a wrong guess of what is cached.

A key continues from the one before, and the step from one to the next gives back the local hash (`local_between`).
"""

import numpy as np
from numpy.typing import NDArray

from kvmesh.core.ids import LocalHash

_U64_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FIRST_INVERSE, _SECOND_INVERSE = pow(_FIRST, -1, 2**64), pow(_SECOND, -1, 2**64)
_U64 = np.uint64
_THIRTY, _TWENTY_SEVEN, _THIRTY_ONE = _U64(30), _U64(27), _U64(31)
_FIRST_U64, _SECOND_U64 = _U64(_FIRST), _U64(_SECOND)
_STEPS = np.arange(1, 4097, dtype=_U64) * _U64(_STEP)


def prefix_keys(local: NDArray[np.uint64], *, after: int = 0, depth: int = 0) -> NDArray[np.uint64]:
    """Return the keys of blocks with these local hashes, shape (blocks,), below a key at `depth` blocks."""
    count = len(local)
    steps = _STEPS[depth : depth + count]
    if len(steps) < count:
        steps = np.arange(depth + 1, depth + count + 1, dtype=_U64) * _U64(_STEP)
    mixed = local + steps
    spare = mixed >> _THIRTY
    mixed ^= spare
    mixed *= _FIRST_U64
    np.right_shift(mixed, _TWENTY_SEVEN, out=spare)
    mixed ^= spare
    mixed *= _SECOND_U64
    np.right_shift(mixed, _THIRTY_ONE, out=spare)
    mixed ^= spare
    if after:
        mixed[:1] += _U64(after)  # of an array, not of a number: numpy warns of numbers that wrap around
    return np.add.accumulate(mixed, out=mixed)


def next_key(key: int, local: int, *, depth: int) -> int:
    """Return the key of one block below `key`, which is that of `depth` blocks; 0 of none."""
    mixed = (local + (depth + 1) * _STEP) & _U64_MASK
    mixed = ((mixed ^ mixed >> 30) * _FIRST) & _U64_MASK
    mixed = ((mixed ^ mixed >> 27) * _SECOND) & _U64_MASK
    return (key + (mixed ^ mixed >> 31)) & _U64_MASK


def local_between(above: int, key: int, *, depth: int) -> LocalHash:
    """Return the local hash that leads from `above`, the key of `depth` blocks, to `key`."""
    mixed = (key - above) & _U64_MASK
    mixed = ((mixed ^ mixed >> 31 ^ mixed >> 62) * _SECOND_INVERSE) & _U64_MASK
    mixed = ((mixed ^ mixed >> 27 ^ mixed >> 54) * _FIRST_INVERSE) & _U64_MASK
    mixed ^= mixed >> 30 ^ mixed >> 60
    return LocalHash((mixed - (depth + 1) * _STEP) & _U64_MASK)
