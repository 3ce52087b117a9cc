"""Fetches the blocks of a handoff into an engine: check, import, pull, release, commit.

Decode workers fetch what was computed for them, prefill workers the prefix of a task.

Who holds which blocks, and until when:
    import           this engine's new blocks; invisible until `commit_import`, freed by `abort_import`
    handoff's pin    the other worker's blocks; held until KvTransfer.Release, whose OK is the permission to commit

Whatever fails, or is cancelled, the import is aborted and the handoff's pin is released.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
import numpy.typing as npt

from kvmesh import telemetry
from kvmesh.core.block_checksums import find_altered
from kvmesh.core.errors import BackOffError, ConflictError, MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.ids import SequenceHash
from kvmesh.core.waits import Waits
from kvmesh.engines.engine import Engine, Import, Pin
from kvmesh.services.channels import Channels
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.kv_plane import KvPlane
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.worker_transports import ServedBy, WorkerTransports
from kvmesh.v1 import generation_pb2, kv_transfer_pb2, kv_transfer_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.layout import describe_layout_difference, layout_to_wire

log = telemetry.logger(__name__)

_TRANSFER_BYTES_PER_S = 100 << 20


@dataclass(frozen=True, slots=True)
class Fetched:
    """Blocks that arrived whole and are prefix cache now."""

    pin_id: int
    """Of the whole sequence from block 0; the caller's to give back."""
    bytes_moved: int


