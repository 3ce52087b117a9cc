"""A task whose submitter has gone, seen from the queue and from the worker that did it: nothing is left behind."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

import pytest

from kvmesh.core.roster import WorkerRole
from kvmesh.runtime.queue_role import QueueRole
from kvmesh.testing.remote_prefills import PROMPT, HandWorker, add_record, handoff_of
from kvmesh.testing.tcp_proxy import TcpProxy
from kvmesh.testing.worker_group import (
    GENEROUS_S,
    WAITS,
    WorkerGroup,
    eventually,
    request,
    worker_group,
)
from kvmesh.v1 import decode_worker_pb2

LONG_PIN_S = 600.0
"""Longer than any test: a pin that ends was given back."""


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group(replace(WAITS, pin_s=LONG_PIN_S)) as group:
        yield group


async def add_far_queue(group: WorkerGroup) -> TcpProxy:
    """Start a queue that decode workers reach through a proxy, and whoever asks it directly does not."""
    queue = await group.add_queue()
    proxy = TcpProxy(int(queue.address.rsplit(":", 1)[1]))
    await proxy.start()
    await add_record(group, "node/queue/-", WorkerRole.QUEUE, proxy.address)  # listed before the queue's own
    return proxy


async def test_submitter_that_is_cancelled_before_it_hears_of_its_handoff_gives_it_back(group: WorkerGroup) -> None:
    holder = await group.add_prefill(namespace="aside")
    proxy = await add_far_queue(group)
    hand = await HandWorker.attach(group)
    decode = await group.add_decode()
    handoff = await handoff_of(group, holder)
    call = group.decode(decode).Generate(
        decode_worker_pb2.DecodeWorkerGenerateRequest(request=request("r", tokens=PROMPT)), timeout=GENEROUS_S
    )
    leased = await hand.lease()

    proxy.stall()
    await hand.complete(leased, handoff)
    call.cancel()
    await group.wait_until(decode, lambda info: info.requests == 0)
    pins_while_stalled = (await group.info(holder)).pins
    proxy.restore()

    assert pins_while_stalled == 1
    await group.wait_idle()
    hand.leave()
    await proxy.aclose()


async def test_wait_that_ends_while_the_queue_is_out_of_reach_leaves_no_pin(group: WorkerGroup) -> None:
    holder = await group.add_prefill(namespace="aside")
    proxy = await add_far_queue(group)
    hand = await HandWorker.attach(group)
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=0.5, first_token_s=1.0))
    handoff = await handoff_of(group, holder)
    running = asyncio.ensure_future(group.generate(decode, request("r", tokens=PROMPT)))
    leased = await hand.lease()

    proxy.stall()
    await hand.complete(leased, handoff)
    answer = await running
    proxy.restore()

    assert [(decision.remote, decision.reason) for decision in answer.decisions] == [
        (True, "remote"), (False, "fallback_prefill_failed"),
    ]  # fmt: skip
    await group.wait_idle()
    hand.leave()
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
