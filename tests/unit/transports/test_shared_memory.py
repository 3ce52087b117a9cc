"""Where pools lie in shared memory: names, what is left behind, room, and who counts as the same host."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.testing.transport_contract import AGENT, GENEROUS_S, make_pool
from kvmesh.transports import pool_file
from kvmesh.transports.pool_file import PREFIX, file_name
from kvmesh.transports.shared_memory import SharedMemoryTransport

DIES_WITH_A_POOL = """
import asyncio, os, signal, sys
from pathlib import Path
from kvmesh.transports.shared_memory import SharedMemoryTransport

async def main():
    transport = SharedMemoryTransport(Path(sys.argv[1]))
    memory = transport.allocate(8, 256)
    memory[:] = 7
    if sys.argv[2]:
        print(await transport.serve(sys.argv[2], memory), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.fixture
async def transport(tmp_path: Path) -> AsyncIterator[SharedMemoryTransport]:
    transport = SharedMemoryTransport(tmp_path)
    yield transport
    await transport.aclose()


def leave_behind(directory: Path, agent_name: str) -> str:
    """Have a process die with a pool; return the public name under which it served it."""
    died = subprocess.run(
        [sys.executable, "-c", DIES_WITH_A_POOL, str(directory), agent_name],
        capture_output=True, text=True, timeout=GENEROUS_S, check=False,
    )  # fmt: skip
    assert died.returncode == -9, died.stderr
    return died.stdout.strip()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def pull(transport: SharedMemoryTransport, public_name: str) -> int:
    return await transport.pull(public_name, source_block_ids=[0], target=make_pool(0), target_block_ids=[0])


async def test_pool_takes_no_memory_before_it_is_written(transport: SharedMemoryTransport, tmp_path: Path) -> None:
    pool = transport.allocate(16_384, 65_536)

    assert pool is not None
    assert pool.nbytes == 1 << 30
    [name] = names(tmp_path)
    assert os.stat(tmp_path / name).st_blocks * 512 <= 1 << 20


async def test_pool_is_found_by_others_only_once_it_is_served(transport: SharedMemoryTransport, tmp_path: Path) -> None:
    pool = transport.allocate(8, 256)
    assert pool is not None
    before = names(tmp_path)

    await transport.serve("node/prefill/0@17", pool)

    assert file_name("node/prefill/0@17") not in before
    assert names(tmp_path) == ["kvmesh-pool-node%2Fprefill%2F0@17"]


async def test_pool_is_its_users_alone(transport: SharedMemoryTransport, tmp_path: Path) -> None:
    transport.allocate(8, 256)

    [name] = names(tmp_path)
    assert os.stat(tmp_path / name).st_mode & 0o777 == 0o600


async def test_close_removes_what_was_served_and_what_never_was(tmp_path: Path) -> None:
    transport = SharedMemoryTransport(tmp_path)
    served = transport.allocate(8, 256)
    transport.allocate(8, 256)
    assert served is not None
    await transport.serve(AGENT, served)

    await transport.aclose()

    assert names(tmp_path) == []
    served[:] = 1  # the engine may outlive it


async def test_puller_cannot_write_to_what_it_mapped(transport: SharedMemoryTransport, tmp_path: Path) -> None:
    served = transport.allocate(8, 256)
    assert served is not None
    await transport.serve(AGENT, served)
    mapped = pool_file.MappedPool.open(tmp_path, AGENT)

    with pytest.raises(ValueError, match="read-only"):
        mapped.memory[0] = 1

    mapped.close()


@pytest.mark.parametrize("agent_name", ["node/prefill/0@1", ""])
async def test_file_of_a_killed_worker_is_removed_by_the_next_allocation(
    transport: SharedMemoryTransport, tmp_path: Path, agent_name: str
) -> None:
    leave_behind(tmp_path, agent_name)
    left = names(tmp_path)

    transport.allocate(8, 256)

    assert len(left) == 1
    assert len(names(tmp_path)) == 1
    assert names(tmp_path) != left


async def test_file_of_a_living_worker_is_left_alone(transport: SharedMemoryTransport, tmp_path: Path) -> None:
    other = SharedMemoryTransport(tmp_path)
    pool = other.allocate(8, 256)
    assert pool is not None
    public_name = await other.serve("node/prefill/0@1", pool)

    transport.allocate(8, 256)

    assert await pull(transport, public_name) == 256
    await other.aclose()


async def test_memory_of_a_killed_worker_is_not_pulled(transport: SharedMemoryTransport, tmp_path: Path) -> None:
    public_name = leave_behind(tmp_path, "node/prefill/0@1")

    with pytest.raises(TryElsewhereError) as caught:
        await pull(transport, public_name)

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
    assert "dead" in caught.value.message


async def test_source_that_closes_after_it_was_mapped_is_gone(transport: SharedMemoryTransport, tmp_path: Path) -> None:
    source = SharedMemoryTransport(tmp_path)
    pool = source.allocate(8, 256)
    assert pool is not None
    public_name = await source.serve(AGENT, pool)
    await pull(transport, public_name)

    await source.aclose()

    with pytest.raises(TryElsewhereError):
        await pull(transport, public_name)


async def test_source_that_comes_back_under_its_name_is_mapped_anew(
    transport: SharedMemoryTransport, tmp_path: Path
) -> None:
    for fill in (1, 2):
        source = SharedMemoryTransport(tmp_path)
        pool = source.allocate(8, 256)
        assert pool is not None
        pool[:] = fill
        public_name = await source.serve(AGENT, pool)
        own = make_pool(0)
        await transport.pull(public_name, source_block_ids=[0], target=own, target_block_ids=[0])
        await source.aclose()

        assert (own[0] == fill).all()


async def test_memory_from_elsewhere_cannot_be_served(transport: SharedMemoryTransport) -> None:
    transport.allocate(8, 256)

    with pytest.raises(TryElsewhereError) as caught:
        await transport.serve(AGENT, make_pool(0))

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED


async def test_view_of_the_whole_pool_is_the_pool(transport: SharedMemoryTransport) -> None:
    pool = transport.allocate(8, 256)
    assert pool is not None

    public_name = await transport.serve(AGENT, pool.view(np.float64).reshape(8, 4, 8).reshape(8, -1).view(np.uint8))

    assert await pull(transport, public_name) == 256


async def test_pool_that_finds_no_room_is_refused_and_leaves_nothing(
    transport: SharedMemoryTransport, tmp_path: Path
) -> None:
    with pytest.raises(TryElsewhereError) as caught:
        transport.allocate(1 << 20, 1 << 24)

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
    assert names(tmp_path) == []


async def test_room_that_another_pool_may_yet_take_is_not_given_twice(
    transport: SharedMemoryTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_file, "_free_bytes", lambda _: 100_000)
    transport.allocate(8, 8192)

    with pytest.raises(TryElsewhereError):
        transport.allocate(8, 8192)

    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize("missing", ["directory", "boot_id_file"])
def test_host_without_shared_memory_is_told_at_once(tmp_path: Path, missing: str) -> None:
    places = {"directory": tmp_path, "boot_id_file": tmp_path / "boot_id"}
    (tmp_path / "boot_id").write_text("b")
    places[missing] = tmp_path / "nothing"

    with pytest.raises(TryElsewhereError) as caught:
        SharedMemoryTransport(places["directory"], boot_id_file=places["boot_id_file"])

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED


async def test_other_boots_and_other_directories_are_other_hosts(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "boot").write_text("another")
    here = SharedMemoryTransport(tmp_path / "one")
    same = SharedMemoryTransport(tmp_path / "one")
    container = SharedMemoryTransport(tmp_path / "two")
    machine = SharedMemoryTransport(tmp_path / "one", boot_id_file=tmp_path / "boot")
    pool = here.allocate(8, 256)
    assert pool is not None
    public_name = await here.serve(AGENT, pool)

    assert here.reach == same.reach
    assert len({here.reach, container.reach, machine.reach}) == 3
    for stranger in (container, machine):
        with pytest.raises(TryElsewhereError) as caught:
            await pull(stranger, public_name)
        assert caught.value.reason is Reason.KV_TRANSFER_FAILED
        assert "another host" in caught.value.message
    assert await pull(same, public_name) == 256
    await here.aclose()
    await same.aclose()


@pytest.mark.parametrize(
    "content", [b"", b"x" * 4096, b"kvmesh\0p\x02" + bytes(4087), b"kvmesh\0p\x01" + bytes(7) + b"\xff" * 16]
)
async def test_file_that_is_no_pool_is_refused(
    transport: SharedMemoryTransport, tmp_path: Path, content: bytes
) -> None:
    pool = transport.allocate(8, 256)
    assert pool is not None
    public_name = await transport.serve(AGENT, pool)
    (tmp_path / file_name("other@1")).write_bytes(content)

    with pytest.raises(TryElsewhereError):
        await pull(transport, public_name.replace(AGENT, "other@1"))


async def test_mapping_a_dead_source_leaves_no_file_open(transport: SharedMemoryTransport, tmp_path: Path) -> None:
    public_name = leave_behind(tmp_path, "node/prefill/0@1")
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(10):
        with pytest.raises(TryElsewhereError):
            await pull(transport, public_name)

    assert len(os.listdir("/proc/self/fd")) == before


def test_file_names_are_safe_and_distinct() -> None:
    agents = ["a/b@1", "a%2Fb@1", "../../etc/passwd@1", "a" * 300 + "@1", "a" * 301 + "@1", "a@b@1", "ü\0@1", "+x@1"]

    made = [file_name(agent) for agent in agents]

    assert len(set(made)) == len(agents)
    assert all(name.startswith(PREFIX) and "/" not in name and "\0" not in name for name in made)
    assert all(len(name.encode()) <= 255 and not name.startswith(f"{PREFIX}+") for name in made)
