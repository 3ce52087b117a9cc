"""Moves blocks between processes by NIXL: one-sided reads of registered memory, on one host or over an RDMA fabric.

Beside its blocks a source registers a token, which lies in its memory for as long as it serves. A puller reads it when
it connects, and again after the blocks: a read of a source that has ended may well succeed, its token does not.

How far it reaches:
    with an RDMA device    everywhere, `nixl`
    else                   processes of one host, user and namespaces, `nixl@<digest of these>`; only loopback listens
Between hosts without RDMA, and where processes may not read each other's memory, UCX has the source's CPU answer the
reads over TCP. That is not offered: a source that is stopped meanwhile aborts when it continues and finds its puller
gone (UCX of NIXL 1.5.1, measured), and the transports of our own do as well.

One thread makes every call of NIXL. See `nixl_agent` for why agents are destroyed, `nixl_pulls` for when.
"""

import mmap
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvmesh.transports import nixl_library
from kvmesh.transports.blocks import Pool, check_pairing, failed
from kvmesh.transports.nixl_agent import NixlAgent, Region
from kvmesh.transports.nixl_host import FABRIC, LOOPBACK_DEVICE, has_fabric, host_identity
from kvmesh.transports.nixl_lane import Wanted
from kvmesh.transports.nixl_name import TOKEN_BYTES, NixlName
from kvmesh.transports.nixl_pulls import NixlPulls
from kvmesh.transports.nixl_thread import NixlThread, to_its_end


@dataclass(frozen=True, slots=True)
class _Served:
    agent: NixlAgent
    memory: Pool
    token: npt.NDArray[np.uint8]


class NixlTransport:
    """One worker's end: an agent for each pool that it serves, and one that pulls."""

    def __init__(self, host: str = "127.0.0.1", *, fabric: Path = FABRIC, stall_s: float = 10.0) -> None:
        """Load the library; `host` is what the worker binds: nothing but loopback listens if that is loopback.

        `stall_s` bounds the wait for a source in the middle of something.

        Raises: TryElsewhereError(KV_TRANSFER_FAILED) when NIXL is not there, or cannot work here.
        """
        nixl_library.load()
        reaches_everywhere = has_fabric(host, fabric)
        self._reach = self.name if reaches_everywhere else f"{self.name}@{host_identity()}"
        self._devices = None if reaches_everywhere else LOOPBACK_DEVICE
        self._thread = NixlThread()
        self._pulls = NixlPulls(self._thread, devices=self._devices, stall_s=stall_s)
        self._served: list[_Served] = []
        self._is_closed = False

    @property
    def name(self) -> str:
        """`nixl`."""
        return "nixl"

    @property
    def reach(self) -> str:
        """`nixl`, or `nixl@<host>`."""
        return self._reach

    def allocate(self, blocks: int, block_bytes: int) -> npt.NDArray[np.uint8] | None:
        """Any memory can be registered; that of huge pages is read several times faster by others of the host."""
        return _allocate_huge(blocks, block_bytes)

    async def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> str:
        """Register `memory` with an agent of its own; the public name carries all that a puller needs to connect."""
        _check_memory(memory)
        if self._is_closed:
            raise failed("this worker serves no more")
        return await self._thread.run(partial(self._register, agent_name, memory))

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        """Read blocks out of another worker's memory; `target` stays registered."""
        check_pairing(source_block_ids, target, target_block_ids)
        name = _checked(agent_name, target)
        if len(source_block_ids) and not 0 <= min(source_block_ids) <= max(source_block_ids) < name.blocks:
            raise failed(f"{name.agent_name} has no such block")
        if len(source_block_ids):
            await self._pulls.pull(Wanted(name, source_block_ids, target, target_block_ids))
        return len(source_block_ids) * name.block_bytes

    async def warm_up(self, agent_name: str, target: npt.NDArray[np.uint8]) -> None:
        """Connect to a source and register `target`: a tenth of a second that the first pull need not take.

        Raises: as `pull`.
        """
        await self._pulls.pull(Wanted(_checked(agent_name, target), (), target, ()))

    async def aclose(self) -> None:
        """Take the tokens back, end the pulls, destroy every agent."""
        if self._is_closed:
            return
        self._is_closed = True
        for served in self._served:
            served.token[:] = 0
        await to_its_end(self._close())

    async def _close(self) -> None:
        try:
            await self._pulls.aclose()
            await self._thread.run(self._unregister)
        finally:
            self._thread.stop()

    def _register(self, agent_name: str, memory: Pool) -> str:
        token = secrets.token_bytes(TOKEN_BYTES)
        kept = np.frombuffer(token, dtype=np.uint8).copy()
        agent = NixlAgent(f"{agent_name}#{token.hex()}", devices=self._devices)
        try:
            agent.register(Region(memory.ctypes.data, memory.nbytes))
            agent.register(Region(kept.ctypes.data, kept.nbytes))
            name = NixlName(
                agent_name=agent_name,
                token=token,
                blocks=memory.shape[0],
                block_bytes=memory.shape[1],
                address=memory.ctypes.data,
                token_address=kept.ctypes.data,
                metadata=agent.metadata(),
            )
        except BaseException:
            agent.close()
            raise
        self._served.append(_Served(agent, memory, kept))
        self._thread.serving.append(agent)
        return str(name)

    def _unregister(self) -> None:
        self._thread.serving.clear()
        for served in self._served:
            served.agent.close()
        self._served.clear()


def _allocate_huge(blocks: int, block_bytes: int) -> Pool:
    """Return memory that the kernel makes of huge pages where it can.

    The kernel pins the source's pages, one by one, for each read: in huge pages that is next to nothing, in others most
    of the time. Files in shared memory, where the pool would lie otherwise, have none by default.
    """
    size = max(blocks * block_bytes, 1)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8, count=blocks * block_bytes).reshape(blocks, block_bytes)


def _checked(agent_name: str, target: Pool) -> NixlName:
    _check_memory(target)
    name = NixlName.parse(agent_name)
    if name.block_bytes != target.shape[1]:
        raise failed(f"blocks of {name.block_bytes} bytes cannot be pulled into {target.shape[1]}")
    return name


def _check_memory(memory: Pool) -> None:
    if memory.ndim != 2 or not memory.flags.c_contiguous:
        raise failed("NIXL moves blocks of consecutive memory, shape (blocks, block_bytes)")
