"""A task whose submitter has gone, seen from the queue and from the worker that did it: nothing is left behind."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.runtime.queue_role import QueueRole
from kvmesh.runtime.worker import Worker
from kvmesh.testing.tcp_proxy import TcpProxy
from kvmesh.testing.worker_group import (
    BLOCK_SIZE,
    GENEROUS_S,
    MODEL,
    NAMESPACE,
    WAITS,
    HeldSimulatedEngine,
    WorkerGroup,
    eventually,
    request,
    worker_group,
)
from kvmesh.v1 import decode_worker_pb2, generation_pb2, prefill_queue_pb2, prefill_worker_pb2
from kvmesh.wire.layout import layout_to_wire
from kvmesh.wire.validation import duration

PROMPT = tuple(range(18))
LAYOUT = layout_to_wire(HeldSimulatedEngine().info.layout)  # type: ignore[arg-type]  # it has one
HAND = "node/prefill/hand"
LONG_PIN_S = 600.0
"""Longer than any test: a pin that ends was given back."""


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group(replace(WAITS, pin_s=LONG_PIN_S)) as group:
        yield group


async def add_record(group: WorkerGroup, worker_id: str, role: WorkerRole, address: str) -> None:
    await group.discovery.register(
        WorkerRecord(
            worker_id=WorkerId(worker_id), epoch=Epoch(1), role=role, models=(MODEL,), namespace=NAMESPACE,
            block_size=BLOCK_SIZE, address=address,
        )
    )  # fmt: skip


async def add_far_queue(group: WorkerGroup) -> TcpProxy:
    """Start a queue that decode workers reach through a proxy, and whoever asks it directly does not."""
    queue = await group.add_queue()
    proxy = TcpProxy(int(queue.address.rsplit(":", 1)[1]))
    await proxy.start()
    await add_record(group, "node/queue/-", WorkerRole.QUEUE, proxy.address)  # listed before the queue's own
    return proxy


async def attach(group: WorkerGroup) -> Any:
    """Attach a worker that only this test knows; return its stream, to be kept."""
    attachment = group.queue_stub().Attach(
        prefill_queue_pb2.AttachRequest(
            worker_id=HAND, epoch=1, models=[MODEL], layout=LAYOUT, transports=[group.network.reach]
        ),
        timeout=GENEROUS_S,
    )
    await attachment.read()
    await add_record(group, HAND, WorkerRole.PREFILL, "127.0.0.1:1")
    return attachment


async def lease(group: WorkerGroup) -> prefill_queue_pb2.LeasedTask:
    """Take the first task for the attached worker."""
    leased = await group.queue_stub().Lease(
        prefill_queue_pb2.LeaseRequest(worker_id=HAND, epoch=1, max_tasks=1, wait=duration(10)), timeout=GENEROUS_S
    )
    return leased.tasks[0]


async def complete(group: WorkerGroup, leased: prefill_queue_pb2.LeasedTask, handoff: generation_pb2.KvHandoff) -> None:
    key = prefill_queue_pb2.TaskKey(request_id=leased.task.request_id, attempt=leased.task.attempt)
    result = prefill_queue_pb2.TaskCompleted(handoff=handoff)
    await group.queue_stub().Complete(
        prefill_queue_pb2.CompleteRequest(key=key, lease_id=leased.lease_id, result=result), timeout=GENEROUS_S
    )


async def compute(group: WorkerGroup, holder: Worker) -> generation_pb2.KvHandoff:
    """Have the prompt computed by a worker that the queue does not know."""
    task = prefill_queue_pb2.PrefillTask(
        request_id="direct", attempt=1, token_ids=generation_pb2.TokenIds(token_ids=PROMPT)
    )
    call = group.direct(holder).Generate(prefill_worker_pb2.PrefillWorkerGenerateRequest(task=task), timeout=GENEROUS_S)
    return [response async for response in call][-1].handoff


async def test_submitter_that_is_cancelled_before_it_hears_of_its_handoff_gives_it_back(group: WorkerGroup) -> None:
    holder = await group.add_prefill(namespace="aside")
    proxy = await add_far_queue(group)
    attachment = await attach(group)
    decode = await group.add_decode()
    handoff = await compute(group, holder)
    call = group.decode(decode).Generate(
        decode_worker_pb2.DecodeWorkerGenerateRequest(request=request("r", tokens=PROMPT)), timeout=GENEROUS_S
    )
    leased = await lease(group)

    proxy.stall()
    await complete(group, leased, handoff)
    call.cancel()
    await group.wait_until(decode, lambda info: info.requests == 0)
    pins_while_stalled = (await group.info(holder)).pins
    proxy.restore()

    assert pins_while_stalled == 1
    await group.wait_idle()
    attachment.cancel()
    await proxy.aclose()


async def test_wait_that_ends_while_the_queue_is_out_of_reach_leaves_no_pin(group: WorkerGroup) -> None:
    holder = await group.add_prefill(namespace="aside")
    proxy = await add_far_queue(group)
    attachment = await attach(group)
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=0.5, first_token_s=1.0))
    handoff = await compute(group, holder)
    running = asyncio.ensure_future(group.generate(decode, request("r", tokens=PROMPT)))
    leased = await lease(group)

    proxy.stall()
    await complete(group, leased, handoff)
    answer = await running
    proxy.restore()

    assert [(decision.remote, decision.reason) for decision in answer.decisions] == [
        (True, "remote"), (False, "fallback_prefill_failed"),
    ]  # fmt: skip
    await group.wait_idle()
    attachment.cancel()
    await proxy.aclose()


def is_submitted(queue: QueueRole, number: int) -> bool:
    return queue.queue.stats().submitted > number


async def test_storm_of_cancellations_at_the_moment_of_completion_leaves_no_pin(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    await group.add_prefill()
    decode = await group.add_decode()

    for number in range(30):
        tokens = [number * 20 + offset for offset in range(18)]
        call = group.decode(decode).Generate(
            decode_worker_pb2.DecodeWorkerGenerateRequest(request=request(f"r{number}", tokens=tokens)),
            timeout=GENEROUS_S,
        )
        await eventually(partial(is_submitted, queue, number))
        for _ in range(number):
            await asyncio.sleep(0)
        call.cancel()

    await group.wait_idle()
