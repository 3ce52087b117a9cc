"""The source's side of the tcp transport: answers pulls from the pools of one worker."""

import asyncio
import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from kvmesh.transports.blocks import Pool, failed, holds
from kvmesh.transports.tcp_protocol import (
    REQUEST_BYTES,
    ProtocolError,
    RequestHead,
    Status,
    read_request_head,
    read_request_rest,
    write_answer,
)
from kvmesh.transports.tcp_stream import receive, send, send_blocks

_BACKLOG = 128
_MAX_CONNECTIONS = 256
"""Of pullers, who keep some open; one above is told by the end of its connection."""
_ACCEPT_AGAIN_S = 0.1
"""When the process is out of file descriptors."""


class TcpServer:
    """Listens from `start` until `aclose`."""

    def __init__(self, pools: Mapping[str, Pool], *, stall_s: float, idle_s: float) -> None:
        """Serve what is in `pools`, by agent name, at the time of each request."""
        self._pools = pools
        self._stall_s = stall_s
        self._idle_s = idle_s
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port. Raises: TryElsewhereError(KV_TRANSFER_FAILED)."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            self._listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        except OSError as exc:
            raise failed(f"cannot listen on {host}:{port}: {exc}") from exc
        self._listener.setblocking(False)
        self._accepting = loop.create_task(self._accept(self._listener), name="kv-accept")
        bound: int = self._listener.getsockname()[1]
        return bound

    async def aclose(self) -> None:
        """End every connection at once."""
        tasks = [task for task in (self._accepting, *self._connections) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        self._accepting = self._listener = None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            if len(self._connections) >= _MAX_CONNECTIONS:
                sock.close()
                continue
            task = loop.create_task(self._talk(sock), name="kv-serve")
            self._connections.add(task)
            # Not in the task: one that is cancelled before its first step never gets to its `finally`.
            task.add_done_callback(partial(self._ended, sock))

    def _ended(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        sock.close()

    async def _talk(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError):  # the puller went, or stands still: it notices, or does not care
            while True:
                data = await receive(sock, REQUEST_BYTES, stall_s=self._idle_s)
                try:
                    head = read_request_head(data)
                    rest = await receive(sock, head.rest_bytes, stall_s=self._stall_s)
                    agent_name, block_ids = read_request_rest(head, rest)
                except ProtocolError:
                    await send(sock, write_answer(Status.BAD_REQUEST), stall_s=self._stall_s)
                    return
                await self._answer(sock, head, agent_name, block_ids)

    async def _answer(self, sock: socket.socket, head: RequestHead, agent_name: str, block_ids: list[int]) -> None:
        pool = self._pools.get(agent_name)
        status = _judge(pool, head, block_ids)
        if pool is None or status is not Status.OK:
            await send(sock, write_answer(status), stall_s=self._stall_s)
            return
        size = len(block_ids) * head.block_bytes
        await send(sock, write_answer(Status.OK, size=size), stall_s=self._stall_s)
        await send_blocks(sock, pool, block_ids, stall_s=self._stall_s)


def _judge(pool: Pool | None, head: RequestHead, block_ids: list[int]) -> Status:
    if pool is None:
        return Status.UNKNOWN_AGENT
    if pool.shape[1] != head.block_bytes:
        return Status.OTHER_BLOCK_SIZE
    return Status.OK if holds(pool, block_ids) else Status.NO_SUCH_BLOCK
