"""Lends pinned blocks to another worker: the handoff that says where they are, and the pin that it is good for."""

from collections.abc import Sequence

from kvmesh.core.block_checksums import block_checksums
from kvmesh.engines.engine import Engine, Pin
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.identity import WorkerIdentity
from kvmesh.services.kv_transfer import LentPins
from kvmesh.services.worker_transports import WorkerTransports
from kvmesh.v1 import generation_pb2
from kvmesh.wire.layout import layout_to_wire
from kvmesh.wire.validation import duration


class HandoffSource:
    """Makes the handoffs of one worker; the counterpart of `HandoffFetch`."""

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        driver: EngineDriver,
        pins: LentPins,
        transports: WorkerTransports,
        checksums: bool = False,
    ) -> None:
        """Lend blocks of `driver`'s engine through `pins`; one of `transports` serves them.

        `checksums`: say what the bytes of each block are, at the price of reading them.
        """
        self._identity = identity
        self._driver = driver
        self._pins = pins
        self._transports = transports
        self._has_checksums = checksums

    def empty(self) -> generation_pb2.KvHandoff:
        """Return a handoff of no blocks, which holds no pin."""
        return generation_pb2.KvHandoff(
            worker_id=self._identity.worker_id, epoch=self._identity.epoch, address=self._identity.address
        )

    async def lend(self, pin: Pin, *, first_block: int = 0, reaches: Sequence[str] = ()) -> generation_pb2.KvHandoff:
        """Lend the blocks `first_block` and on of a pin, which is the caller's no longer.

        `reaches`: by what the puller can pull; () = not known.

        Raises: ConflictError(LAYOUT_MISMATCH) when that is nothing by which this worker serves; the pin is given back,
            as it is when the call is cancelled.
        """
        layout = self._driver.info.layout
        assert layout is not None
        block_ids = pin.block_ids[first_block:]
        try:
            served = self._transports.choose(reaches)
            checksums = await self._checksums(block_ids)
        except BaseException:
            self._driver.post(lambda engine: engine.unpin(pin.pin_id))
            raise
        handoff = self.empty()
        handoff.transport, handoff.agent_name = served
        handoff.layout.CopyFrom(layout_to_wire(layout))
        handoff.first_block = first_block
        handoff.block_hashes.extend(pin.block_hashes[first_block:])
        handoff.blocks.source_block_ids.extend(block_ids)
        handoff.block_checksums.extend(checksums)
        handoff.bytes_total = len(handoff.block_hashes) * layout.bytes_per_block
        handoff.pin_id = pin.pin_id
        handoff.pin_ttl.CopyFrom(duration(self._pins.pin_ttl_s))
        self._pins.lend(pin)
        return handoff

    def take_back(self, handoff: generation_pb2.KvHandoff) -> None:
        """Free what a handoff holds, unless it was released or its time was up."""
        if handoff.pin_id:
            self._pins.take_back(handoff.pin_id)

    async def _checksums(self, block_ids: Sequence[int]) -> list[int]:
        if not self._has_checksums or not block_ids:
            return []
        return await self._driver.call(lambda engine: _checksums(engine, block_ids))


def _checksums(engine: Engine, block_ids: Sequence[int]) -> list[int]:
    memory = engine.kv_memory()
    return block_checksums(memory, block_ids) if memory is not None else []
