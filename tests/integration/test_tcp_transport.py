"""The tcp transport against peers that go, stand still, and speak something else."""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest

from kvmesh.core.errors import FixRequestError, Reason, TryElsewhereError
from kvmesh.testing.transport_contract import AGENT, BLOCK_BYTES, GENEROUS_S, make_pool
from kvmesh.testing.worker_group import eventually
from kvmesh.transports import tcp_server
from kvmesh.transports.tcp import TcpTransport
from kvmesh.transports.tcp_protocol import ANSWER_BYTES, MAX_BLOCKS, REQUEST_BYTES, Status, read_answer, write_request

STALL_S = 0.2
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def transport(**options: Any) -> AsyncIterator[TcpTransport]:
    transport = TcpTransport(**options)
    try:
        yield transport
    finally:
        await transport.aclose()


@asynccontextmanager
async def peer(talk: Talk) -> AsyncIterator[str]:
    """Serve connections by hand; yields a public name that leads there."""
    ended = asyncio.Event()
    serving: set[asyncio.Task[Any] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        with suppress(ConnectionError):
            await talk(reader, writer)
            await ended.wait()
        await close(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"{AGENT}@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        ended.set()
        server.close()
        await asyncio.gather(*(task for task in serving if task is not None))


@asynccontextmanager
async def connected(public_name: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect to a source by hand."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(public_name.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        await close(writer)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> None:
    await reader.readexactly(REQUEST_BYTES + len(AGENT) + 4)


async def refused(puller: TcpTransport, public_name: str, own: np.ndarray | None = None) -> str:
    own = make_pool(100) if own is None else own
    async with asyncio.timeout(GENEROUS_S):
        with pytest.raises(TryElsewhereError) as caught:
            await puller.pull(public_name, source_block_ids=[0], target=own, target_block_ids=[0])
    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
    return caught.value.message


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)


async def half_a_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"kvmA\x01")


async def half_a_block(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"kvmA" + struct.pack("<HHQ", 1, 0, BLOCK_BYTES) + b"x" * (BLOCK_BYTES // 2))


@pytest.mark.parametrize("talk", [silent, half_a_head, half_a_block])
async def test_peer_that_stands_still_is_left_within_the_bound(talk: Talk) -> None:
    async with peer(talk) as public_name, transport(stall_s=STALL_S) as puller:
        message = await refused(puller, public_name)

    assert "stands still" in message


async def test_peer_that_never_accepts_is_left_within_the_bound() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))  # bound, and not listening: nobody else gets the port
    async with transport(connect_s=STALL_S) as puller:
        await refused(puller, f"{AGENT}@127.0.0.1:{listener.getsockname()[1]}")
    listener.close()


async def another_protocol(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def another_size(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"kvmA" + struct.pack("<HHQ", 1, 0, BLOCK_BYTES * 2) + bytes(BLOCK_BYTES * 2))


async def ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"kvmA" + struct.pack("<HHQ", 1, 0, BLOCK_BYTES) + bytes(BLOCK_BYTES - 1))
    writer.close()


@pytest.mark.parametrize("talk", [another_protocol, another_size, ends])
async def test_peer_that_answers_something_else_is_refused(talk: Talk) -> None:
    own = make_pool(100)
    async with peer(talk) as public_name, transport() as puller:
        await refused(puller, public_name, own)

    assert (own[1:] == make_pool(100)[1:]).all()


async def test_slow_peer_is_waited_for_as_long_as_it_moves() -> None:
    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"kvmA" + struct.pack("<HHQ", 1, 0, BLOCK_BYTES))
        for _ in range(8):
            await asyncio.sleep(0.1)  # its slowness: together more than one wait may last
            writer.write(b"\x05" * (BLOCK_BYTES // 8))

    own = make_pool(100)
    async with peer(slowly) as public_name, transport(stall_s=0.6) as puller:
        moved = await puller.pull(public_name, source_block_ids=[0], target=own, target_block_ids=[3])

    assert moved == BLOCK_BYTES
    assert (own[3] == 5).all()


async def test_connections_are_used_again_and_renewed_when_the_peer_ended_them() -> None:
    connected = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        for _ in range(2):
            await read_request(reader)
            writer.write(b"kvmA" + struct.pack("<HHQ", 1, 0, BLOCK_BYTES) + bytes(BLOCK_BYTES))
        writer.close()

    own = make_pool(100)
    async with peer(talk) as public_name, transport() as puller:
        for _ in range(6):
            await puller.pull(public_name, source_block_ids=[0], target=own, target_block_ids=[0])

    assert connected == 3


async def test_cancelled_pull_leaves_no_half_read_connection_behind() -> None:
    served = make_pool(10, blocks=64, block_bytes=1 << 20)
    own = np.zeros_like(served)
    ids = list(range(64))
    async with transport() as source, transport() as puller:
        public_name = await source.serve(AGENT, served)
        for turns in range(0, 40, 4):
            pulling = asyncio.ensure_future(
                puller.pull(public_name, source_block_ids=ids, target=own, target_block_ids=ids)
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            pulling.cancel()
            await asyncio.wait([pulling])
            own[:] = 0
            await puller.pull(public_name, source_block_ids=[5], target=own, target_block_ids=[2])

            assert (own[2] == 15).all()
            assert not own[3:].any()


async def test_more_blocks_than_one_request_takes_are_asked_for_in_several() -> None:
    blocks = 2 * MAX_BLOCKS + 7
    served = np.random.default_rng(1).integers(256, size=(blocks, 64), dtype=np.uint8)
    own = np.zeros_like(served)
    async with transport() as source, transport() as puller:
        public_name = await source.serve(AGENT, served)
        moved = await puller.pull(
            public_name, source_block_ids=range(blocks), target=own, target_block_ids=range(blocks - 1, -1, -1)
        )

    assert moved == served.nbytes
    assert (own[::-1] == served).all()


async def exchange(public_name: str, request: bytes) -> tuple[Status, bytes]:
    """Ask by hand; return the answer's status and whatever follows until the source ends the connection."""
    async with connected(public_name) as (reader, writer):
        writer.write(request)
        status, size = read_answer(await reader.readexactly(ANSWER_BYTES))
        assert size == 0
        with suppress(OSError):  # ended already
            writer.write_eof()
        return status, await reader.read()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost", Status.BAD_REQUEST),
        (b"kvmQ" + struct.pack("<HHIQ", 1, 1, MAX_BLOCKS + 1, 256), Status.BAD_REQUEST),
        (b"kvmQ" + struct.pack("<HHIQ", 1, 1, 1, 256) + b"\xff" + bytes(4), Status.BAD_REQUEST),
        (write_request("nobody@1", [0], block_bytes=BLOCK_BYTES), Status.UNKNOWN_AGENT),
        (write_request(AGENT, [0], block_bytes=BLOCK_BYTES + 1), Status.OTHER_BLOCK_SIZE),
        (write_request(AGENT, [0, 8], block_bytes=BLOCK_BYTES), Status.NO_SUCH_BLOCK),
    ],
)
async def test_source_says_why_it_refuses(request_bytes: bytes, status: Status) -> None:
    async with transport() as source:
        public_name = await source.serve(AGENT, make_pool(10))

        assert await exchange(public_name, request_bytes) == (status, b"")


@pytest.mark.parametrize("sent", [b"", b"kvm", write_request(AGENT, [0], block_bytes=BLOCK_BYTES)[:-2]])
async def test_source_ends_a_connection_that_asks_for_nothing(sent: bytes) -> None:
    async with transport(stall_s=STALL_S, idle_s=STALL_S) as source:
        public_name = await source.serve(AGENT, make_pool(10))
        async with connected(public_name) as (reader, writer), asyncio.timeout(GENEROUS_S):
            writer.write(sent)

            assert await reader.read() == b""


async def test_source_leaves_a_puller_that_reads_nothing() -> None:
    async with transport(stall_s=STALL_S) as source:
        served = make_pool(10, blocks=64, block_bytes=1 << 20)
        public_name = await source.serve(AGENT, served)
        async with connected(public_name) as (_, writer):
            writer.write(write_request(AGENT, range(64), block_bytes=1 << 20))
            server = source._server
            assert server is not None

            await eventually(lambda: bool(server._connections))
            await eventually(lambda: not server._connections)


async def test_source_bounds_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_server, "_MAX_CONNECTIONS", 2)
    async with transport() as source:
        public_name = await source.serve(AGENT, make_pool(10))
        async with AsyncExitStack() as stack, asyncio.timeout(GENEROUS_S):
            for _ in range(2):
                await stack.enter_async_context(connected(public_name))
            reader, _ = await stack.enter_async_context(connected(public_name))

            assert await reader.read() == b""


