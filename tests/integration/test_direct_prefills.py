"""Remote prefill without a queue: the decode worker chooses a prefill worker, asks it, and turns to the next one."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from kvmesh.core.errors import Reason
from kvmesh.core.roster import WorkerRole
from kvmesh.runtime.worker import Worker
from kvmesh.testing.remote_prefills import (
    BLOCKS,
    HAND,
    PROMPT,
    add_record,
    decisions,
    local_answer,
    prefill_task,
    silent_server,
    waits_ended,
)
from kvmesh.testing.worker_group import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    GENEROUS_S,
    MODEL,
    SMALL,
    WAITS,
    HeldSimulatedEngine,
    HeldTransport,
    WorkerGroup,
    eventually,
    request,
    worker_group,
)
from kvmesh.v1 import decode_worker_pb2, prefill_queue_pb2, prefill_worker_pb2
from kvmesh.wire.error_catalog import from_rpc_error

PINNED_FOR_LONG = replace(WAITS, pin_s=600.0)
"""Longer than any test: a pin that ends was given back."""


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group(PINNED_FOR_LONG) as group:
        yield group


def prompt(number: int) -> tuple[int, ...]:
    """Return one that shares no block with another."""
    return tuple(range(number * 20, number * 20 + 18))


async def tasks_done(group: WorkerGroup, worker: Worker) -> int:
    return (await group.info(worker)).counters["tasks"]


async def wait_known(group: WorkerGroup, decode: Worker, count: int) -> None:
    """Wait until a decode worker has heard of so many prefill workers."""
    await eventually(lambda: decode._parts.peers.prefill_workers(MODEL) == count)


async def test_blocks_move_without_a_queue_and_the_answer_is_the_local_one(group: WorkerGroup) -> None:
    prefill = await group.add_prefill()
    decode = await group.add_decode(direct=True)
    await wait_known(group, decode, 1)
    expected = await local_answer()

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote_direct")]
    assert answer.token_ids == expected.token_ids
    assert (answer.usage.remote_prefill_tokens, answer.usage.kv_bytes_moved) == (
        BLOCKS * BLOCK_SIZE, BLOCKS * BLOCK_BYTES,
    )  # fmt: skip
    await group.wait_idle()
    assert await tasks_done(group, prefill) == 1


async def test_prompts_go_to_the_worker_that_computed_their_prefix(group: WorkerGroup) -> None:
    workers = [await group.add_prefill() for _ in range(3)]
    first, second = await group.add_decode(direct=True), await group.add_decode(direct=True)
    await wait_known(group, first, 3)
    await group.generate(first, request("first"))
    before = [await tasks_done(group, worker) for worker in workers]
    group.workers.remove(second)
    await second.stop()

    for number in range(3):
        longer = (*PROMPT[:16], *prompt(number + 5))
        await group.generate(first, request(f"longer-{number}", tokens=longer))

    after = [await tasks_done(group, worker) for worker in workers]
    assert sorted(before) == [0, 0, 1]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3 * count for count in before]


async def test_a_prompt_goes_to_the_worker_that_has_least_to_do(group: WorkerGroup) -> None:
    engines = [HeldSimulatedEngine(held=True) for _ in range(2)]
    workers = [await group.add_prefill(engine) for engine in engines]
    decode = await group.add_decode(direct=True)
    await wait_known(group, decode, 2)

    running = [
        asyncio.ensure_future(group.generate(decode, request(f"r{number}", tokens=prompt(number))))
        for number in range(4)
    ]
    for worker in workers:
        await group.wait_until(worker, lambda info: info.requests == 2)
    for engine in engines:
        engine.held = False
    answers = await asyncio.gather(*running)

    assert [decisions(answer) for answer in answers] == [[(True, "remote_direct")]] * 4
    await group.wait_idle()


async def test_a_worker_that_is_full_refuses_and_the_next_is_asked(group: WorkerGroup) -> None:
    full, free = HeldSimulatedEngine(held=True), HeldSimulatedEngine()
    busy = await group.add_prefill(full, max_direct_tasks=1)
    others = group.direct(busy).Generate(direct_request("others"), timeout=GENEROUS_S)
    await others.read()
    decode = await group.add_decode(direct=True)
    await wait_known(group, decode, 1)

    alone = await group.generate(decode, request("alone"))
    await group.add_prefill(free)
    await wait_known(group, decode, 2)
    together = [await group.generate(decode, request(f"r{n}", tokens=prompt(n + 1))) for n in range(3)]
    others.cancel()

    assert decisions(alone) == [(True, "remote_direct"), (False, "fallback_overloaded")]
    assert [decisions(answer) for answer in together] == [[(True, "remote_direct")]] * 3
    await group.wait_idle()


async def test_required_direct_prefill_that_is_refused_fails_the_request(group: WorkerGroup) -> None:
    busy = await group.add_prefill(HeldSimulatedEngine(held=True), max_direct_tasks=1)
    others = group.direct(busy).Generate(direct_request("others"), timeout=GENEROUS_S)
    await others.read()
    decode = await group.add_decode(direct=True, required=True)
    await wait_known(group, decode, 1)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.generate(decode, request("r"))
    others.cancel()

    assert from_rpc_error(caught.value).reason is Reason.PREFILL_FAILED
    await group.wait_idle()


async def test_a_worker_that_is_gone_leaves_the_prefill_to_the_next(group: WorkerGroup) -> None:
    await add_record(group, HAND, WorkerRole.PREFILL)
    decode = await group.add_decode(direct=True)
    await wait_known(group, decode, 1)

    alone = await group.generate(decode, request("alone"))
    await group.add_prefill()
    await wait_known(group, decode, 2)
    together = [await group.generate(decode, request(f"r{n}", tokens=prompt(n + 1))) for n in range(3)]

    assert decisions(alone) == [(True, "remote_direct"), (False, "fallback_worker_lost")]
    assert [decisions(answer) for answer in together] == [[(True, "remote_direct")]] * 3
    await group.wait_idle()


async def test_a_worker_that_says_nothing_is_left_within_the_wait_to_connect(group: WorkerGroup) -> None:
    with silent_server() as address:
        await add_record(group, HAND, WorkerRole.PREFILL, address)
        decode = await group.add_decode(direct=True, waits=replace(PINNED_FOR_LONG, connect_s=0.2))
        await wait_known(group, decode, 1)
        before = waits_ended("connect_s")

        answer = await group.generate(decode, request("r"))

        assert decisions(answer) == [(True, "remote_direct"), (False, "fallback_worker_lost")]
        assert waits_ended("connect_s") > before
        await group.wait_idle()


async def test_a_prefill_that_takes_too_long_is_given_up(group: WorkerGroup) -> None:
    slow = await group.add_prefill(HeldSimulatedEngine(held=True))
    decode = await group.add_decode(direct=True, waits=replace(PINNED_FOR_LONG, prefill_s=0.2, first_token_s=1.0))
    await wait_known(group, decode, 1)
    before = waits_ended("prefill_s")

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote_direct"), (False, "fallback_prefill_failed")]
    assert waits_ended("prefill_s") == before + 1
    await group.wait_idle()
    assert await tasks_done(group, slow) == 0


async def test_a_worker_of_another_layout_is_refused_by_name(group: WorkerGroup) -> None:
    await group.add_prefill(HeldSimulatedEngine(replace(SMALL, block_bytes=128)))
    decode = await group.add_decode(direct=True)
    await wait_known(group, decode, 1)

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote_direct"), (False, "fallback_layout_mismatch")]
    await group.wait_idle()


@pytest.mark.parametrize("point", ["computing", "pulling"])
async def test_cancellation_leaks_nothing(group: WorkerGroup, point: str) -> None:
    transport = HeldTransport(group.network)
    engine = HeldSimulatedEngine(held=point == "computing")
    prefill = await group.add_prefill(engine)
    decode = await group.add_decode(direct=True, transport=transport)
    await wait_known(group, decode, 1)
    call = group.decode(decode).Generate(
        decode_worker_pb2.DecodeWorkerGenerateRequest(request=request("r")), timeout=GENEROUS_S
    )
    if point == "computing":
        await group.wait_until(prefill, lambda info: info.requests == 1)
    else:
        await transport.reached.wait()

    call.cancel()

    await group.wait_idle()


async def test_storm_of_cancellations_leaves_no_pin(group: WorkerGroup) -> None:
    slow = replace(SMALL, speedup=1.0, step_base_s=0.002)
    await group.add_prefill(HeldSimulatedEngine(slow))
    decode = await group.add_decode(HeldSimulatedEngine(slow), direct=True)
    await wait_known(group, decode, 1)

    async def cancelled_after(number: int) -> None:
        call = group.decode(decode).Generate(
            decode_worker_pb2.DecodeWorkerGenerateRequest(
                request=request(f"r{number}", tokens=prompt(number), max_tokens=20)
            ),
            timeout=GENEROUS_S,
        )
        for _ in range(number % 5):
            if await call.read() is grpc.aio.EOF:
                break
        call.cancel()

    await asyncio.gather(*(cancelled_after(number) for number in range(40)))

    await group.wait_idle()
    assert decisions(await group.generate(decode, request("probe", tokens=prompt(45)))) == [(True, "remote_direct")]
    await group.wait_idle()


def direct_request(request_id: str) -> prefill_worker_pb2.PrefillWorkerGenerateRequest:
    return prefill_worker_pb2.PrefillWorkerGenerateRequest(task=prefill_task(request_id))


async def cancel(group: WorkerGroup, worker: Worker, request_id: str) -> None:
    await group.direct(worker).Cancel(
        prefill_worker_pb2.PrefillWorkerCancelRequest(key=prefill_queue_pb2.TaskKey(request_id=request_id, attempt=1)),
        timeout=GENEROUS_S,
    )


async def test_cancel_frees_what_was_handed_over_and_may_be_repeated(group: WorkerGroup) -> None:
    prefill = await group.add_prefill()
    responses = [one async for one in group.direct(prefill).Generate(direct_request("d"), timeout=GENEROUS_S)]
    pins_before = (await group.info(prefill)).pins

    await cancel(group, prefill, "d")
    await cancel(group, prefill, "d")
    await cancel(group, prefill, "never heard of")

    assert [one.WhichOneof("event") for one in responses] == ["progress", "progress", "handoff"]
    assert pins_before == 1
    await group.wait_idle()


async def test_cancel_of_a_task_that_runs_means_that_its_result_is_nobodys(group: WorkerGroup) -> None:
    engine = HeldSimulatedEngine(held=True)
    prefill = await group.add_prefill(engine)
    call = group.direct(prefill).Generate(direct_request("d"), timeout=GENEROUS_S)
    await call.read()

    await cancel(group, prefill, "d")
    engine.held = False
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert caught.value.code() is grpc.StatusCode.CANCELLED
    await group.wait_idle()


async def test_drained_worker_finishes_direct_tasks_and_takes_no_more(group: WorkerGroup) -> None:
    engine = HeldSimulatedEngine(held=True)
    prefill = await group.add_prefill(engine)
    heard = aiter(group.direct(prefill).Generate(direct_request("d"), timeout=GENEROUS_S))
    await anext(heard)

    draining = asyncio.ensure_future(prefill.drain(GENEROUS_S))
    await eventually(lambda: prefill._work._servicer.draining)  # type: ignore[attr-defined]  # of a prefill worker
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.direct(prefill).Generate(direct_request("late"), timeout=GENEROUS_S).read()
    engine.held = False
    rest = [one async for one in heard]
    await cancel(group, prefill, "d")

    assert from_rpc_error(caught.value).reason is Reason.DRAINING
    assert rest[-1].WhichOneof("event") == "handoff"
    assert await draining == (1, 0)
