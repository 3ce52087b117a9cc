"""The prefill worker's pull loop against a real queue; the submitters are calls of the test."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest
import structlog

from kvmesh.core.errors import Reason
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.engines.engine import StepResult
from kvmesh.testing.worker_group import (
    GENEROUS_S,
    MODEL,
    WAITS,
    HeldSimulatedEngine,
    WorkerGroup,
    eventually,
)
from kvmesh.v1 import generation_pb2, kv_transfer_pb2, prefill_queue_pb2, worker_control_pb2
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.validation import duration

_PROMPT = generation_pb2.TokenIds(token_ids=range(18))


class CrashingEngine(HeldSimulatedEngine):
    """A held engine that crashes when it is let go."""

    def step(self) -> StepResult:
        if self.held:
            return super().step()
        raise RuntimeError("the device fell off the bus")


def submit(group: WorkerGroup, name: str, **fields: Any) -> Any:
    fields.setdefault("token_ids", _PROMPT)
    task = prefill_queue_pb2.PrefillTask(request_id=name, attempt=1, model=MODEL, uncached_tokens=18, **fields)
    return group.queue_stub().Submit(prefill_queue_pb2.SubmitRequest(task=task), timeout=GENEROUS_S)


async def outcome(submission: Any) -> tuple[list[str], prefill_queue_pb2.TaskCompleted]:
    """Return who held the task, in order, and what came of it."""
    holders = []
    async for message in submission:
        match message.WhichOneof("event"):
            case "leased":
                holders.append(message.leased.worker_id)
            case "completed":
                return holders, message.completed
    raise AssertionError("the stream ended without a result")


async def release(group: WorkerGroup, handoff: generation_pb2.KvHandoff) -> None:
    (holder,) = [worker for worker in group.workers if worker.identity.worker_id == handoff.worker_id]
    request = kv_transfer_pb2.KvTransferReleaseRequest(
        worker_id=handoff.worker_id, epoch=handoff.epoch, pin_id=handoff.pin_id
    )
    await group.pins(holder).Release(request, timeout=GENEROUS_S)


async def test_task_is_leased_computed_and_completed(group: WorkerGroup) -> None:
    await group.add_queue()
    worker = await group.add_prefill()

    holders, completed = await outcome(submit(group, "r"))
    await release(group, completed.handoff)

    assert holders == [worker.identity.worker_id]
    assert (completed.computed_tokens, completed.cached_tokens) == (16, 0)
    assert len(completed.handoff.blocks.source_block_ids) == 4
    await group.wait_idle()


async def test_tasks_run_at_once_up_to_the_slots(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    engine = HeldSimulatedEngine(held=True)
    worker = await group.add_prefill(engine)
    submissions = [
        submit(group, f"r{number}", token_ids=generation_pb2.TokenIds(token_ids=range(number * 20, number * 20 + 6)))
        for number in range(11)
    ]
    await eventually(lambda: (queue.queue.stats().leased, queue.queue.stats().depth) == (8, 3))
    running = (await group.info(worker)).requests

    engine.held = False
    for submission in submissions:
        await release(group, (await outcome(submission))[1].handoff)

    assert running == 8
    await group.wait_idle()


async def test_cancelled_task_is_stopped_on_the_worker(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    worker = await group.add_prefill(HeldSimulatedEngine(held=True))
    submission = submit(group, "r")
    await group.wait_until(worker, lambda info: info.requests == 1)

    submission.cancel()

    await group.wait_idle()
    assert queue.queue.stats().cancelled == 1
    assert (await group.info(worker)).counters["tasks"] == 0


async def test_lease_is_kept_while_the_work_takes_longer_than_its_ttl(group: WorkerGroup) -> None:
    await group.add_queue(QueueLimits(lease_ttl_s=0.3))
    engine = HeldSimulatedEngine(held=True)
    await group.add_prefill(engine)
    running = asyncio.ensure_future(outcome(submit(group, "r")))

    done_early, _ = await asyncio.wait([running], timeout=1.0)
    engine.held = False
    holders, completed = await running
    await release(group, completed.handoff)

    assert not done_early
    assert len(holders) == 1, "leased once, and never again"


async def test_task_that_nobody_can_do_is_dead_at_once(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await outcome(submit(group, "r", token_ids=generation_pb2.TokenIds(token_ids=[5000])))

    assert from_rpc_error(caught.value).reason is Reason.PREFILL_FAILED
    await group.wait_idle()


async def test_worker_that_stops_at_once_gives_its_task_to_another(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    first = await group.add_prefill(HeldSimulatedEngine(held=True), waits=replace(WAITS, drain_s=0.1))
    running = asyncio.ensure_future(outcome(submit(group, "r")))
    await eventually(lambda: queue.queue.stats().leased == 1)
    second = await group.add_prefill()

    group.workers.remove(first)
    await first.stop()
    holders, completed = await running
    await release(group, completed.handoff)

    assert holders == [first.identity.worker_id, second.identity.worker_id]
    await group.wait_idle()


async def test_worker_whose_engine_crashes_gives_its_task_to_another(group: WorkerGroup) -> None:
    queue = await group.add_queue(QueueLimits(backoff_base_s=0.05))
    engine = CrashingEngine(held=True)
    first = await group.add_prefill(engine)
    running = asyncio.ensure_future(outcome(submit(group, "r")))
    await eventually(lambda: queue.queue.stats().leased == 1)
    second = await group.add_prefill()

    engine.held = False
    holders, completed = await running
    await release(group, completed.handoff)

    assert holders == [first.identity.worker_id, second.identity.worker_id]
    group.workers.remove(first)
    await first.stop()
    await group.wait_idle()


async def test_queue_that_comes_back_is_found_again(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    worker = await group.add_prefill()
    await queue.stop()

    await group.add_queue()
    async with asyncio.timeout(GENEROUS_S):
        await worker.wait_ready()
    _, completed = await outcome(submit(group, "r"))
    await release(group, completed.handoff)

    assert completed.computed_tokens == 16
    await group.wait_idle()


async def test_queue_that_comes_back_may_lease_what_still_runs_for_the_lost_one(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    engine = HeldSimulatedEngine(held=True)
    worker = await group.add_prefill(engine, waits=replace(WAITS, connect_s=0.5))
    lost = submit(group, "r")
    await group.wait_until(worker, lambda info: info.requests == 1)
    await queue.stop()
    with pytest.raises(grpc.aio.AioRpcError):
        await outcome(lost)

    renewed = await group.add_queue()
    running = asyncio.ensure_future(outcome(submit(group, "r")))
    await eventually(lambda: renewed.queue.stats().leased == 1)
    engine.held = False
    _, completed = await running
    await release(group, completed.handoff)

    assert len(completed.handoff.block_hashes) == 4
    await group.wait_idle()


async def test_drain_finishes_what_runs_and_counts_what_it_could_not(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    engine = HeldSimulatedEngine(held=True)
    worker = await group.add_prefill(engine)
    running = asyncio.ensure_future(outcome(submit(group, "r")))
    await eventually(lambda: queue.queue.stats().leased == 1)

    drained = await group.control(worker).Drain(
        worker_control_pb2.DrainRequest(timeout=duration(0.2)), timeout=GENEROUS_S
    )
    other = await group.add_prefill()
    holders, completed = await running
    await release(group, completed.handoff)

    assert (drained.finished, drained.cancelled) == (0, 1)
    assert holders == [worker.identity.worker_id, other.identity.worker_id]
    engine.held = False
    await group.wait_idle()


async def test_an_undrained_worker_leases_at_once_beside_what_still_runs(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    engine = HeldSimulatedEngine(held=True)
    worker = await group.add_prefill(engine)
    before = asyncio.ensure_future(outcome(submit(group, "before")))
    await group.wait_until(worker, lambda info: info.requests == 1)
    for _ in range(2):
        drain = group.control(worker).Drain(worker_control_pb2.DrainRequest(timeout=duration(60)), timeout=GENEROUS_S)
        await group.wait_until(worker, lambda info: info.draining)
        await group.control(worker).Undrain(worker_control_pb2.UndrainRequest(), timeout=GENEROUS_S)
        with pytest.raises(grpc.aio.AioRpcError):
            await drain

    after = asyncio.ensure_future(outcome(submit(group, "after", token_ids=generation_pb2.TokenIds(token_ids=[7] * 6))))
    await eventually(lambda: queue.queue.stats().leased == 2)
    engine.held = False
    results = [await before, await after]
    for _, completed in results:
        await release(group, completed.handoff)

    assert [holders for holders, _ in results] == [[worker.identity.worker_id]] * 2, "nothing was leased twice"
    await group.wait_idle()


async def test_log_lines_of_tasks_after_an_undrain_are_not_those_of_its_call(group: WorkerGroup) -> None:
    await group.add_queue()
    worker = await group.add_prefill()
    await group.control(worker).Drain(worker_control_pb2.DrainRequest(), timeout=GENEROUS_S)

    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        await group.control(worker).Undrain(worker_control_pb2.UndrainRequest(), timeout=GENEROUS_S)
        _, completed = await outcome(submit(group, "r"))
    await release(group, completed.handoff)

    lines = {line["event"]: line for line in logs}
    assert lines["worker.undrained"]["method"].endswith("/Undrain")
    assert "method" not in lines["prefill.leased"]
    assert "peer" not in lines["prefill.leased"]
    await group.wait_idle()
