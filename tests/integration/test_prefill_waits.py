"""Every wait of a remote prefill ends: with a typed outcome, counted, and with nothing held."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import grpc
import pytest

from kvmesh import telemetry
from kvmesh.core.errors import Reason
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.roster import WorkerRole
from kvmesh.testing.remote_prefills import HAND, HandWorker, add_record, handoff_of, silent_server, waits_ended
from kvmesh.testing.tcp_proxy import TcpProxy
from kvmesh.testing.worker_group import (
    GENEROUS_S,
    WAITS,
    Answer,
    HeldSimulatedEngine,
    HeldTransport,
    WorkerGroup,
    eventually,
    request,
)
from kvmesh.v1 import prefill_queue_pb2
from kvmesh.wire.error_catalog import from_rpc_error


@contextmanager
def ends(wait: str) -> Iterator[None]:
    """Expect a wait to end within the block."""
    before = waits_ended(wait)
    yield
    assert waits_ended(wait) > before, f"waits.{wait} was not counted"


def fallback(answer: Answer) -> str:
    """Return why a prefill that was sent away was done locally after all."""
    first, second = answer.decisions
    assert (first.remote, second.remote) == (True, False)
    assert answer.finished is not None
    return second.reason


async def test_task_that_nobody_leases(group: WorkerGroup) -> None:
    await group.add_queue()
    hand = await HandWorker.attach(group)
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=0.2, first_token_s=600.0))

    with ends("prefill_s"):
        answer = await group.generate(decode, request("r"))

    assert fallback(answer) == "fallback_prefill_failed"
    await group.wait_idle()
    hand.leave()


async def test_task_that_is_leased_and_not_computed(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill(HeldSimulatedEngine(held=True))
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=0.2, first_token_s=1.0))

    with ends("prefill_s"):
        answer = await group.generate(decode, request("r"))

    assert fallback(answer) == "fallback_prefill_failed"
    await group.wait_idle()


async def test_queue_that_takes_the_connection_and_says_nothing(group: WorkerGroup) -> None:
    with silent_server() as address:
        await add_record(group, "node/queue/silent", WorkerRole.QUEUE, address)
        await add_record(group, HAND, WorkerRole.PREFILL)
        decode = await group.add_decode(waits=replace(WAITS, prefill_s=0.3, first_token_s=600.0, connect_s=0.3))

        with ends("prefill_s"):
            answer = await group.generate(decode, request("r"))

        assert fallback(answer) == "fallback_prefill_failed"
        await group.wait_idle()


async def test_prefill_worker_that_does_not_come_where_one_is_required(group: WorkerGroup) -> None:
    await group.add_queue()
    decode = await group.add_decode(required=True, waits=replace(WAITS, prefill_s=0.2))

    with ends("prefill_s"), pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.generate(decode, request("r"))

    assert from_rpc_error(caught.value).reason is Reason.PREFILL_FAILED
    await group.wait_idle()


async def test_blocks_that_do_not_arrive(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill()
    decode = await group.add_decode(transport=HeldTransport(group.network), waits=replace(WAITS, kv_transfer_s=0.1))

    with ends("kv_transfer_s"):
        answer = await group.generate(decode, request("r"))

    assert fallback(answer) == "fallback_kv_transfer_failed"
    await group.wait_idle()


async def test_pin_that_nobody_releases(group: WorkerGroup) -> None:
    prefill = await group.add_prefill(waits=replace(WAITS, pin_s=0.1))

    with ends("pin_s"):
        assert (await handoff_of(group, prefill)).pin_id
        await group.wait_until(prefill, lambda info: info.pins == 0)


async def test_holder_that_does_not_say_that_its_blocks_held_still(group: WorkerGroup) -> None:
    holder = await group.add_prefill(namespace="aside", waits=replace(WAITS, pin_s=2.0))
    await group.add_queue()
    hand = await HandWorker.attach(group)
    decode = await group.add_decode(waits=replace(WAITS, connect_s=0.3))
    handoff = await handoff_of(group, holder)

    with silent_server() as handoff.address, ends("connect_s"):
        running = asyncio.ensure_future(group.generate(decode, request("r")))
        leased = await hand.lease()
        await hand.complete(leased, handoff)
        answer = await running

    assert fallback(answer) == "fallback_kv_transfer_failed"
    assert answer.usage.kv_bytes_moved == 0
    hand.leave()
    await group.wait_idle()


async def test_queue_that_does_not_answer_a_prefill_worker_that_attaches(group: WorkerGroup) -> None:
    with silent_server() as address:
        await add_record(group, "node/queue/silent", WorkerRole.QUEUE, address)

        with ends("connect_s"):
            before = waits_ended("connect_s")
            await group.add_prefill(waits=replace(WAITS, connect_s=0.2))
            await eventually(lambda: waits_ended("connect_s") > before)


async def test_queue_that_does_not_take_a_result(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    proxy = TcpProxy(int(queue.address.rsplit(":", 1)[1]))
    await proxy.start()
    await add_record(group, "node/queue/far", WorkerRole.QUEUE, proxy.address)  # older, and so the active one
    engine = HeldSimulatedEngine(held=True)
    prefill = await group.add_prefill(engine, waits=replace(WAITS, connect_s=0.3))
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=0.5, first_token_s=4.0))
    running = asyncio.ensure_future(group.generate(decode, request("r")))
    await eventually(lambda: queue.queue.stats().leased == 1)
    await group.wait_until(prefill, lambda info: info.requests == 1)

    with ends("connect_s"):
        before = waits_ended("connect_s")
        proxy.stall()
        engine.held = False
        await eventually(lambda: waits_ended("connect_s") > before)
    await group.wait_until(prefill, lambda info: info.pins == 0)
    proxy.restore()
    answer = await running

    assert answer.finished is not None
    await group.wait_idle()
    await proxy.aclose()


async def test_lease_that_is_not_extended_and_a_task_that_has_no_attempt_left(group: WorkerGroup) -> None:
    await group.add_queue(QueueLimits(lease_ttl_s=0.2, max_attempts=1))
    hand = await HandWorker.attach(group)
    decode = await group.add_decode()
    lost = float(telemetry.QUEUE_LEASES_LOST._value.get())
    dead = float(telemetry.QUEUE_TASKS.labels(outcome="dead")._value.get())

    running = asyncio.ensure_future(group.generate(decode, request("r")))
    leased = await hand.lease()
    answer = await running
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.queue_stub().Extend(
            prefill_queue_pb2.ExtendRequest(
                key=prefill_queue_pb2.TaskKey(request_id="r", attempt=1), lease_id=leased.lease_id
            ),
            timeout=GENEROUS_S,
        )

    assert fallback(answer) == "fallback_prefill_failed"
    assert from_rpc_error(caught.value).reason is Reason.LEASE_LOST
    assert float(telemetry.QUEUE_LEASES_LOST._value.get()) == lost + 1
    assert float(telemetry.QUEUE_TASKS.labels(outcome="dead")._value.get()) == dead + 1
    hand.leave()
    await group.wait_idle()


async def test_drain_of_a_worker_whose_lent_blocks_nobody_fetches(group: WorkerGroup) -> None:
    prefill = await group.add_prefill(waits=replace(WAITS, kv_transfer_s=0.2))
    assert (await handoff_of(group, prefill)).pin_id

    with ends("kv_transfer_s"):
        assert await prefill.drain(GENEROUS_S) == (0, 0)


async def test_drain_of_a_worker_whose_task_does_not_end(group: WorkerGroup) -> None:
    await group.add_queue()
    prefill = await group.add_prefill(HeldSimulatedEngine(held=True))
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=0.5, first_token_s=2.0))
    running = asyncio.ensure_future(group.generate(decode, request("r")))
    await group.wait_until(prefill, lambda info: info.requests == 1)

    with ends("drain_s"):
        assert await prefill.drain(0.2) == (0, 1)

    assert fallback(await running) == "fallback_prefill_failed"
    await group.wait_idle()
