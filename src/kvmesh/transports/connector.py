"""Moves KV blocks between two engines of any kind over NIXL, with nothing of the mesh around it.

For engines that bring their own schedule of who moves what when. Two sides, each with a connector:

    both        register_kv_caches(caches)
    passive     metadata = get_agent_metadata()      ...handed to the active side by any channel
    active      add_remote_agent("decode-0", metadata)
    active      transfer = write_blocks("decode-0", [0, 3], [12, 16], b"request 7")      or read_blocks
    active      wait(transfer, timeout_s=2.0)        or status(transfer) now and then
    passive     wait_for_notification(timeout_s=2.0) == ("prefill-0", b"request 7")

Laws that NIXL leaves to whoever uses it:
- A notification comes after the blocks it is about, and only if all of them have arrived. A writer that dies leaves
  blocks partly written and no notification: do not read blocks before theirs, and do not use them for anything else
  before the writer is known to be gone. Reading has neither trouble: prefer it where you can choose.
- A transfer that failed or was abandoned may go on to write until the connector that began it is closed. The blocks
  of this side that this concerns are its `quarantined_blocks`.
- Agents make progress only within calls: the passive side must be waiting for, or asking for, notifications.

A connector is for one thread.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from kvmesh.core.errors import ConflictError, FixRequestError, NotKnownError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.transports.blocks import failed
from kvmesh.transports.connector_caches import RegisteredCaches, describe, read_metadata
from kvmesh.transports.nixl_agent import DescriptorList, NixlAgent, Operation, Transfer

_SPIN_S = 200e-6
_FIRST_LOOK_S = 50e-6
_LAST_LOOK_S = 1e-3


class TransferStatus(Enum):
    """How far a transfer is."""

    MOVING = "moving"
    DONE = "done"
    """Every block has arrived."""
    FAILED = "failed"
    """The target blocks are in no defined state."""
    ABANDONED = "abandoned"
    """Nobody waits for it any more."""


@dataclass(slots=True, eq=False)
class BlockTransfer:
    """A transfer that was begun; the connector keeps it up to date."""

    engine_id: str
    """Of the other side."""
    operation: Operation
    local_block_ids: tuple[int, ...]
    size_bytes: int
    """Of all layers together."""
    status: TransferStatus = TransferStatus.MOVING
    """As of the last look; `NixlConnector.status` takes one."""
    error: str = ""
    """Why it failed."""
    number: Transfer | None = None


@dataclass(frozen=True, slots=True)
class _Remote:
    agent_name: str
    caches: RegisteredCaches
    blocks: DescriptorList


class NixlConnector:
    """One engine's end."""

    def __init__(self, engine_id: str, *, rank: int = 0, devices: str | None = "lo") -> None:
        """Make an agent for one rank of an engine, under a name that no other agent has.

        `engine_id` is what the other side calls this one. `rank` is the device of CUDA caches. `devices` are the
        network devices to listen on, e.g. `mlx5_0:1,eth0`; None means all of them. With the default the other engine
        is a process of this host.

        Raises: TryElsewhereError(KV_TRANSFER_FAILED) when NIXL is not installed or cannot work here.
        """
        self.engine_id = engine_id
        self._rank = rank
        self._agent = NixlAgent(f"{engine_id}#{rank}#{uuid.uuid4().hex}", devices=devices)
        self._caches: RegisteredCaches | None = None
        self._kept: tuple[object, ...] = ()
        self._local: DescriptorList | None = None
        self._remotes: dict[str, _Remote] = {}
        self._moving: set[BlockTransfer] = set()
        self._notifications: list[tuple[str, bytes]] = []
        self._quarantined: set[int] = set()

    def __enter__(self) -> "NixlConnector":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def quarantined_blocks(self) -> frozenset[int]:
        """Local blocks that a read which failed or was abandoned may still write; they are nobody's before `close`."""
        return frozenset(self._quarantined)

    def register_kv_caches(self, kv_caches: Sequence[object]) -> None:
        """Register an array for each layer, in order; once, and before anything else.

        Each has the shape (blocks, block_size, heads, head_dim), any dtype, one shape and dtype for all, in C order:
        numpy arrays, or CUDA arrays (`__cuda_array_interface__`: torch, cupy). They are kept until `close`.

        Raises: FixRequestError(INVALID_FIELD) for other arrays; TryElsewhereError(KV_TRANSFER_FAILED).
        """
        if self._caches is not None:
            raise FixRequestError(Reason.INVALID_FIELD, "KV caches are registered once", field="kv_caches")
        caches = describe(kv_caches, device=self._rank)
        for region in caches.regions():
            self._agent.register(region)
        self._local = self._agent.prepare(caches.places(), kind=caches.kind)
        self._caches, self._kept = caches, tuple(kv_caches)

    def get_agent_metadata(self) -> bytes:
        """Return what the other side needs to move blocks to and from here; opaque, half a KiB and 8 bytes a layer.

        Raises: FixRequestError(INVALID_FIELD) before `register_kv_caches`; TryElsewhereError(KV_TRANSFER_FAILED).
        """
        caches = self._registered()
        return caches.metadata(self._agent.metadata())

    def add_remote_agent(self, engine_id: str, metadata: bytes) -> str:
        """Learn of another engine, to be called `engine_id` from now on; return its agent's name.

        Adding it again, e.g. after a restart, replaces the one before.

        Raises: FixRequestError(INVALID_FIELD) for other bytes than `get_agent_metadata` gives;
            ConflictError(LAYOUT_MISMATCH) when its caches differ in layers, block_size, heads, head_dim or dtype;
            TryElsewhereError(KV_TRANSFER_FAILED) when it cannot be connected to.
        """
        own = self._registered()
        theirs, native = read_metadata(metadata)
        if theirs.layout != own.layout:
            raise ConflictError(
                Reason.LAYOUT_MISMATCH, f"{engine_id} has KV caches of {theirs.layout}, these are {own.layout}"
            )
        self.remove_remote_agent(engine_id)
        agent_name = self._agent.add_peer(native)
        try:
            blocks = self._agent.prepare(theirs.places(), peer=agent_name, kind=theirs.kind)
        except BaseException:
            self._agent.remove_peer(agent_name)
            raise
        self._remotes[engine_id] = _Remote(agent_name, theirs, blocks)
        return agent_name

    def remove_remote_agent(self, engine_id: str) -> None:
        """Forget an engine, known or not; its transfers are abandoned."""
        remote = self._remotes.pop(engine_id, None)
        if remote is not None:
            for transfer in [moving for moving in self._moving if moving.engine_id == engine_id]:
                self.abandon(transfer)
            self._agent.unprepare(remote.blocks)
            self._agent.remove_peer(remote.agent_name)

    def write_blocks(
        self, engine_id: str, local_block_ids: Sequence[int], remote_block_ids: Sequence[int], notification: bytes = b""
    ) -> BlockTransfer:
        """Begin to copy own blocks into another engine's, pair by pair, every layer; on one host mostly done already.

        `notification`, unless empty, is given to the other side once all blocks are there.

        Raises: NotKnownError(NOT_FOUND) for an engine that was not added; FixRequestError(INVALID_FIELD) for ids that
            are none or do not pair; TryElsewhereError(KV_TRANSFER_FAILED).
        """
        return self._begin("WRITE", engine_id, local_block_ids, remote_block_ids, notification)

    def read_blocks(
        self, engine_id: str, local_block_ids: Sequence[int], remote_block_ids: Sequence[int], notification: bytes = b""
    ) -> BlockTransfer:
        """Begin to copy another engine's blocks into own ones; the rest is as in `write_blocks`.

        The notification tells the other side that its blocks have been read, and may be used again.
        """
        return self._begin("READ", engine_id, local_block_ids, remote_block_ids, notification)

    def status(self, transfer: BlockTransfer) -> TransferStatus:
        """Look how far a transfer is, without waiting."""
        if transfer.status is TransferStatus.MOVING and transfer.number is not None:
            try:
                is_done = self._agent.is_done(transfer.number)
            except TryElsewhereError as error:
                self._ended(transfer, TransferStatus.FAILED, error.message)
            else:
                if is_done:
                    self._ended(transfer, TransferStatus.DONE)
        return transfer.status

    def wait(self, transfer: BlockTransfer, *, timeout_s: float) -> None:
        """Block until every block has arrived; a transfer that takes longer is abandoned.

        Raises: OutOfTimeError(KV_TRANSFER_FAILED) then; TryElsewhereError(KV_TRANSFER_FAILED) when it fails.
        """
        if not _look_until(lambda: self.status(transfer) is not TransferStatus.MOVING, timeout_s):
            self.abandon(transfer)
            raise OutOfTimeError(Reason.KV_TRANSFER_FAILED, f"{transfer.engine_id}: not moved within {timeout_s:.1f} s")
        if transfer.status is not TransferStatus.DONE:
            raise failed(transfer.error or f"the transfer was {transfer.status.value}")

    def abandon(self, transfer: BlockTransfer) -> None:
        """Give a transfer up: nobody waits for it any more, but it may go on. No effect on one that has ended."""
        if self.status(transfer) is TransferStatus.MOVING and transfer.number is not None:
            self._agent.abandon(transfer.number)
            self._ended(transfer, TransferStatus.ABANDONED)

    def notifications(self) -> list[tuple[str, bytes]]:
        """Return what has come since the last call, in order: (engine id of the sender, notification)."""
        self._collect()
        found, self._notifications = self._notifications, []
        return found

    def wait_for_notification(self, *, timeout_s: float) -> tuple[str, bytes]:
        """Block until there is a notification, and return the first.

        Raises: OutOfTimeError(KV_TRANSFER_FAILED).
        """
        if not _look_until(self._collect, timeout_s):
            raise OutOfTimeError(Reason.KV_TRANSFER_FAILED, f"no notification within {timeout_s:.1f} s")
        return self._notifications.pop(0)

    def close(self) -> None:
        """Destroy the agent: no transfer begun here goes on, and nothing is quarantined any more. Idempotent."""
        self._agent.close()
        for transfer in tuple(self._moving):
            self._ended(transfer, TransferStatus.FAILED, "the connector was closed")
        self._quarantined.clear()
        self._remotes.clear()
        self._kept = ()

    def _begin(
        self,
        operation: Operation,
        engine_id: str,
        local_block_ids: Sequence[int],
        remote_block_ids: Sequence[int],
        notification: bytes,
    ) -> BlockTransfer:
        own, remote = self._registered(), self._remotes.get(engine_id)
        if remote is None:
            raise NotKnownError(Reason.NOT_FOUND, f"no engine was added as {engine_id}")
        if len(local_block_ids) != len(remote_block_ids):
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"{len(local_block_ids)} blocks do not pair with {len(remote_block_ids)}",
                field="block_ids",
            )
        assert self._local is not None, "prepared with the caches"
        own_indices, their_indices = own.indices(local_block_ids), remote.caches.indices(remote_block_ids)
        size_bytes = len(own_indices) * own.block_bytes
        transfer = BlockTransfer(engine_id, operation, tuple(map(int, local_block_ids)), size_bytes)
        self._moving.add(transfer)
        try:
            transfer.number = self._agent.begin(
                operation,
                own=self._local,
                own_indices=own_indices,
                theirs=remote.blocks,
                their_indices=their_indices,
                notification=notification,
            )
        except TryElsewhereError as error:
            self._ended(transfer, TransferStatus.FAILED, error.message)
            raise
        self.status(transfer)
        return transfer

    def _ended(self, transfer: BlockTransfer, status: TransferStatus, error: str = "") -> None:
        transfer.status, transfer.error, transfer.number = status, error, None
        self._moving.discard(transfer)
        if status is not TransferStatus.DONE and transfer.operation == "READ":
            self._quarantined.update(transfer.local_block_ids)

    def _collect(self) -> bool:
        """Fetch new notifications; tell whether there are any, old or new."""
        for agent_name, notification in self._agent.notifications():
            self._notifications.append((agent_name.rsplit("#", 2)[0], notification))
        return bool(self._notifications)

    def _registered(self) -> RegisteredCaches:
        if self._caches is None:
            raise FixRequestError(Reason.INVALID_FIELD, "register the KV caches first", field="kv_caches")
        return self._caches


def _look_until(is_so: Callable[[], bool], timeout_s: float) -> bool:
    """Call `is_so` until it holds: at first all the time, then ever less often. False once time is up."""
    began = time.monotonic()
    wait_s = _FIRST_LOOK_S
    while not is_so():
        now = time.monotonic()
        if now - began > timeout_s:
            return False
        if now - began > _SPIN_S:
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LAST_LOOK_S)
    return True
