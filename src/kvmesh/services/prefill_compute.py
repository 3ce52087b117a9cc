"""Computes prefill tasks on a worker's engine and lends the finished blocks."""

import asyncio
from dataclasses import replace

from kvmesh.core.errors import ConflictError, FixRequestError, MeshError, Reason, TryElsewhereError
from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.core.ids import AttemptKey, RequestId
from kvmesh.engines.engine import EngineRequest, Output, Pin
from kvmesh.services.decode_request import to_prefill_request
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.handoff_source import HandoffSource
from kvmesh.services.prefix_fetch import PrefixFetch
from kvmesh.v1 import prefill_queue_pb2
from kvmesh.wire.layout import describe_layout_difference, layout_to_wire


class _Outcome:
    """The engine driver's listener for one prefill: its future is the last output."""

    def __init__(self) -> None:
        self.done: asyncio.Future[Output] = asyncio.get_running_loop().create_future()

    def output(self, output: Output) -> None:
        if output.finish is not None and not self.done.done():
            self.done.set_result(output)
        elif output.error is not None and not self.done.done():
            self.done.set_exception(output.failure or TryElsewhereError(Reason.PREFILL_FAILED, output.error))

    def failed(self, error: MeshError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class PrefillCompute:
    """Turns tasks into handoffs; several run at once, batched by the engine."""

    def __init__(self, *, driver: EngineDriver, source: HandoffSource, prefixes: PrefixFetch) -> None:
        """Compute on `driver`'s engine what neither it nor the task's prefix has; `source` lends the blocks."""
        self.counters = {
            "tasks": 0, "computed_tokens": 0, "cached_tokens": 0, "prefix_tokens": 0, "bytes_handed_over": 0,
        }  # fmt: skip
        self._driver = driver
        self._source = source
        self._prefixes = prefixes
        self._computations = 0

    async def compute(self, task: prefill_queue_pb2.PrefillTask) -> prefill_queue_pb2.TaskCompleted:
        """Compute a task's blocks and lend them. Cancelling frees everything.

        Raises: ConflictError(LAYOUT_MISMATCH), FixRequestError for a task nobody can do, else TryElsewhereError.
        """
        layout = self._driver.info.layout
        if layout is not None and task.HasField("layout") and task.layout != layout_to_wire(layout):
            raise ConflictError(Reason.LAYOUT_MISMATCH, describe_layout_difference(task.layout, layout_to_wire(layout)))
        request, prompt_tokens = to_prefill_request(task, self._driver.info)
        # Each lease of a task is a request of its own to the engine: an abandoned one may still be ending, and a queue
        # that was restarted counts its leases from 1 again.
        self._computations += 1
        key = AttemptKey(RequestId(f"{task.request_id}/{task.attempt}"), self._computations)
        request = replace(request, key=key)
        prefix = None
        if layout is not None and task.HasField("prefix"):
            prefix = await self._prefixes.fetch(task.prefix, request, prompt_tokens=prompt_tokens)
        pulled_tokens = 0 if prefix is None else prefix.tokens
        try:
            output = await self._run(replace(request, imported_tokens=pulled_tokens))
        finally:
            if prefix is not None:
                self._unpin(prefix.pin_id)
        return await self._hand_over(task, output, prompt_tokens=prompt_tokens, prefix_tokens=pulled_tokens)

    def give_back(self, result: prefill_queue_pb2.TaskCompleted) -> None:
        """Free the blocks of a result that nobody will fetch."""
        self._source.take_back(result.handoff)

    async def _run(self, request: EngineRequest) -> Output:
        outcome = _Outcome()
        self._driver.submit(request, outcome)
        try:
            # Shielded: a cancelled waiter must not cancel the future, or an output that arrives before the waiter
            # runs again would be dropped, and its pin with it.
            return await asyncio.shield(outcome.done)
        except asyncio.CancelledError:
            self._abandon(request.key, outcome)
            raise

    def _abandon(self, key: AttemptKey, outcome: _Outcome) -> None:
        """The waiter is gone: stop the work, or free what had just been finished."""
        if outcome.done.done() and outcome.done.exception() is None:
            self._free(outcome.done.result().pin)
        self._driver.cancel(key)

    async def _hand_over(
        self, task: prefill_queue_pb2.PrefillTask, output: Output, *, prompt_tokens: int, prefix_tokens: int
    ) -> prefill_queue_pb2.TaskCompleted:
        info, pin = self._driver.info, output.pin
        last_block = max_overlap_blocks(prompt_tokens, info.block_size) if info.layout is not None else 0
        in_blocks = prompt_tokens if info.layout is None else last_block * info.block_size  # no more is computed
        result = prefill_queue_pb2.TaskCompleted(
            computed_tokens=in_blocks - output.cached_tokens - prefix_tokens,
            cached_tokens=output.cached_tokens,
            prefix_tokens=prefix_tokens,
        )
        self.counters["tasks"] += 1
        self.counters["computed_tokens"] += result.computed_tokens
        self.counters["cached_tokens"] += result.cached_tokens
        self.counters["prefix_tokens"] += result.prefix_tokens
        if info.layout is None or pin is None or not pin.block_ids:
            self._free(pin)
            result.handoff.CopyFrom(self._source.empty())
            if output.handoff is not None:
                result.handoff.engine_state = output.handoff.state
                result.handoff.first_tokens.extend(output.handoff.first_tokens)
            return result
        if len(pin.block_ids) != last_block or task.first_block > last_block:
            self._free(pin)
            raise FixRequestError(Reason.PREFILL_FAILED, f"first_block {task.first_block} of {last_block}")
        result.handoff.CopyFrom(await self._source.lend(pin, first_block=task.first_block, reaches=task.transports))
        self.counters["bytes_handed_over"] += result.handoff.bytes_total
        return result

    def _free(self, pin: Pin | None) -> None:
        if pin is not None:
            self._unpin(pin.pin_id)

    def _unpin(self, pin_id: int) -> None:
        self._driver.post(lambda engine: engine.unpin(pin_id))
