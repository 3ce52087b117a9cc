"""Moves blocks between processes of one host: a pool lies in a file in shared memory, and pullers map it read-only.

Life of a pool's file, in the directory that all workers of a host have in common:

    allocate    `kvmesh-pool-+<random>`, sparse: its pages are taken when blocks are first written
    serve       renamed to a name made of the agent name, so that pullers find it
    aclose      removed; whoever has it mapped keeps the pages, and nobody new finds it
    kill -9     left behind; the next `allocate` of any worker of the host removes it

Whose worker lives is told by a lock: the owner holds one on its file, and the kernel drops it with the process, however
that ends. A puller looks at it too: the memory of a dead worker would copy well, and be refused only at Release.

Two workers share memory exactly if they have the same boot, directory and user; `reach` is a digest of these. A
container with its own /dev/shm has another directory.

A file system that is full ends whoever touches a new page with SIGBUS. So `allocate` counts what every pool there may
yet touch, and refuses what does not fit; what others than pools take of it later is not foreseen.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvmesh.transports import pool_file
from kvmesh.transports.blocks import Pool, check_pairing, check_source, copy_blocks, failed
from kvmesh.transports.pool_file import MappedPool, OwnedPool

SHARED_DIRECTORY = Path("/dev/shm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SEPARATOR = "@"


@dataclass(slots=True)
class _Allocated:
    """A pool that this worker owns; served under a name, or not yet."""

    owned: OwnedPool
    memory: Pool


class SharedMemoryTransport:
    """One worker's end of the pools of a host."""

    def __init__(self, directory: Path = SHARED_DIRECTORY, *, boot_id_file: Path = _BOOT_ID) -> None:
        """Look at the host. Raises: TryElsewhereError(KV_TRANSFER_FAILED) when it has no such directory or boot id."""
        self._directory = directory
        self._host = _host_identity(directory, boot_id_file)
        self._allocated: list[_Allocated] = []
        self._mapped: dict[str, MappedPool] = {}

    @property
    def name(self) -> str:
        """`shared_memory`."""
        return "shared_memory"

    @property
    def reach(self) -> str:
        """`shared_memory@<host>`."""
        return f"{self.name}{_SEPARATOR}{self._host}"

    def allocate(self, blocks: int, block_bytes: int) -> npt.NDArray[np.uint8] | None:
        """Return a pool in a sparse file that nobody else finds before it is served."""
        pool_file.remove_dead(self._directory)
        owned = OwnedPool.create(self._directory, blocks, block_bytes)
        memory = owned.map()
        self._allocated.append(_Allocated(owned, memory))
        return memory

    async def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> str:
        """Let others of this host pull from `memory`, which `allocate` returned, under `<agent name>@<host>`."""
        mine = next((pool for pool in self._allocated if _is_same(pool.memory, memory)), None)
        if mine is None:
            raise failed("this pool was not allocated in shared memory")
        mine.owned.publish(agent_name)
        return f"{agent_name}{_SEPARATOR}{self._host}"

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        """Copy blocks from the mapped pool of another worker of this host."""
        check_pairing(source_block_ids, target, target_block_ids)
        agent, _, host = agent_name.rpartition(_SEPARATOR)
        if host != self._host:
            raise failed(f"{agent_name} is of another host than {self._host}")
        source = self._map(agent)
        check_source(agent_name, source.memory, source_block_ids, block_bytes=int(target.shape[1]))
        moved = await copy_blocks(source.memory, source_block_ids, target, target_block_ids)
        if not source.is_live():
            raise failed(f"{agent_name} ended during the pull")
        return moved

    async def aclose(self) -> None:
        """Remove what was served and forget what was mapped; the memory itself goes with its last user."""
        for pool in self._allocated:
            pool.owned.close()
        self._allocated.clear()
        for mapped in self._mapped.values():
            mapped.close()
        self._mapped.clear()

    def _map(self, agent: str) -> MappedPool:
        """Return a live worker's pool, mapped once; the mappings of those that ended are dropped on the way."""
        for gone in [name for name, mapped in self._mapped.items() if not mapped.is_live()]:
            self._mapped.pop(gone).close()
        if agent not in self._mapped:
            self._mapped[agent] = MappedPool.open(self._directory, agent)
        return self._mapped[agent]


def _is_same(one: Pool, other: Pool) -> bool:
    """Tell whether two arrays are the same memory: an engine may hold a view of what it was given."""
    return one.shape == other.shape and one.ctypes.data == other.ctypes.data


def _host_identity(directory: Path, boot_id_file: Path) -> str:
    try:
        boot_id = boot_id_file.read_text().strip()
        found = directory.stat()
    except OSError as exc:
        raise failed(f"no memory is shared on this host: {exc}") from exc
    if not directory.is_dir() or not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise failed(f"no memory is shared on this host: {directory} is no directory to write to")
    facts = (boot_id, found.st_dev, found.st_ino, os.getuid())  # the user: pools are KV of prompts, and its own alone
    return blake2b("/".join(map(str, facts)).encode(), digest_size=8).hexdigest()
