"""Blocks that move between two processes, by every transport that reaches so far, and what happens when one ends."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.testing.transport_contract import GENEROUS_S
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport

BLOCKS = 128
BLOCK_BYTES = 1 << 18
EVERY_BLOCK = range(BLOCKS)
STALL_S = 0.3
SOURCE = f"""
import asyncio, sys
from pathlib import Path
import numpy as np, uvloop
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport

async def main():
    transport = TcpTransport() if sys.argv[1] == "tcp" else SharedMemoryTransport(Path(sys.argv[2]))
    content = np.random.default_rng(7).integers(256, size=({BLOCKS}, {BLOCK_BYTES}), dtype=np.uint8)
    memory = transport.allocate(*content.shape)
    if memory is None:
        memory = content
    else:
        memory[:] = content
    print(await transport.serve("node/prefill/0@1", memory), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await transport.aclose()

uvloop.run(main())
"""

Transport = SharedMemoryTransport | TcpTransport


@pytest.fixture(scope="module")
def content() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(256, size=(BLOCKS, BLOCK_BYTES), dtype=np.uint8)


@pytest.fixture(params=["shared_memory", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def puller(kind: str, tmp_path: Path) -> AsyncIterator[Transport]:
    transport: Transport = TcpTransport(stall_s=STALL_S) if kind == "tcp" else SharedMemoryTransport(tmp_path)
    yield transport
    await transport.aclose()


@asynccontextmanager
async def source(kind: str, directory: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run a process that serves blocks; yields it and the public name."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SOURCE, kind, str(directory),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        async with asyncio.timeout(GENEROUS_S):
            public_name = (await child.stdout.readline()).decode().strip()
        assert public_name.startswith("node/prefill/0@1@")
        yield child, public_name
    finally:
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGCONT)
        child.stdin.close()
        async with asyncio.timeout(GENEROUS_S):
            await child.wait()


def blank() -> npt.NDArray[np.uint8]:
    return np.zeros((BLOCKS, BLOCK_BYTES), dtype=np.uint8)


async def refused(puller: Transport, public_name: str, *, target: npt.NDArray[np.uint8], block: int = 0) -> None:
    async with asyncio.timeout(GENEROUS_S):
        with pytest.raises(TryElsewhereError) as caught:
            await puller.pull(public_name, source_block_ids=[block], target=target, target_block_ids=[0])
    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
    assert not target.any()


async def test_blocks_of_another_process_arrive_whole_and_in_their_places(
    kind: str, puller: Transport, tmp_path: Path, content: npt.NDArray[np.uint8]
) -> None:
    source_ids = [*range(100, 128), 0, 2, 1, *range(10, 60, 7)]
    target_ids = [*range(len(source_ids))][::-1]
    own = blank()
    async with source(kind, tmp_path) as (_, public_name):
        moved = await puller.pull(public_name, source_block_ids=source_ids, target=own, target_block_ids=target_ids)

    assert moved == len(source_ids) * BLOCK_BYTES
    assert (own[target_ids] == content[source_ids]).all()
    assert not own[len(source_ids) :].any()


async def test_reader_that_is_cancelled_has_stopped_writing_and_can_pull_again(
    kind: str, puller: Transport, tmp_path: Path, content: npt.NDArray[np.uint8]
) -> None:
    async with source(kind, tmp_path) as (_, public_name):
        for turns in (0, 1, 3, 10, 30, 100):
            own = blank()
            pulling = asyncio.ensure_future(
                puller.pull(public_name, source_block_ids=EVERY_BLOCK, target=own, target_block_ids=EVERY_BLOCK)
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            pulling.cancel()
            await asyncio.wait([pulling])
            own[:] = 0
            await puller.pull(public_name, source_block_ids=[9], target=own, target_block_ids=[5])

            assert (own[5] == content[9]).all()
            assert not own[6:].any()
            assert not own[:5].any()


async def test_source_killed_during_a_transfer_ends_it_and_is_gone(
    kind: str, puller: Transport, tmp_path: Path, content: npt.NDArray[np.uint8]
) -> None:
    own = blank()
    async with source(kind, tmp_path) as (child, public_name):
        pulling = asyncio.ensure_future(
            puller.pull(public_name, source_block_ids=EVERY_BLOCK, target=own, target_block_ids=EVERY_BLOCK)
        )
        while not own[0].any() and not pulling.done():  # noqa: ASYNC110  # in the middle of it: looked at in each turn
            await asyncio.sleep(0)
        child.kill()
        await child.wait()
        async with asyncio.timeout(GENEROUS_S):
            [ended] = await asyncio.gather(pulling, return_exceptions=True)

        if isinstance(ended, TryElsewhereError):
            assert ended.reason is Reason.KV_TRANSFER_FAILED
        else:
            assert ended == content.nbytes
            assert (own == content).all()
        await refused(puller, public_name, target=blank())


async def test_tcp_source_that_is_stopped_is_left_within_the_bound(tmp_path: Path) -> None:
    puller = TcpTransport(stall_s=STALL_S)
    async with source("tcp", tmp_path) as (child, public_name):
        await puller.pull(public_name, source_block_ids=[0], target=blank(), target_block_ids=[0])
        child.send_signal(signal.SIGSTOP)

        await refused(puller, public_name, target=blank())
    await puller.aclose()


async def test_source_that_ends_in_order_is_gone_and_leaves_no_file(
    kind: str, puller: Transport, tmp_path: Path
) -> None:
    async with source(kind, tmp_path) as (_, public_name):
        pass

    await refused(puller, public_name, target=blank())
    assert os.listdir(tmp_path) == []


async def test_other_process_refuses_what_it_does_not_have(kind: str, puller: Transport, tmp_path: Path) -> None:
    async with source(kind, tmp_path) as (_, public_name):
        await refused(puller, public_name, target=np.zeros((8, BLOCK_BYTES // 2), dtype=np.uint8))
        await refused(puller, public_name, target=blank(), block=BLOCKS)
        await refused(puller, public_name.replace("prefill/0@1", "prefill/0@2"), target=blank())


async def test_process_of_another_host_is_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "boot_id").write_text("another boot")
    stranger = SharedMemoryTransport(tmp_path, boot_id_file=tmp_path / "boot_id")
    async with source("shared_memory", tmp_path) as (_, public_name):
        await refused(stranger, public_name, target=blank())

    assert stranger.reach.rpartition("@")[2] not in public_name
