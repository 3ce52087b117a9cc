"""Blocks over a non-blocking socket: sent from where they lie, received to where they belong.

Every wait for the other side is bounded by `stall_s`, which begins anew with each part that gets through: a slow peer
is waited for, one that stands still is not.
"""

import asyncio
import socket
from collections.abc import Sequence

import numpy as np

from kvmesh.transports.blocks import SPAN_BYTES, Pool, spans


class StreamEndedError(ConnectionError):
    """The other side ended the connection."""


async def send(sock: socket.socket, data: bytes | memoryview, *, stall_s: float) -> None:
    """Send all of `data`. Raises: OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    for at in range(0, len(view), SPAN_BYTES):
        async with asyncio.timeout(stall_s):
            await loop.sock_sendall(sock, view[at : at + SPAN_BYTES])


async def receive(sock: socket.socket, size: int, *, stall_s: float) -> bytearray:
    """Return the next `size` bytes. Raises: OSError, TimeoutError; StreamEndedError if there are fewer."""
    data = bytearray(size)
    await receive_into(sock, memoryview(data), stall_s=stall_s)
    return data


async def receive_into(sock: socket.socket, view: memoryview, *, stall_s: float) -> None:
    """Fill `view`; nothing is written to it afterwards, cancelled or not. Raises: as `receive`."""
    loop = asyncio.get_running_loop()
    at = 0
    while at < len(view):
        async with asyncio.timeout(stall_s):
            received = await loop.sock_recv_into(sock, view[at:])
        if not received:
            raise StreamEndedError("the connection was ended")
        at += received


async def send_blocks(sock: socket.socket, pool: Pool, block_ids: Sequence[int], *, stall_s: float) -> None:
    """Send blocks in the order of their ids. Raises: OSError, TimeoutError."""
    for ids, is_run in spans(block_ids, int(pool.shape[1])):
        part = pool[ids[0] : ids[0] + len(ids)] if is_run else pool[list(ids)]
        await send(sock, part.data.cast("B"), stall_s=stall_s)
        await asyncio.sleep(0)  # a reader that keeps up would never let go of the event loop


async def receive_blocks(sock: socket.socket, pool: Pool, block_ids: Sequence[int], *, stall_s: float) -> None:
    """Receive blocks in the order of their ids. Raises: OSError, TimeoutError, StreamEndedError."""
    block_bytes = int(pool.shape[1])
    for ids, is_run in spans(block_ids, block_bytes):
        part = pool[ids[0] : ids[0] + len(ids)] if is_run else np.empty((len(ids), block_bytes), dtype=np.uint8)
        await receive_into(sock, part.data.cast("B"), stall_s=stall_s)
        if not is_run:
            pool[list(ids)] = part
        await asyncio.sleep(0)  # as above, of a writer
