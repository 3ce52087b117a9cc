"""Pins that a worker holds for others: each ends once, by Release or by time; and the direct mode that lends them."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest

from kvmesh.core.errors import Reason
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.runtime.worker import Worker
from kvmesh.services.channels import Channels
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.handoff_fetch import HandoffFetch
from kvmesh.services.handoff_source import HandoffSource
from kvmesh.services.identity import WorkerIdentity
from kvmesh.services.kv_transfer import LentPins
from kvmesh.services.prefill_compute import PrefillCompute
from kvmesh.services.prefix_fetch import PrefixFetch
from kvmesh.services.worker_transports import WorkerTransports
from kvmesh.testing.worker_group import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    GENEROUS_S,
    WAITS,
    HeldSimulatedEngine,
    WorkerGroup,
)
from kvmesh.transports.memory import MemoryNetwork, MemoryTransport
from kvmesh.v1 import generation_pb2, kv_transfer_pb2, prefill_queue_pb2, prefill_worker_pb2, worker_control_pb2
from kvmesh.wire.error_catalog import from_rpc_error

BLOCKS = 4


def prefill_task(name: str = "direct", **fields: Any) -> prefill_queue_pb2.PrefillTask:
    fields.setdefault("token_ids", generation_pb2.TokenIds(token_ids=range(18)))
    return prefill_queue_pb2.PrefillTask(request_id=name, attempt=1, **fields)


async def prefill(
    group: WorkerGroup, worker: Worker, task: prefill_queue_pb2.PrefillTask | None = None
) -> tuple[int, generation_pb2.KvHandoff]:
    """Return the computed tokens and the handoff."""
    call = group.direct(worker).Generate(
        prefill_worker_pb2.PrefillWorkerGenerateRequest(task=task or prefill_task()), timeout=GENEROUS_S
    )
    *_, progress, last = [response async for response in call]
    return progress.progress.computed_tokens, last.handoff


async def release(group: WorkerGroup, worker: Worker, handoff: generation_pb2.KvHandoff, **changes: Any) -> None:
    fields: dict[str, Any] = {"worker_id": handoff.worker_id, "epoch": handoff.epoch, "pin_id": handoff.pin_id}
    fields |= changes
    await group.pins(worker).Release(kv_transfer_pb2.KvTransferReleaseRequest(**fields), timeout=GENEROUS_S)


async def refusal(group: WorkerGroup, worker: Worker, handoff: generation_pb2.KvHandoff, **changes: Any) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await release(group, worker, handoff, **changes)
    return from_rpc_error(caught.value).reason


async def test_handoff_names_the_blocks_and_their_holder(group: WorkerGroup) -> None:
    worker = await group.add_prefill()

    computed, handoff = await prefill(group, worker)

    assert computed == BLOCKS * BLOCK_SIZE, "only full blocks are computed"
    assert (handoff.worker_id, handoff.epoch) == (worker.identity.worker_id, worker.identity.epoch)
    assert handoff.address == worker.identity.address
    assert handoff.transport == group.network.reach
    assert (handoff.first_block, len(handoff.block_hashes)) == (0, BLOCKS)
    assert len(handoff.blocks.source_block_ids) == BLOCKS
    assert handoff.bytes_total == BLOCKS * BLOCK_BYTES
    assert handoff.pin_ttl.ToSeconds() == WAITS.pin_s
    assert (await group.info(worker)).pins == 1


async def test_release_gives_the_blocks_back_and_is_answered_once(group: WorkerGroup) -> None:
    worker = await group.add_prefill()
    _, handoff = await prefill(group, worker)

    await release(group, worker, handoff)
    again = await refusal(group, worker, handoff)

    assert again is Reason.PIN_EXPIRED
    await group.wait_idle()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pin_id": 12_345}, Reason.NOT_FOUND),
        ({"worker_id": "node/prefill/9"}, Reason.NOT_FOUND),
        ({"epoch": 1}, Reason.STALE_EPOCH),
    ],
)
async def test_release_of_something_else_changes_nothing(
    group: WorkerGroup, changes: dict[str, Any], reason: Reason
) -> None:
    worker = await group.add_prefill()
    _, handoff = await prefill(group, worker)

    assert await refusal(group, worker, handoff, **changes) is reason
    assert (await group.info(worker)).pins == 1
    await release(group, worker, handoff)


async def test_pin_that_nobody_releases_ends_by_time(group: WorkerGroup) -> None:
    worker = await group.add_prefill(waits=replace(WAITS, pin_s=0.1))
    _, handoff = await prefill(group, worker)

    await group.wait_idle()

    assert await refusal(group, worker, handoff) is Reason.PIN_EXPIRED


async def test_pins_of_one_prompt_are_apart(group: WorkerGroup) -> None:
    worker = await group.add_prefill()
    _, first = await prefill(group, worker)
    computed, second = await prefill(group, worker)

    await release(group, worker, first)
    after_one = await group.info(worker)
    await release(group, worker, second)

    assert first.pin_id != second.pin_id
    assert computed == 0, "all of it was cached"
    assert (after_one.pins, after_one.used_blocks) == (1, BLOCKS)
    await group.wait_idle()


async def test_only_what_is_asked_for_is_handed_over(group: WorkerGroup) -> None:
    worker = await group.add_prefill()

    _, handoff = await prefill(group, worker, prefill_task(first_block=3))

    assert (handoff.first_block, len(handoff.block_hashes), handoff.bytes_total) == (3, 1, BLOCK_BYTES)
    await release(group, worker, handoff)


async def test_prompt_without_a_full_block_has_nothing_to_hand_over(group: WorkerGroup) -> None:
    worker = await group.add_prefill()

    computed, handoff = await prefill(
        group, worker, prefill_task(token_ids=generation_pb2.TokenIds(token_ids=range(4)))
    )

    assert computed == 0
    assert handoff.WhichOneof("content") is None
    await group.wait_idle()


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (prefill_task(layout=generation_pb2.KvLayout(dtype="float16")), Reason.LAYOUT_MISMATCH),
        (prefill_task(token_ids=generation_pb2.TokenIds()), Reason.EMPTY_PROMPT),
        (prefill_task(first_block=5), Reason.PREFILL_FAILED),
    ],
)
async def test_task_that_cannot_be_done_leaves_nothing_behind(
    group: WorkerGroup, task: prefill_queue_pb2.PrefillTask, reason: Reason
) -> None:
    worker = await group.add_prefill()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await prefill(group, worker, task)

    assert from_rpc_error(caught.value).reason is reason
    await group.wait_idle()


async def test_caller_that_leaves_while_it_is_computed_leaves_nothing_behind(group: WorkerGroup) -> None:
    engine = HeldSimulatedEngine(held=True)
    worker = await group.add_prefill(engine)
    call = group.direct(worker).Generate(
        prefill_worker_pb2.PrefillWorkerGenerateRequest(task=prefill_task()), timeout=GENEROUS_S
    )
    await call.initial_metadata()

    call.cancel()
    engine.held = False

    await group.wait_idle()


async def test_two_callers_may_ask_for_one_request_at_once(group: WorkerGroup) -> None:
    engine = HeldSimulatedEngine(held=True)
    worker = await group.add_prefill(engine)
    calls = [
        group.direct(worker).Generate(
            prefill_worker_pb2.PrefillWorkerGenerateRequest(task=prefill_task("same")), timeout=GENEROUS_S
        )
        for _ in range(2)
    ]
    for call in calls:
        await call.initial_metadata()

    engine.held = False
    handoffs = [[response async for response in call][-1].handoff for call in calls]
    for handoff in handoffs:
        await release(group, worker, handoff)

    await group.wait_idle()


async def test_draining_worker_takes_no_direct_task(group: WorkerGroup) -> None:
    worker = await group.add_prefill()
    await group.control(worker).Drain(worker_control_pb2.DrainRequest(), timeout=GENEROUS_S)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await prefill(group, worker)

    assert from_rpc_error(caught.value).reason is Reason.DRAINING


async def test_pin_of_a_result_that_arrives_for_a_cancelled_waiter_is_given_back() -> None:
    at_turn: list[Callable[[], object]] = []

    def on_turn(events: object) -> None:
        for act in at_turn:
            act()

    driver = EngineDriver(HeldSimulatedEngine(), on_turn=on_turn, name="test")
    transports = WorkerTransports([MemoryTransport(MemoryNetwork())])
    compute = PrefillCompute(
        driver=driver,
        source=HandoffSource(
            identity=WorkerIdentity(WorkerId("w"), Epoch(1)), driver=driver, transports=transports,
            pins=LentPins(driver, pin_ttl_s=GENEROUS_S),
        ),
        prefixes=PrefixFetch(
            driver=driver,
            fetcher=HandoffFetch(driver=driver, channels=Channels(), transports=transports, waits=WAITS),
        ),
    )  # fmt: skip
    driver.start()
    computing = asyncio.ensure_future(compute.compute(prefill_task()))
    at_turn.append(computing.cancel)  # at the end of the one turn, its output not yet delivered
    await asyncio.wait([computing])
    stats = await driver.call(lambda engine: engine.pool_stats())
    await driver.aclose()

    assert computing.cancelled()
    assert (stats.pins, stats.used_blocks) == (0, 0)