class HandoffFetch:
    """Fetches handoffs for one engine."""

    def __init__(
        self,
        *,
        driver: EngineDriver,
        channels: Channels,
        transports: WorkerTransports,
        waits: Waits,
        peers: Peers | None = None,
        kv_plane: KvPlane | None = None,
    ) -> None:
        """Import into `driver`'s engine what one of `transports` pulls.

        `peers` tell how else a source can be pulled from than its handoff says; None: nothing does. `kv_plane` is told
        how each transfer ended.
        """
        self._driver = driver
        self._peers = peers
        self._kv_plane = kv_plane
        self._channels = channels
        self._transports = transports
        self._waits = waits
        self._tasks = OwnedTasks()
        self._giving_up: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Give back what others hold for this worker, within the bound of one call; the rest ends by time."""
        if self._giving_up:
            await asyncio.wait(tuple(self._giving_up), timeout=self._waits.connect_s)
        await self._tasks.aclose()

    async def fetch(
        self,
        handoff: generation_pb2.KvHandoff,
        *,
        first_block: int,
        hashes: tuple[SequenceHash, ...],
        local_hashes: tuple[int, ...],
        spare_blocks: int = 0,
    ) -> Fetched:
        """Fetch the blocks `first_block` and on of the sequence `hashes`; the caller holds a pin of those before.

        The handoff may begin with earlier blocks and ends with the sequence. `spare_blocks` are left to be had: those
        that the request behind it still needs.

        Raises: MeshError; nothing is left held then.
        """
        try:
            self._check(handoff, first_block, hashes)
            wanted = await self._driver.acquire(
                lambda engine: _begin_import(engine, hashes, first_block=first_block, spare_blocks=spare_blocks),
                undo=lambda engine, begun: engine.abort_import(begun.import_id),
            )
            return await self._move(handoff, wanted, hashes, local_hashes)
        except BaseException:
            self.give_up(handoff)
            raise

    def _check(self, handoff: generation_pb2.KvHandoff, first_block: int, hashes: tuple[SequenceHash, ...]) -> None:
        if self._driver.info.layout is None:
            raise ConflictError(Reason.LAYOUT_MISMATCH, f"{handoff.worker_id} hands over blocks; this engine has none")
        wanted = layout_to_wire(self._driver.info.layout)
        if handoff.layout != wanted:
            difference = describe_layout_difference(wanted, handoff.layout)
            raise ConflictError(Reason.LAYOUT_MISMATCH, f"{handoff.worker_id} hands over another layout: {difference}")
        self._transports.get(handoff.transport)
        if (
            handoff.first_block > first_block
            or tuple(handoff.block_hashes) != hashes[handoff.first_block :]
            or len(handoff.blocks.source_block_ids) != len(handoff.block_hashes)
            or len(handoff.block_checksums) not in (0, len(handoff.block_hashes))
        ):
            raise TryElsewhereError(
                Reason.KV_TRANSFER_FAILED, f"{handoff.worker_id} hands over other blocks than asked for"
            )

    async def _move(
        self,
        handoff: generation_pb2.KvHandoff,
        wanted: Import,
        hashes: tuple[SequenceHash, ...],
        local: tuple[int, ...],
    ) -> Fetched:
        """Pull, have the source say that it held still, commit. The import is aborted unless all three succeed."""
        try:
            moved = await self._pull_and_note(handoff, wanted)
            await self._release(handoff)
        except BaseException:
            self._driver.post(lambda engine: engine.abort_import(wanted.import_id))
            raise
        checksums = handoff.block_checksums[wanted.first_block - handoff.first_block :]

        def commit(engine: Engine) -> Pin:
            _check_bytes(engine, wanted, checksums)
            return engine.commit_import(wanted.import_id, block_hashes=hashes, local_hashes=local)

        pin = await self._driver.acquire(commit, undo=lambda engine, pin: engine.unpin(pin.pin_id))
        return Fetched(pin_id=pin.pin_id, bytes_moved=moved)

    async def _pull_and_note(self, handoff: generation_pb2.KvHandoff, wanted: Import) -> int:
        try:
            moved = await self._pull(handoff, wanted)
        except MeshError as error:
            if self._kv_plane is not None and error.reason is Reason.KV_TRANSFER_FAILED:
                self._kv_plane.failed(handoff.worker_id, handoff.epoch, error.message)
            raise
        if self._kv_plane is not None:
            self._kv_plane.moved(handoff.worker_id, handoff.epoch)
        return moved

    async def _pull(self, handoff: generation_pb2.KvHandoff, wanted: Import) -> int:
        memory = await self._driver.call(lambda engine: engine.kv_memory())
        if memory is None:
            raise ConflictError(Reason.LAYOUT_MISMATCH, "this engine has no KV memory")
        size_bytes = len(wanted.block_ids) * memory.shape[1]  # our own figures: the handoff's are a stranger's word
        bound_s = self._waits.kv_transfer_s + size_bytes / _TRANSFER_BYTES_PER_S
        try:
            async with asyncio.timeout(bound_s):
                return await self._pull_by_any(handoff, wanted, memory)
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="kv_transfer_s").inc()
            raise OutOfTimeError(Reason.KV_TRANSFER_FAILED, f"not moved within {bound_s:.1f} s") from exc

    async def _pull_by_any(
        self, handoff: generation_pb2.KvHandoff, wanted: Import, memory: npt.NDArray[np.uint8]
    ) -> int:
        """Pull by what the handoff names; when that fails, by the next that both sides have, into the same blocks."""
        named = ServedBy(handoff.transport, handoff.agent_name)
        metadata = self._peers.metadata(handoff.worker_id, handoff.epoch) if self._peers is not None else {}
        ways = [named, *self._transports.others(metadata, than=named)]
        for way in ways:
            transport = self._transports.get(way.reach)
            try:
                moved = await transport.pull(
                    way.agent_name,
                    source_block_ids=handoff.blocks.source_block_ids[wanted.first_block - handoff.first_block :],
                    target=memory,
                    target_block_ids=wanted.block_ids,
                )
            except TryElsewhereError as error:
                telemetry.KV_PULLS_FAILED.labels(transport=transport.name).inc()
                log.warning(
                    "handoff.pull_failed", worker_id=handoff.worker_id, transport=transport.name, error=error.message
                )
                if way is ways[-1]:
                    raise
                continue
            telemetry.KV_BYTES_MOVED.labels(transport=transport.name).inc(moved)
            return moved
        raise AssertionError("there is one way at least")

    def give_up(self, handoff: generation_pb2.KvHandoff) -> None:
        """Release without anybody waiting for it: the source would else hold its blocks until their pin ends."""
        if handoff.pin_id:
            task = self._tasks.start(self._release_quietly(handoff), name="release-handoff")
            self._giving_up.add(task)
            task.add_done_callback(self._giving_up.discard)

    async def _release_quietly(self, handoff: generation_pb2.KvHandoff) -> None:
        try:
            await self._release(handoff)
        except MeshError as error:
            log.debug("handoff.not_released", worker_id=handoff.worker_id, reason=error.reason.value)

    async def _release(self, handoff: generation_pb2.KvHandoff) -> None:
        stub = kv_transfer_pb2_grpc.KvTransferStub(self._channels.get(handoff.address))
        release = kv_transfer_pb2.KvTransferReleaseRequest(
            worker_id=handoff.worker_id, epoch=handoff.epoch, pin_id=handoff.pin_id
        )
        try:
            await stub.Release(release, timeout=self._waits.connect_s)
        except grpc.aio.AioRpcError as exc:
            if exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                telemetry.WAIT_ENDED.labels(wait="connect_s").inc()
                text = f"{handoff.worker_id} did not say within {self._waits.connect_s:g} s that its blocks held still"
                raise OutOfTimeError(Reason.KV_TRANSFER_FAILED, text) from exc
            raise from_rpc_error(exc) from exc


def _check_bytes(engine: Engine, wanted: Import, checksums: Sequence[int]) -> None:
    """Abort an import whose bytes are not those that were lent. Raises: TryElsewhereError(KV_TRANSFER_FAILED)."""
    memory = engine.kv_memory()
    altered = find_altered(memory, wanted.block_ids, checksums) if checksums and memory is not None else []
    if altered:
        telemetry.KV_BLOCKS_ALTERED.inc(len(altered))
        engine.abort_import(wanted.import_id)
        raise TryElsewhereError(
            Reason.KV_TRANSFER_FAILED,
            f"{len(altered)} of {len(wanted.block_ids)} blocks arrived with another checksum, first {altered[0]}",
        )


def _begin_import(engine: Engine, hashes: tuple[SequenceHash, ...], *, first_block: int, spare_blocks: int) -> Import:
    """Begin an import, unless it would leave less than `spare_blocks`. Raises: BackOffError(OVERLOADED)."""
    load = engine.load()
    available = load.total_blocks - load.active_blocks - (len(hashes) - first_block)
    if spare_blocks and available < spare_blocks:
        raise BackOffError(
            Reason.OVERLOADED, f"{spare_blocks} blocks wanted beside the import, {max(available, 0)} to be had"
        )
    return engine.begin_import(hashes, first_block=first_block)
