"""What every transport owes the blocks it moves: the checks before, and copies that end when they are told to."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvmesh.core.errors import Reason, TryElsewhereError

Pool = npt.NDArray[np.uint8]
"""Shape (blocks, block_bytes)."""

INLINE_BYTES = 1 << 20
"""Copies up to this size are done on the event loop: a thread costs more than they do."""
SPAN_BYTES = 1 << 20
"""What a stream sends or receives in one go."""
_SHORT_RUN_BYTES = 32 << 10
"""Runs shorter than this, on average, are copied together rather than sent one by one."""
_PIECE_BYTES = 16 << 20
"""A copy that is given up ends after at most one piece more."""
_SCATTERED_BYTES = 4096
"""Blocks below this are gathered by numpy: a call per run of them would cost more than their bytes."""


def failed(why: str) -> TryElsewhereError:
    """Return the error that every failing transport raises."""
    return TryElsewhereError(Reason.KV_TRANSFER_FAILED, why)


def check_pairing(source_block_ids: Sequence[int], target: Pool, target_block_ids: Sequence[int]) -> None:
    """Check the puller's half of a pull, before anything is asked of the source. Raises: TryElsewhereError."""
    if len(source_block_ids) != len(target_block_ids):
        raise failed(f"{len(source_block_ids)} blocks do not fit into {len(target_block_ids)}")
    if not holds(target, target_block_ids):
        raise failed("the puller has no such block")


def check_source(agent_name: str, source: Pool, source_block_ids: Sequence[int], *, block_bytes: int) -> None:
    """Check the source's half. Raises: TryElsewhereError."""
    if source.shape[1] != block_bytes:
        raise failed(f"blocks of {source.shape[1]} bytes cannot be pulled into {block_bytes}")
    if not holds(source, source_block_ids):
        raise failed(f"{agent_name} has no such block")


def holds(pool: Pool, block_ids: Sequence[int]) -> bool:
    """Tell whether every block is one of the pool's."""
    return not len(block_ids) or (min(block_ids) >= 0 and max(block_ids) < pool.shape[0])


def spans(block_ids: Sequence[int], block_bytes: int) -> Iterator[tuple[Sequence[int], bool]]:
    """Cut ids, in order, into spans of at most SPAN_BYTES or one block, each with whether its ids are consecutive.

    Consecutive blocks can be sent and received where they lie. Short runs of them are joined to one span that is not.
    """
    longest = max(SPAN_BYTES // block_bytes, 1)
    for at in range(0, len(block_ids), longest):
        window = block_ids[at : at + longest]
        cuts = [index for index in range(1, len(window)) if window[index] != window[index - 1] + 1]
        if len(cuts) * _SHORT_RUN_BYTES > len(window) * block_bytes:
            yield window, False
            continue
        for first, last in pairwise((0, *cuts, len(window))):
            yield window[first:last], True


async def copy_blocks(
    source: Pool, source_block_ids: Sequence[int], target: Pool, target_block_ids: Sequence[int]
) -> int:
    """Copy checked blocks and return the bytes; a large copy leaves the loop free, and is over when this is."""
    size = len(source_block_ids) * int(target.shape[1])
    if size <= INLINE_BYTES:
        _copy(source, source_block_ids, target, target_block_ids)
    else:
        await _copy_in_thread(source, source_block_ids, target, target_block_ids)
    return size


async def _copy_in_thread(
    source: Pool, source_block_ids: Sequence[int], target: Pool, target_block_ids: Sequence[int]
) -> None:
    """Copy, and return or raise only when the thread has stopped writing: its target is somebody else's afterwards."""
    given_up = threading.Event()
    piece = max(_PIECE_BYTES // int(target.shape[1]), 1)

    def copy() -> None:
        for at in range(0, len(source_block_ids), piece):
            if given_up.is_set():
                return
            _copy(source, source_block_ids[at : at + piece], target, target_block_ids[at : at + piece])

    copying = asyncio.ensure_future(asyncio.to_thread(copy))
    try:
        await asyncio.shield(copying)
    except asyncio.CancelledError:
        given_up.set()
        while not copying.done():
            with suppress(asyncio.CancelledError):  # a second one: raised below, once nobody writes any more
                await asyncio.wait([copying])
        raise


def _copy(source: Pool, source_block_ids: Sequence[int], target: Pool, target_block_ids: Sequence[int]) -> None:
    if target.shape[1] < _SCATTERED_BYTES:
        target[list(target_block_ids)] = source[list(source_block_ids)]
        return
    for source_block, target_block in zip(source_block_ids, target_block_ids, strict=True):
        target[target_block] = source[source_block]
