"""Computes prefill tasks on a worker's engine and lends the finished blocks."""

import asyncio
from dataclasses import replace

from kvmesh.core.errors import ConflictError, FixRequestError, MeshError, Reason, TryElsewhereError
from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.core.ids import AttemptKey, RequestId
from kvmesh.engines.engine import Output, Pin
from kvmesh.services.decode_request import to_prefill_request
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.identity import WorkerIdentity
from kvmesh.services.kv_transfer import LentPins
from kvmesh.transports.transport import Transport
from kvmesh.v1 import generation_pb2, prefill_queue_pb2
from kvmesh.wire.layout import layout_to_wire
from kvmesh.wire.validation import duration


class _Outcome:
    """The engine driver's listener for one prefill: its future is the last output."""

    def __init__(self) -> None:
        self.done: asyncio.Future[Output] = asyncio.get_running_loop().create_future()

    def output(self, output: Output) -> None:
        if output.finish is not None and not self.done.done():
            self.done.set_result(output)
        elif output.error is not None and not self.done.done():
            self.done.set_exception(TryElsewhereError(Reason.PREFILL_FAILED, output.error))

    def failed(self, error: MeshError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class PrefillCompute:
    """Turns tasks into handoffs; several run at once, batched by the engine."""

    def __init__(self, *, identity: WorkerIdentity, driver: EngineDriver, pins: LentPins, transport: Transport) -> None:
        """Compute on `driver`'s engine; the blocks are lent through `pins` and served by `transport`."""
        self.counters = {"tasks": 0, "computed_tokens": 0, "cached_tokens": 0, "bytes_handed_over": 0}
        self._identity = identity
        self._driver = driver
        self._pins = pins
        self._transport = transport
        self._computations = 0

    async def compute(self, task: prefill_queue_pb2.PrefillTask) -> prefill_queue_pb2.TaskCompleted:
        """Compute a task's blocks and lend them. Cancelling frees everything.

        Raises: ConflictError(LAYOUT_MISMATCH), FixRequestError for a task nobody can do, else TryElsewhereError.
        """
        layout = self._driver.info.layout
        if layout is not None and task.HasField("layout") and task.layout != layout_to_wire(layout):
            raise ConflictError(Reason.LAYOUT_MISMATCH, "the task wants blocks of another layout than this worker's")
        request, prompt_tokens = to_prefill_request(task, self._driver.info)
        # Each lease of a task is a request of its own to the engine: an abandoned one may still be ending, and a queue
        # that was restarted counts its leases from 1 again.
        self._computations += 1
        key = AttemptKey(RequestId(f"{task.request_id}/{task.attempt}"), self._computations)
        outcome = _Outcome()
        self._driver.submit(replace(request, key=key), outcome)
        try:
            # Shielded: a cancelled waiter must not cancel the future, or an output that arrives before the waiter
            # runs again would be dropped, and its pin with it.
            output = await asyncio.shield(outcome.done)
        except asyncio.CancelledError:
            self._abandon(key, outcome)
            raise
        return self._hand_over(task, output, prompt_tokens)

    def give_back(self, result: prefill_queue_pb2.TaskCompleted) -> None:
        """Free the blocks of a result that nobody will fetch."""
        if result.handoff.pin_id:
            self._pins.take_back(result.handoff.pin_id)

    def _abandon(self, key: AttemptKey, outcome: _Outcome) -> None:
        """The waiter is gone: stop the work, or free what had just been finished."""
        if outcome.done.done() and outcome.done.exception() is None:
            self._unpin(outcome.done.result().pin)
        self._driver.cancel(key)

    def _hand_over(
        self, task: prefill_queue_pb2.PrefillTask, output: Output, prompt_tokens: int
    ) -> prefill_queue_pb2.TaskCompleted:
        info, pin = self._driver.info, output.pin
        result = prefill_queue_pb2.TaskCompleted(
            computed_tokens=prompt_tokens - output.cached_tokens, cached_tokens=output.cached_tokens
        )
        self.counters["tasks"] += 1
        self.counters["computed_tokens"] += result.computed_tokens
        self.counters["cached_tokens"] += result.cached_tokens
        handoff = result.handoff
        handoff.worker_id, handoff.epoch, handoff.address = (
            self._identity.worker_id, self._identity.epoch, self._identity.address,
        )  # fmt: skip
        if info.layout is None or pin is None or not pin.block_ids:
            self._unpin(pin)
            return result
        last_block = max_overlap_blocks(prompt_tokens, info.block_size)
        if len(pin.block_ids) != last_block or task.first_block > last_block:
            self._unpin(pin)
            raise FixRequestError(Reason.PREFILL_FAILED, f"first_block {task.first_block} of {last_block}")
        self._describe(handoff, pin, first_block=task.first_block)
        self._pins.lend(pin)
        self.counters["bytes_handed_over"] += handoff.bytes_total
        return result

    def _describe(self, handoff: generation_pb2.KvHandoff, pin: Pin, *, first_block: int) -> None:
        layout = self._driver.info.layout
        assert layout is not None
        handoff.transport = self._transport.name
        handoff.agent_name = self._identity.agent_name
        handoff.layout.CopyFrom(layout_to_wire(layout))
        handoff.first_block = first_block
        handoff.block_hashes.extend(pin.block_hashes[first_block:])
        handoff.blocks.source_block_ids.extend(pin.block_ids[first_block:])
        handoff.bytes_total = len(handoff.block_hashes) * layout.bytes_per_block
        handoff.pin_id = pin.pin_id
        handoff.pin_ttl.CopyFrom(duration(self._pins.pin_ttl_s))

    def _unpin(self, pin: Pin | None) -> None:
        if pin is not None:
            self._driver.post(lambda engine: engine.unpin(pin.pin_id))
