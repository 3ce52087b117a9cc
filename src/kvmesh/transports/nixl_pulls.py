"""Pulls over NIXL, from the event loop: who is in flight on which lane, and the end of a lane that got stuck.

    free      the lane that new pulls join
    retired   one of its pulls failed, or was given up, while it might still be written; nobody joins any more
    ended     the last of its pulls has left, and its agent is destroyed: now those that were given up return

So a source that stands still costs its own pulls their time, and the others of the worker at most a new connection.
"""

import asyncio
import uuid
from functools import partial

from kvmesh.core.errors import MeshError
from kvmesh.transports.blocks import failed
from kvmesh.transports.nixl_lane import Move, NixlLane, Wanted
from kvmesh.transports.nixl_name import NixlName
from kvmesh.transports.nixl_thread import NixlThread, to_its_end

_FIRST_LOOK_S = 50e-6
_LAST_LOOK_S = 1e-3
_GRACE_S = 0.1
"""What is in flight when a pull is given up is mostly about to be done."""


class _SharedLane:
    """A lane and the pulls on it."""

    def __init__(self, devices: str | None) -> None:
        self.lane = NixlLane(f"kvmesh-{uuid.uuid4().hex}", devices=devices)
        self.pulls = 0
        self.is_retired = False
        self.ended = asyncio.Event()


class NixlPulls:
    """The pulls of one worker."""

    def __init__(self, thread: NixlThread, *, devices: str | None, stall_s: float) -> None:
        """Make every call of NIXL in `thread`."""
        self._thread = thread
        self._devices = devices
        self._stall_s = stall_s
        self._free: _SharedLane | None = None
        self._unended: set[_SharedLane] = set()
        self._is_closed = False

    async def pull(self, wanted: Wanted) -> None:
        """Read blocks. Raises: TryElsewhereError(KV_TRANSFER_FAILED)."""
        shared = self._join()
        move = Move(shared.lane.free_slots.pop())
        try:
            is_done = await self._thread.run(partial(shared.lane.begin, move, wanted, is_alone=shared.pulls == 1))
            if not is_done and not await self._go_on(shared.lane, move):
                raise failed("this worker pulls no more" if self._is_closed else "the source stands still")
        except BaseException as exc:
            failing = None if isinstance(exc, asyncio.CancelledError) else wanted.name
            await to_its_end(self._give_up(shared, move, failing))
            raise
        if shared.is_retired:
            await to_its_end(self._leave(shared, move))
        else:
            self._step_out(shared, move)

    async def aclose(self) -> None:
        """End every pull, and destroy what they used. Idempotent."""
        self._is_closed = True
        self._free = None
        for shared in tuple(self._unended):
            shared.is_retired = True
            if not shared.pulls:
                await self._end(shared)
            await shared.ended.wait()

    def _join(self) -> _SharedLane:
        if self._is_closed:
            raise failed("this worker pulls no more")
        if self._free is None:
            self._free = _SharedLane(self._devices)
            self._unended.add(self._free)
        if not self._free.lane.free_slots:
            raise failed(f"{self._free.pulls} pulls are under way")
        self._free.pulls += 1
        return self._free

    async def _go_on(self, lane: NixlLane, move: Move) -> bool:
        """Advance a pull until it is done; False if its source stands still, or this is closed."""
        loop = asyncio.get_running_loop()
        waits_for, wait_s, until = move.transfer, _FIRST_LOOK_S, loop.time() + self._stall_s
        while not self._is_closed:
            if move.transfer is not None:
                if loop.time() > until:
                    return False
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LAST_LOOK_S)
            if await self._thread.run(partial(lane.advance, move)):
                return True
            if move.transfer != waits_for:
                waits_for, wait_s, until = move.transfer, _FIRST_LOOK_S, loop.time() + self._stall_s
        return False

    async def _is_over(self, lane: NixlLane, move: Move) -> bool:
        """Tell whether what a pull that was given up has in flight comes to its end soon; most does."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _GRACE_S
        try:
            while move.is_writing and move.transfer is not None and loop.time() < until and not self._is_closed:
                await asyncio.sleep(_LAST_LOOK_S)
                await self._thread.run(partial(lane.settle, move))
        except MeshError:  # no end: see Move
            return False
        return not move.is_writing

    async def _give_up(self, shared: _SharedLane, move: Move, failing: NixlName | None) -> None:
        """Return when nothing is written for this pull any more; a source that is `failing` is connected to anew."""
        if await self._is_over(shared.lane, move):
            if failing is not None:
                await self._thread.run(partial(shared.lane.forget, failing))
            await self._leave(shared, move)
            return
        shared.is_retired = True
        if self._free is shared:
            self._free = None
        await self._leave(shared, move)
        await shared.ended.wait()

    async def _leave(self, shared: _SharedLane, move: Move) -> None:
        self._step_out(shared, move)
        if shared.is_retired and not shared.pulls:
            await self._end(shared)

    def _step_out(self, shared: _SharedLane, move: Move) -> None:
        shared.pulls -= 1
        if not move.is_writing:
            shared.lane.free_slots.append(move.slot)

    async def _end(self, shared: _SharedLane) -> None:
        if shared in self._unended:
            self._unended.discard(shared)
            try:
                await self._thread.run(shared.lane.close)
            finally:
                shared.ended.set()
