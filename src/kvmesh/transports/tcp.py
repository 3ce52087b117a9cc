"""Moves blocks between machines over TCP connections of its own; the wire is told in `tcp_protocol`."""

import asyncio
import socket
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.transports.blocks import Pool, check_pairing, failed
from kvmesh.transports.tcp_protocol import ANSWER_BYTES, MAX_BLOCKS, ProtocolError, Status, read_answer, write_request
from kvmesh.transports.tcp_server import TcpServer
from kvmesh.transports.tcp_stream import receive, receive_blocks, send

Address = tuple[str, int]

_MAX_IDLE_PER_PEER = 4
_MAX_PORT = 65_535


class _IdleConnection(NamedTuple):
    sock: socket.socket
    idle_since: float


class TcpTransport:
    """One worker's end: a server from the first `serve` on, and connections to the workers it pulls from."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        advertised_host: str | None = None,
        connect_s: float = 5.0,
        stall_s: float = 10.0,
        idle_s: float = 60.0,
    ) -> None:
        """Listen on `host`; others connect to `advertised_host`, by default the same.

        `stall_s` bounds each wait for a peer in the middle of something, `idle_s` how long an unused connection stays.

        Raises: FixRequestError(INVALID_FIELD) when others would be told to connect to a wildcard.
        """
        self._host = host
        self._port = port
        self._advertised_host = advertised_host or host
        if self._advertised_host in ("0.0.0.0", "::"):
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"others cannot connect to {self._advertised_host}: name the host they reach this one by",
                field="advertised_host",
            )
        self._connect_s = connect_s
        self._stall_s = stall_s
        self._idle_s = idle_s
        self._pools: dict[str, Pool] = {}
        self._server: TcpServer | None = None
        self._idle: dict[Address, list[_IdleConnection]] = {}
        """By peer, the one that was used last at the end."""
        self._is_closed = False

    @property
    def name(self) -> str:
        """`tcp`."""
        return "tcp"

    @property
    def reach(self) -> str:
        """`tcp`: it reaches whoever can connect."""
        return self.name

    def allocate(self, blocks: int, block_bytes: int) -> npt.NDArray[np.uint8] | None:
        """Any memory can be sent from."""
        return None

    async def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> str:
        """Let others pull from `memory`, under `<agent name>@<host>:<port>`."""
        if self._server is None:
            server = TcpServer(self._pools, stall_s=self._stall_s, idle_s=self._idle_s)
            self._port = await server.start(self._host, self._port)
            self._server = server
        self._pools[agent_name] = memory
        host = f"[{self._advertised_host}]" if ":" in self._advertised_host else self._advertised_host
        return f"{agent_name}@{host}:{self._port}"

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        """Ask a worker for blocks, MAX_BLOCKS at a time, over one connection."""
        check_pairing(source_block_ids, target, target_block_ids)
        agent, address = _parse(agent_name)
        moved = 0
        try:
            for at in range(0, len(source_block_ids), MAX_BLOCKS):
                moved += await self._fetch(
                    agent,
                    address,
                    source_block_ids[at : at + MAX_BLOCKS],
                    target,
                    target_block_ids[at : at + MAX_BLOCKS],
                )
        except TimeoutError as exc:
            raise failed(f"{agent_name} stands still") from exc
        except (OSError, UnicodeError, ProtocolError) as exc:  # UnicodeError: a host that no name can be
            raise failed(f"{agent_name} cannot be pulled from: {exc}") from exc
        return moved

    async def aclose(self) -> None:
        """Stop serving and close the connections; a pull that runs closes its own."""
        self._is_closed = True
        self._pools.clear()
        server, self._server = self._server, None
        if server is not None:
            await server.aclose()
        for connections in self._idle.values():
            for connection in connections:
                connection.sock.close()
        self._idle.clear()

    async def _fetch(
        self, agent: str, address: Address, source_ids: Sequence[int], target: Pool, target_ids: Sequence[int]
    ) -> int:
        block_bytes = int(target.shape[1])
        sock, status, size = await self._ask(address, write_request(agent, source_ids, block_bytes=block_bytes))
        try:
            if status is not Status.OK:
                raise failed(f"{agent} refuses to hand over blocks: {status.name.lower()}")
            if size != len(source_ids) * block_bytes:
                raise ProtocolError(f"{size} bytes for {len(source_ids)} blocks of {block_bytes}")
            await receive_blocks(sock, target, target_ids, stall_s=self._stall_s)
        except BaseException:
            sock.close()
            raise
        self._keep(address, sock)
        return size

    async def _ask(self, address: Address, request: bytes) -> tuple[socket.socket, Status, int]:
        """Return the head of the answer, and the connection on which the rest of it comes: the caller's."""
        while True:
            kept = self._take(address)
            sock = kept or await _connect(address, timeout_s=self._connect_s)
            try:
                await send(sock, request, stall_s=self._stall_s)
                status, size = read_answer(await receive(sock, ANSWER_BYTES, stall_s=self._stall_s))
            except BaseException as exc:
                sock.close()
                if kept is not None and isinstance(exc, ConnectionError):
                    continue  # the peer had ended it while nobody used it
                raise
            return sock, status, size

    def _take(self, address: Address) -> socket.socket | None:
        """Take the connection that was used last; those that nobody has used for long are closed, of every peer."""
        oldest = asyncio.get_running_loop().time() - self._idle_s
        for peer, connections in list(self._idle.items()):
            while connections and connections[0].idle_since < oldest:
                connections.pop(0).sock.close()
            if not connections:
                del self._idle[peer]
        connections = self._idle.get(address, [])
        return connections.pop().sock if connections else None

    def _keep(self, address: Address, sock: socket.socket) -> None:
        connections = self._idle.setdefault(address, [])
        if self._is_closed or len(connections) >= _MAX_IDLE_PER_PEER:
            sock.close()
        else:
            connections.append(_IdleConnection(sock, asyncio.get_running_loop().time()))


async def _connect(address: Address, *, timeout_s: float) -> socket.socket:
    """Connect to the first address of a host that answers. Raises: OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    error = OSError(f"{address[0]} has no address")
    async with asyncio.timeout(timeout_s):
        for family, kind, protocol, _, found in await loop.getaddrinfo(*address, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, found)
            except BaseException as exc:
                sock.close()
                if not isinstance(exc, OSError):
                    raise
                error = exc
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    raise error


def _parse(agent_name: str) -> tuple[str, Address]:
    """Split a public name. Raises: TryElsewhereError(KV_TRANSFER_FAILED)."""
    agent, _, where = agent_name.rpartition("@")
    host, _, port = where.rpartition(":")
    if not agent or not host or not port.isdecimal() or not 0 < int(port) <= _MAX_PORT:
        raise failed(f"{agent_name} is not of the form agent@host:port")
    return agent, (host.removeprefix("[").removesuffix("]"), int(port))
