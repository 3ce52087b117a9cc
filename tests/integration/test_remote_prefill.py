"""Remote prefill between real workers and a real queue: blocks move, or the request runs locally and nothing leaks."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import grpc
import numpy as np
import pytest

from kvmesh.core.errors import Reason
from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.remote_prefill import RemotePrefillRules
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.testing.remote_prefills import (
    BLOCKS,
    HAND,
    PROMPT,
    HandWorker,
    add_record,
    decisions,
    handoff_of,
    local_answer,
    prefill_task,
)
from kvmesh.testing.worker_group import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    GENEROUS_S,
    NAMESPACE,
    SMALL,
    WAITS,
    HeldSimulatedEngine,
    HeldTransport,
    WorkerGroup,
    eventually,
    request,
)
from kvmesh.v1 import (
    decode_worker_pb2,
    generation_pb2,
    prefill_queue_pb2,
    worker_control_pb2,
    worker_events_pb2,
)
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.validation import duration

HASHES = sequence_hashes(local_block_hashes(np.array(PROMPT, dtype=np.uint32), BLOCK_SIZE))[:BLOCKS]
Change = Callable[[generation_pb2.KvHandoff], None]


async def test_blocks_move_and_the_answer_is_the_local_one(group: WorkerGroup) -> None:
    await group.add_queue()
    engine = HeldSimulatedEngine()
    prefill, decode = await group.add_prefill(), await group.add_decode(engine)
    expected = await local_answer()

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote")]
    assert answer.events == ["accepted", "prefill", "chunk", "finished"]
    assert answer.token_ids == expected.token_ids
    assert (answer.usage.cached_tokens, answer.usage.remote_prefill_tokens) == (0, BLOCKS * BLOCK_SIZE)
    assert answer.usage.kv_bytes_moved == BLOCKS * BLOCK_BYTES
    assert engine.cached_blocks(HASHES) == BLOCKS
    assert engine.load().prefix_hit_rate == 0, "what was moved for the request itself is no cache hit"
    memory = engine.kv_memory()
    assert memory is not None
    words = {int(word) for word in memory.view("<u8").ravel()}
    assert set(HASHES) <= words
    await group.wait_idle()
    assert (await group.info(prefill)).counters["bytes_handed_over"] == BLOCKS * BLOCK_BYTES
    assert (await group.info(decode)).counters["remote_prefills"] == 1


async def test_received_blocks_are_told_to_routers_once_and_together(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill()
    decode = await group.add_decode()
    watch = group.events(decode).WatchKvEvents(worker_events_pb2.WatchKvEventsRequest(), timeout=GENEROUS_S)

    await group.generate(decode, request("r"))
    stored: list[tuple[int, ...]] = []
    async for message in watch:
        stored += [
            tuple(event.stored.block_hashes) for event in message.events if event.WhichOneof("event") == "stored"
        ]
        if sum(map(len, stored)) >= BLOCKS:
            break
    watch.cancel()

    assert stored[0] == HASHES
    assert not set(HASHES) & {block for other in stored[1:] for block in other}


async def test_only_what_decode_lacks_moves(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill()
    decode = await group.add_decode()
    await group.generate(decode, request("first"))
    longer = (*PROMPT[:16], *range(100, 110))

    answer = await group.generate(decode, request("second", tokens=longer))

    assert decisions(answer) == [(True, "remote")]
    assert (answer.usage.cached_tokens, answer.usage.remote_prefill_tokens) == (16, 8)
    assert answer.usage.kv_bytes_moved == 2 * BLOCK_BYTES
    await group.wait_idle()


async def test_prompt_that_is_cached_is_not_sent_away(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill()
    decode = await group.add_decode()
    await group.generate(decode, request("first"))

    answer = await group.generate(decode, request("second"))

    assert decisions(answer) == [(False, "few_uncached_tokens")]
    assert (answer.usage.cached_tokens, answer.usage.kv_bytes_moved) == (BLOCKS * BLOCK_SIZE, 0)


def _set_other_layout(handoff: generation_pb2.KvHandoff) -> None:
    handoff.layout.dtype = "float16"


def _set_other_hash(handoff: generation_pb2.KvHandoff) -> None:
    handoff.block_hashes[1] ^= 1


def _drop_last_block(handoff: generation_pb2.KvHandoff) -> None:
    del handoff.block_hashes[-1]
    del handoff.blocks.source_block_ids[-1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(_set_other_layout, "layout_mismatch", id="another layout"),
        pytest.param(lambda h: setattr(h, "transport", "tcp"), "layout_mismatch", id="another transport"),
        pytest.param(_set_other_hash, "kv_transfer_failed", id="another sequence"),
        pytest.param(_drop_last_block, "kv_transfer_failed", id="too few blocks"),
        pytest.param(lambda h: setattr(h, "first_block", 1), "kv_transfer_failed", id="another first block"),
        pytest.param(lambda h: h.blocks.source_block_ids.pop(), "kv_transfer_failed", id="ids that do not pair"),
        pytest.param(lambda h: h.ClearField("blocks"), "kv_transfer_failed", id="no blocks at all"),
        pytest.param(lambda h: setattr(h, "agent_name", "gone@1"), "kv_transfer_failed", id="source gone"),
        pytest.param(
            lambda h: h.blocks.source_block_ids.__setitem__(0, 10_000), "kv_transfer_failed", id="no such block"
        ),
        pytest.param(lambda h: h.blocks.source_block_ids.reverse(), "kv_transfer_failed", id="other bytes"),
        pytest.param(lambda h: setattr(h, "epoch", h.epoch - 1), "stale_epoch", id="another incarnation"),
        pytest.param(lambda h: setattr(h, "worker_id", "node/x"), "not_found", id="another holder"),
        pytest.param(lambda h: setattr(h, "pin_id", 999), "not_found", id="another pin"),
        pytest.param(lambda h: setattr(h, "address", "127.0.0.1:1"), "worker_lost", id="unreachable holder"),
    ],
)
async def test_bad_handoff_is_dropped_and_the_request_runs_locally(
    group: WorkerGroup, change: Change, reason: str
) -> None:
    # The holder is no party to the queue: it is asked directly, and what it hands over is changed on the way.
    holder = await group.add_prefill(waits=replace(WAITS, pin_s=2.0), namespace="aside")
    await group.add_queue()
    hand = await HandWorker.attach(group)
    decode = await group.add_decode()
    handoff = await handoff_of(group, holder)
    change(handoff)
    expected = await local_answer()

    async def play() -> None:
        leased = await hand.lease()
        await hand.complete(leased, handoff)

    answer, _ = await asyncio.gather(group.generate(decode, request("r")), play())

    assert decisions(answer) == [(True, "remote"), (False, f"fallback_{reason}")]
    assert answer.token_ids == expected.token_ids
    assert (answer.usage.kv_bytes_moved, answer.usage.cached_tokens) == (0, 0)
    await group.wait_idle()


async def test_without_a_queue_the_request_runs_locally(group: WorkerGroup) -> None:
    await add_record(group, HAND, WorkerRole.PREFILL)
    decode = await group.add_decode()

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote"), (False, "fallback_prefill_failed")]
    await group.wait_idle()


async def test_without_a_prefill_worker_no_question_is_asked(group: WorkerGroup) -> None:
    await group.add_queue()
    decode = await group.add_decode()

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(False, "no_prefill_worker")]


async def test_full_queue_makes_the_prefill_local(group: WorkerGroup) -> None:
    queue = await group.add_queue(QueueLimits(max_depth=1))
    await HandWorker.attach(group)
    decode = await group.add_decode()
    wanted = prefill_queue_pb2.SubmitRequest(task=prefill_task("before"))
    before = group.queue_stub().Submit(wanted, timeout=GENEROUS_S)
    await before.read()

    answer = await group.generate(decode, request("r"))
    before.cancel()

    assert decisions(answer) == [(True, "remote"), (False, "fallback_queue_full")]
    await eventually(lambda: queue.queue.stats().depth == 0)
    await group.wait_idle()


async def test_prefill_worker_of_another_layout_is_not_capable(group: WorkerGroup) -> None:
    await group.add_queue()
    other = HeldSimulatedEngine(replace(SMALL, block_bytes=128))
    await group.add_prefill(other)
    decode = await group.add_decode()

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote"), (False, "fallback_no_capable_worker")]
    await group.wait_idle()


async def test_prefill_that_takes_too_long_is_given_up(group: WorkerGroup) -> None:
    await group.add_queue()
    slow = await group.add_prefill(HeldSimulatedEngine(held=True))
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=0.2, first_token_s=1.0))

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote"), (False, "fallback_prefill_failed")]
    await group.wait_idle()
    assert (await group.info(slow)).counters["tasks"] == 0


async def test_prefill_that_is_leased_may_take_longer_than_the_wait_for_a_lease(group: WorkerGroup) -> None:
    await group.add_queue()
    hand = await HandWorker.attach(group)
    holder = await group.add_prefill(namespace="aside")
    handoff = await handoff_of(group, holder)
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=1.0, first_token_s=60.0))
    running = asyncio.ensure_future(group.generate(decode, request("r")))
    leased = await hand.lease()

    await asyncio.sleep(1.5)  # the time it computes
    await hand.complete(leased, handoff)
    answer = await running

    assert decisions(answer) == [(True, "remote")]
    await group.wait_idle()


async def test_prefill_that_nobody_leases_is_given_up_after_the_wait_for_a_lease(group: WorkerGroup) -> None:
    await group.add_queue()
    hand = await HandWorker.attach(group)
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=0.3, first_token_s=10 * GENEROUS_S))

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote"), (False, "fallback_prefill_failed")]
    await group.wait_idle()
    hand.leave()


async def test_remote_prefill_takes_at_most_a_quarter_of_what_remains(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill(HeldSimulatedEngine(held=True))
    decode = await group.add_decode(waits=replace(WAITS, prefill_s=60.0))

    answer = await group.generate(decode, request("r", timeout=duration(4.0)))

    assert decisions(answer) == [(True, "remote"), (False, "fallback_prefill_failed")]
    assert answer.finished is not None


async def test_transfer_that_takes_too_long_is_given_up(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill()
    decode = await group.add_decode(transport=HeldTransport(group.network), waits=replace(WAITS, kv_transfer_s=0.1))

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote"), (False, "fallback_kv_transfer_failed")]
    await group.wait_idle()


async def test_source_that_goes_during_the_pull_makes_the_prefill_local(group: WorkerGroup) -> None:
    await group.add_queue()
    prefill = await group.add_prefill(waits=replace(WAITS, drain_s=0.1))
    transport = HeldTransport(group.network)
    decode = await group.add_decode(transport=transport)

    running = asyncio.ensure_future(group.generate(decode, request("r")))
    await transport.reached.wait()
    group.workers.remove(prefill)
    await prefill.stop()
    transport.go.set()
    answer = await running

    assert decisions(answer) == [(True, "remote"), (False, "fallback_kv_transfer_failed")]
    await group.wait_idle()


async def test_blocks_whose_pin_expired_during_the_pull_are_dropped(group: WorkerGroup) -> None:
    await group.add_queue()
    prefill = await group.add_prefill(waits=replace(WAITS, pin_s=0.1))
    transport = HeldTransport(group.network)
    engine = HeldSimulatedEngine()
    decode = await group.add_decode(engine, transport=transport)

    running = asyncio.ensure_future(group.generate(decode, request("r")))
    await transport.reached.wait()
    await group.wait_until(prefill, lambda info: info.pins == 0)
    engine.held = True
    transport.go.set()
    await group.wait_until(decode, lambda info: info.imports == 0)
    cached_before_decoding = (await group.info(decode)).cached_blocks
    engine.held = False
    answer = await running

    assert decisions(answer) == [(True, "remote"), (False, "fallback_pin_expired")]
    assert cached_before_decoding == 0
    assert answer.usage.kv_bytes_moved == 0
    await group.wait_idle()


async def test_pool_too_full_for_the_blocks_makes_the_prefill_local(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill()
    engine = HeldSimulatedEngine(replace(SMALL, total_blocks=6, speedup=1.0, step_base_s=0.02))
    decode = await group.add_decode(engine, rules=RemotePrefillRules(min_uncached_tokens=10))
    occupant = asyncio.ensure_future(group.generate(decode, request("other", tokens=range(500, 508), max_tokens=12)))
    await group.wait_until(decode, lambda info: info.used_blocks >= 2)

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(True, "remote"), (False, "fallback_overloaded")]
    assert (await occupant).finished is not None
    await group.wait_idle()


async def test_required_remote_prefill_that_fails_fails_the_request(group: WorkerGroup) -> None:
    await add_record(group, HAND, WorkerRole.PREFILL)
    decode = await group.add_decode(required=True)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.generate(decode, request("r"))

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert from_rpc_error(caught.value).reason is Reason.PREFILL_FAILED
    await group.wait_idle()
    assert (await group.info(decode)).counters["local_prefills"] == 0


async def test_required_remote_prefill_fails_the_request_when_no_prefill_worker_comes(group: WorkerGroup) -> None:
    await group.add_queue()
    decode = await group.add_decode(required=True, waits=replace(WAITS, prefill_s=0.2))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.generate(decode, request("r"))

    assert from_rpc_error(caught.value).reason is Reason.PREFILL_FAILED
    assert "start a prefill worker" in (caught.value.details() or "")
    await group.wait_idle()
    assert (await group.info(decode)).counters["local_prefills"] == 0


async def test_required_remote_prefill_waits_for_a_prefill_worker_to_come(group: WorkerGroup) -> None:
    await group.add_queue()
    decode = await group.add_decode(required=True)

    running = asyncio.ensure_future(group.generate(decode, request("r")))
    await group.wait_until(decode, lambda info: info.requests == 1)
    await group.add_prefill()
    answer = await running

    assert decisions(answer) == [(True, "remote")]
    assert answer.usage.remote_prefill_tokens == BLOCKS * BLOCK_SIZE
    await group.wait_idle()


async def test_required_remote_prefill_leaves_local_what_the_rules_keep_local(group: WorkerGroup) -> None:
    decode = await group.add_decode(required=True, rules=RemotePrefillRules(min_uncached_tokens=100))

    answer = await group.generate(decode, request("r"))

    assert decisions(answer) == [(False, "few_uncached_tokens")]


async def test_deadline_that_passes_during_the_prefill_ends_the_request(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill(HeldSimulatedEngine(held=True))
    transport = HeldTransport(group.network)
    decode = await group.add_decode(HeldSimulatedEngine(held=True), transport=transport)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await group.generate(decode, request("r", timeout=duration(0.3)))

    assert from_rpc_error(caught.value).reason is Reason.DEADLINE
    await group.wait_idle()


@pytest.mark.parametrize("point", ["queued", "computing", "pulling", "decoding"])
async def test_cancellation_leaks_nothing(group: WorkerGroup, point: str) -> None:
    queue = await group.add_queue()
    transport = HeldTransport(group.network)
    prefill_engine, decode_engine = HeldSimulatedEngine(held=point == "computing"), HeldSimulatedEngine()
    if point == "queued":
        await HandWorker.attach(group)
    else:
        await group.add_prefill(prefill_engine)
    decode = await group.add_decode(decode_engine, transport=transport)
    call = group.decode(decode).Generate(
        decode_worker_pb2.DecodeWorkerGenerateRequest(request=request("r")), timeout=GENEROUS_S
    )
    if point == "queued":
        await eventually(lambda: queue.queue.stats().depth == 1)
    elif point == "computing":
        await eventually(lambda: queue.queue.stats().leased == 1)
    else:
        await transport.reached.wait()
    if point == "decoding":
        decode_engine.held = True
        transport.go.set()
        await group.wait_until(decode, lambda info: info.counters["remote_prefills"] == 1)

    call.cancel()

    await group.wait_idle()
    decode_engine.held = prefill_engine.held = False
    transport.go.set()
    if point != "queued":
        assert (await group.generate(decode, request("next"))).finished is not None
        await group.wait_idle()


async def test_storm_of_cancellations_leaves_the_baseline(group: WorkerGroup) -> None:
    await group.add_queue()
    await group.add_prefill(HeldSimulatedEngine(replace(SMALL, speedup=1.0, step_base_s=0.002)))
    decode = await group.add_decode(HeldSimulatedEngine(replace(SMALL, speedup=1.0, step_base_s=0.002)))

    async def cancelled_after(number: int) -> None:
        tokens = [number * 20 + offset for offset in range(18)]
        call = group.decode(decode).Generate(
            decode_worker_pb2.DecodeWorkerGenerateRequest(request=request(f"r{number}", tokens=tokens, max_tokens=20)),
            timeout=GENEROUS_S,
        )
        for _ in range(number % 5):
            if await call.read() is grpc.aio.EOF:
                break
        call.cancel()

    await asyncio.gather(*(cancelled_after(number) for number in range(40)))

    await group.wait_idle()
    assert (await group.generate(decode, request("probe"))).finished is not None
    await group.wait_idle()


async def test_drained_prefill_worker_finishes_what_runs_and_leases_nothing_more(group: WorkerGroup) -> None:
    queue = await group.add_queue()
    engine = HeldSimulatedEngine(held=True)
    prefill = await group.add_prefill(engine)
    decode = await group.add_decode()
    first = asyncio.ensure_future(group.generate(decode, request("first")))
    await eventually(lambda: queue.queue.stats().leased == 1)

    drain = group.control(prefill).Drain(
        worker_control_pb2.DrainRequest(timeout=duration(GENEROUS_S)), timeout=GENEROUS_S
    )
    await group.wait_until(prefill, lambda info: info.draining)
    second = await group.generate(decode, request("second", tokens=range(100, 118)))
    engine.held = False
    drained, first_answer = await drain, await first

    assert decisions(second) == [(False, "no_prefill_worker")]
    assert decisions(first_answer) == [(True, "remote")]
    assert first_answer.usage.remote_prefill_tokens == BLOCKS * BLOCK_SIZE
    assert (drained.finished, drained.cancelled) == (1, 0)
    assert (await group.info(prefill)).counters["tasks"] == 1
    await group.wait_idle()


async def test_worker_that_stops_while_its_blocks_are_fetched_lets_them_be_fetched(group: WorkerGroup) -> None:
    await group.add_queue()
    prefill = await group.add_prefill()
    transport = HeldTransport(group.network)
    decode = await group.add_decode(transport=transport)
    running = asyncio.ensure_future(group.generate(decode, request("r")))
    await transport.reached.wait()

    group.workers.remove(prefill)
    stopping = asyncio.ensure_future(prefill.stop())
    await eventually(lambda: prefill.identity.worker_id not in {r.worker_id for r in _records(group)})
    transport.go.set()
    answer, _ = await asyncio.gather(running, stopping)

    assert decisions(answer) == [(True, "remote")]
    assert answer.usage.kv_bytes_moved == BLOCKS * BLOCK_BYTES
    await group.wait_idle()


def _records(group: WorkerGroup) -> tuple[WorkerRecord, ...]:
    return group.discovery._of(NAMESPACE)
