"""One NIXL agent, whose end is certain: what it holds is held here alone, so that `close` destroys it.

NIXL cannot take a transfer back. Its `release` says that it did, and so does the removal of the peer; yet what a
stopped peer has been asked for is written when it continues (UCX over TCP, measured). The one end of that is the end
of the agent: it takes the connections, and whoever would write from them, with it. The library ends an agent when the
last reference to it goes, and every handle holds one; so handles never leave this module, numbers stand for them, and
errors are passed on without the frames that would keep them.

Not for two threads at once.
"""

import gc
import itertools
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NewType

import numpy as np
import numpy.typing as npt

from kvmesh.transports import nixl_library
from kvmesh.transports.blocks import failed

DescriptorList = NewType("DescriptorList", int)
"""A prepared list of places in memory, local or a peer's."""
Transfer = NewType("Transfer", int)
"""One that was begun and not ended."""
Places = npt.NDArray[np.uint64]
"""Shape (places, 3): address, bytes, device."""
Operation = Literal["READ", "WRITE"]
MemoryKind = Literal["DRAM", "VRAM"]

_DONE, _MOVING = "DONE", "PROC"
_LOCAL = "NIXL_INIT_AGENT"


@dataclass(frozen=True, slots=True)
class Region:
    """Consecutive memory."""

    address: int
    size_bytes: int
    device: int = 0
    kind: MemoryKind = "DRAM"

    def places(self, count: int) -> Places:
        """Cut it into `count` places of equal size."""
        each = self.size_bytes // max(count, 1)
        places = np.empty((count, 3), dtype=np.uint64)
        places[:, 0] = np.uint64(self.address) + np.arange(count, dtype=np.uint64) * np.uint64(each)
        places[:, 1] = each
        places[:, 2] = self.device
        return places


class NixlAgent:
    """One agent and everything that was made with it."""

    def __init__(self, name: str, *, devices: str | None = None) -> None:
        """Make an agent that listens on the network `devices` only. Raises: TryElsewhereError(KV_TRANSFER_FAILED)."""
        library = nixl_library.load()
        self._errors = library.errors
        self._numbers = itertools.count(1)
        self._lists: dict[DescriptorList, Any] = {}
        self._transfers: dict[Transfer, Any] = {}
        self._failed: set[Transfer] = set()
        self._registered: dict[int, Any] = {}
        self._native: Any = None
        self._is_closed = False
        with self._typed():
            self._native = library.create_agent(name, devices=devices)

    def register(self, region: Region) -> int:
        """Let transfers use memory, which must stay until `deregister`; return the number for that.

        Raises: TryElsewhereError(KV_TRANSFER_FAILED), as every method.
        """
        number = next(self._numbers)
        described = [(region.address, region.size_bytes, region.device, "")]
        with self._typed():
            self._registered[number] = self._native.register_memory(described, region.kind)
        return number

    def deregister(self, number: int) -> None:
        """Take it back."""
        with self._typed():
            self._native.deregister_memory(self._registered.pop(number))

    def metadata(self) -> bytes:
        """Return what a peer needs to know of this agent and the memory registered so far; opaque."""
        with self._typed():
            return bytes(self._native.get_agent_metadata())

    def add_peer(self, metadata: bytes) -> str:
        """Learn of a peer and begin to connect; return its name."""
        with self._typed():
            name = self._native.add_remote_agent(metadata)
            peer: str = name.decode() if isinstance(name, bytes) else str(name)
        try:
            with self._typed():
                self._native.make_connection(peer)
        except BaseException:
            self.remove_peer(peer)
            raise
        return peer

    def remove_peer(self, peer: str) -> None:
        """Forget a peer, known or not; later, the same name may be added again."""
        with suppress(*self._errors):
            self._native.remove_remote_agent(peer)

    def prepare(self, places: Places, *, peer: str = _LOCAL, kind: MemoryKind = "DRAM") -> DescriptorList:
        """Prepare places of registered memory, own or a peer's, to be named by their index."""
        number = DescriptorList(next(self._numbers))
        with self._typed():
            self._lists[number] = self._native.prep_xfer_dlist(peer, places, kind)
        return number

    def unprepare(self, prepared: DescriptorList) -> None:
        """Give a prepared list back."""
        with suppress(*self._errors):
            self._lists.pop(prepared).release()

    def begin(
        self,
        operation: Operation,
        *,
        own: DescriptorList,
        own_indices: Sequence[int] | npt.NDArray[np.int32],
        theirs: DescriptorList,
        their_indices: Sequence[int] | npt.NDArray[np.int32],
        notification: bytes = b"",
    ) -> Transfer:
        """Begin to move places, pair by pair; on one host much of it is done when this returns."""
        number = Transfer(next(self._numbers))
        with self._typed():
            self._transfers[number] = self._native.make_prepped_xfer(
                operation,
                self._lists[own],
                np.asarray(own_indices, dtype=np.int32),
                self._lists[theirs],
                np.asarray(their_indices, dtype=np.int32),
                notification,
            )
            try:
                state = self._native.transfer(self._transfers[number])
            except BaseException:
                self._fail(number)
                raise
        self._judge(number, state)
        return number

    def is_done(self, transfer: Transfer) -> bool:
        """Tell whether a transfer has ended well. Raises: as above once it has failed, from then on."""
        if transfer in self._failed:
            raise failed("NIXL: the transfer had failed")
        if transfer not in self._transfers:
            return True
        with self._typed():
            try:
                state = self._native.check_xfer_state(self._transfers[transfer])
            except BaseException:
                self._fail(transfer)
                raise
        return self._judge(transfer, state)

    def abandon(self, transfer: Transfer) -> None:
        """Forget a transfer. It may go on to write until this agent is closed."""
        self._drop(transfer)

    def notifications(self) -> list[tuple[str, bytes]]:
        """Return what peers attached to transfers that have arrived here since the last call: (peer, notification)."""
        with self._typed():
            found = self._native.get_new_notifs()
        return [
            (peer.decode() if isinstance(peer, bytes) else peer, bytes(notification))
            for peer, notifications in found.items()
            for notification in notifications
        ]

    def close(self) -> None:
        """Destroy the agent: from then on nothing is written or read through it. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        ended = weakref.ref(self._native.agent)
        for transfer in list(self._transfers):
            self._drop(transfer)
        for prepared in list(self._lists):
            self.unprepare(prepared)
        self._registered.clear()
        self._native = None
        if ended() is not None:
            gc.collect()
        assert ended() is None, "a handle has left this module"

    def _judge(self, transfer: Transfer, state: str) -> bool:
        if state == _MOVING:
            return False
        if state != _DONE:
            self._fail(transfer)
            raise failed(f"NIXL: the transfer ended as {state}")
        self._drop(transfer)
        return True

    def _fail(self, transfer: Transfer) -> None:
        self._failed.add(transfer)
        self._drop(transfer)

    def _drop(self, transfer: Transfer) -> None:
        with suppress(*self._errors):
            if transfer in self._transfers:
                self._transfers.pop(transfer).release()

    def _typed(self) -> "_Typed":
        if self._is_closed:
            raise failed("this agent was closed")
        return _Typed(self._errors)


class _Typed:
    """Passes NIXL's errors on as ours, without the frames that hold handles."""

    def __init__(self, errors: tuple[type[Exception], ...]) -> None:
        self._errors = errors

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        del frames  # this frame will be held by what it raises
        if isinstance(error, self._errors):
            raise failed(f"NIXL: {type(error).__name__}: {error}") from error.with_traceback(None)
