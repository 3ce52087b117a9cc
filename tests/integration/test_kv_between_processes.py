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
from kvmesh.transports import nixl_library
from kvmesh.transports.nixl import NixlTransport
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport
from kvmesh.transports.transport import Transport

BLOCKS = 128
BLOCK_BYTES = 1 << 18
EVERY_BLOCK = range(BLOCKS)
STALL_S = 0.3
NIXL_STALL_S = 3.0
"""A first connection takes a tenth of a second on an idle machine."""
SOURCE = f"""
import asyncio, sys
from pathlib import Path
import numpy as np, uvloop
from kvmesh.transports.nixl import NixlTransport
from kvmesh.transports.shared_memory import SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport

MAKE = {{"tcp": TcpTransport, "shared_memory": lambda: SharedMemoryTransport(Path(sys.argv[2])), "nixl": NixlTransport}}

async def main():
    transport = MAKE[sys.argv[1].split("-")[0]]()
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

EMULATED = "nixl-over-tcp"
"""As between hosts without RDMA, where the source's CPU answers reads."""


@pytest.fixture(scope="module")
def content() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(256, size=(BLOCKS, BLOCK_BYTES), dtype=np.uint8)


needs_nixl = pytest.mark.skipif(not nixl_library.is_installed(), reason=f"needs NIXL: {nixl_library.INSTALL}")


@pytest.fixture(
    params=["shared_memory", "tcp", pytest.param("nixl", marks=needs_nixl), pytest.param(EMULATED, marks=needs_nixl)]
)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == EMULATED:
        monkeypatch.setenv("UCX_TLS", "tcp,self")
    return str(request.param)


def make(kind: str, directory: Path) -> Transport:
    if kind == "tcp":
        return TcpTransport(stall_s=STALL_S)
    return SharedMemoryTransport(directory) if kind == "shared_memory" else NixlTransport(stall_s=NIXL_STALL_S)


@pytest.fixture
async def puller(kind: str, tmp_path: Path) -> AsyncIterator[Transport]:
    transport = make(kind, tmp_path)
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


@needs_nixl
@pytest.mark.parametrize("tls", ["", "tcp,self"])
async def test_nixl_source_that_is_stopped_before_anybody_connects_is_left_within_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: str
) -> None:
    if tls:
        monkeypatch.setenv("UCX_TLS", tls)
    puller = NixlTransport(stall_s=STALL_S)
    async with source("nixl", tmp_path) as (child, public_name):
        child.send_signal(signal.SIGSTOP)

        await refused(puller, public_name, target=blank())
    await puller.aclose()


@needs_nixl
async def test_nixl_read_that_was_given_up_is_not_answered_when_the_source_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    puller, witness = NixlTransport(stall_s=NIXL_STALL_S), NixlTransport(stall_s=NIXL_STALL_S)
    own = blank()
    async with source("nixl", tmp_path) as (child, public_name):
        for transport in (puller, witness):
            await transport.pull(public_name, source_block_ids=[0], target=own, target_block_ids=[0])
        child.send_signal(signal.SIGSTOP)
        pulling = asyncio.ensure_future(
            puller.pull(public_name, source_block_ids=EVERY_BLOCK, target=own, target_block_ids=EVERY_BLOCK)
        )
        await asyncio.wait([pulling], timeout=STALL_S)  # it was asked for, and is not answered
        pulling.cancel()
        await asyncio.wait([pulling])
        own[:] = 0
        child.send_signal(signal.SIGCONT)
        with suppress(TryElsewhereError):  # the library may end a process whose answer nobody waits for
            await witness.pull(public_name, source_block_ids=EVERY_BLOCK, target=blank(), target_block_ids=EVERY_BLOCK)

        assert pulling.cancelled()
        assert not own.any()
    await puller.aclose()
    await witness.aclose()


@needs_nixl
async def test_nixl_source_that_stands_still_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: npt.NDArray[np.uint8]
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    puller = NixlTransport(stall_s=NIXL_STALL_S)
    async with source("nixl", tmp_path) as (child, stopped), source("nixl", tmp_path) as (_, other):
        for name in (stopped, other):
            await puller.pull(name, source_block_ids=[0], target=blank(), target_block_ids=[0])
        child.send_signal(signal.SIGSTOP)
        waiting = asyncio.ensure_future(refused(puller, stopped, target=blank()))
        pulled = 0
        while not waiting.done():
            own = blank()
            await puller.pull(other, source_block_ids=[7], target=own, target_block_ids=[3])
            assert (own[3] == content[7]).all()
            pulled += 1

        await waiting
        assert pulled > 1
    await puller.aclose()


@needs_nixl
async def test_closing_ends_a_nixl_pull_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    puller = NixlTransport(stall_s=GENEROUS_S * 2)
    async with source("nixl", tmp_path) as (child, public_name):
        child.send_signal(signal.SIGSTOP)
        waiting = asyncio.ensure_future(refused(puller, public_name, target=blank()))
        await asyncio.sleep(0)

        await puller.aclose()
        await waiting


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