async def test_close_ends_every_connection_and_frees_every_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    source, puller = TcpTransport(), TcpTransport()
    public_name = await source.serve(AGENT, make_pool(10))
    own = make_pool(100)
    await asyncio.gather(
        *(puller.pull(public_name, source_block_ids=[0], target=own, target_block_ids=[block]) for block in range(8))
    )

    await source.aclose()
    await puller.aclose()

    assert len(os.listdir("/proc/self/fd")) == before


async def test_pullers_are_told_the_advertised_host() -> None:
    source = TcpTransport("0.0.0.0", advertised_host="localhost")
    public_name = await source.serve(AGENT, make_pool(10))
    own = make_pool(100)
    async with transport() as puller:
        moved = await puller.pull(public_name, source_block_ids=[1], target=own, target_block_ids=[0])
    await source.aclose()

    assert public_name.startswith(f"{AGENT}@localhost:")
    assert moved == BLOCK_BYTES


async def test_ipv6_host_is_told_in_brackets() -> None:
    source = TcpTransport("::1")
    try:
        public_name = await source.serve(AGENT, make_pool(10))
    except TryElsewhereError:
        pytest.skip("this machine has no IPv6")
    async with transport() as puller:
        moved = await puller.pull(public_name, source_block_ids=[1], target=make_pool(0), target_block_ids=[0])
    await source.aclose()

    assert public_name.startswith(f"{AGENT}@[::1]:")
    assert moved == BLOCK_BYTES


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_wildcard_is_not_told_to_others(host: str) -> None:
    with pytest.raises(FixRequestError) as caught:
        TcpTransport(host)

    assert caught.value.field == "advertised_host"


async def test_port_that_is_taken_is_told() -> None:
    async with transport() as source:
        public_name = await source.serve(AGENT, make_pool(10))
        second = TcpTransport("127.0.0.1", int(public_name.rpartition(":")[2]))

        with pytest.raises(TryElsewhereError, match="cannot listen"):
            await second.serve(AGENT, make_pool(10))
