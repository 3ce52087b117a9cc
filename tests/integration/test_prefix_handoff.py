"""A prompt whose prefix decode holds: the prefill worker pulls that and computes the rest, or computes all of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.runtime.worker import Worker
from kvmesh.testing.remote_prefills import decisions, local_answer
from kvmesh.testing.worker_group import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    GENEROUS_S,
    SMALL,
    WAITS,
    HeldSimulatedEngine,
    HeldTransport,
    WorkerGroup,
    request,
    worker_group,
)
from kvmesh.v1 import (
    decode_worker_pb2,
    generation_pb2,
    kv_transfer_pb2,
    prefill_queue_pb2,
    prefill_worker_pb2,
    worker_events_pb2,
)

HEAD = tuple(range(18))
PROMPT = (*HEAD, *range(100, 108))
PREFIX_BLOCKS = 4
"""Full blocks of HEAD: what decode holds."""
BLOCKS = 6
"""Full blocks of PROMPT that may be cached."""
HASHES = sequence_hashes(local_block_hashes(np.array(PROMPT, dtype=np.uint32), BLOCK_SIZE))[:BLOCKS]
LONG_PIN_S = 600.0
"""Longer than any test: a pin that ends was given back."""


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group(replace(WAITS, pin_s=LONG_PIN_S)) as group:
        await group.add_queue()
        yield group


async def add_decode_with_head(group: WorkerGroup, **options: Any) -> Worker:
    """Start a decode worker and have it compute HEAD itself: there is no prefill worker yet."""
    decode = await group.add_decode(**options)
    answer = await group.generate(decode, request("head", tokens=HEAD))
    assert [decision.remote for decision in answer.decisions] == [False]
    return decode


@dataclass(frozen=True, slots=True)
class Computed:
    """What a prefill worker did for a prompt, in tokens."""

    computed: int
    cached: int
    prefix: int


async def computed(group: WorkerGroup, prefill: Worker) -> Computed:
    counters = (await group.info(prefill)).counters
    return Computed(counters["computed_tokens"], counters["cached_tokens"], counters["prefix_tokens"])


async def ask(
    group: WorkerGroup, worker: Worker, tokens: Sequence[int], **fields: Any
) -> tuple[int, generation_pb2.KvHandoff]:
    """Have a prefill worker compute a prompt, asked directly; return the tokens it computed and the handoff."""
    task = prefill_queue_pb2.PrefillTask(
        request_id="direct", attempt=1, token_ids=generation_pb2.TokenIds(token_ids=tokens), **fields
    )
    call = group.direct(worker).Generate(prefill_worker_pb2.PrefillWorkerGenerateRequest(task=task), timeout=GENEROUS_S)
    *_, progress, last = [response async for response in call]
    return progress.progress.computed_tokens, last.handoff


async def release(group: WorkerGroup, worker: Worker, handoff: generation_pb2.KvHandoff) -> None:
    await group.pins(worker).Release(
        kv_transfer_pb2.KvTransferReleaseRequest(
            worker_id=handoff.worker_id, epoch=handoff.epoch, pin_id=handoff.pin_id
        ),
        timeout=GENEROUS_S,
    )


async def test_prefill_worker_pulls_what_decode_holds_and_computes_the_rest(group: WorkerGroup) -> None:
    expected = (await local_answer(PROMPT)).token_ids
    engine = HeldSimulatedEngine()
    decode = await add_decode_with_head(group)
    prefill = await group.add_prefill(engine)

    answer = await group.generate(decode, request("r", tokens=PROMPT))

    assert decisions(answer) == [(True, "remote")]
    assert answer.token_ids == expected
    assert await computed(group, prefill) == Computed(computed=8, cached=0, prefix=16)
    assert (answer.usage.cached_tokens, answer.usage.remote_prefill_tokens) == (16, 8)
    assert answer.usage.kv_bytes_moved == (PREFIX_BLOCKS + BLOCKS - PREFIX_BLOCKS) * BLOCK_BYTES
    assert (await group.info(decode)).counters["kv_bytes_moved"] == BLOCKS * BLOCK_BYTES
    assert engine.cached_blocks(HASHES) == BLOCKS
    assert engine.load().prefix_hit_rate == 0
    await group.wait_idle()


async def test_pulled_prefix_is_told_as_stored_and_found_by_the_next_prompt(group: WorkerGroup) -> None:
    decode = await add_decode_with_head(group)
    prefill = await group.add_prefill()
    watch = group.events(prefill).WatchKvEvents(worker_events_pb2.WatchKvEventsRequest(), timeout=GENEROUS_S)

    await group.generate(decode, request("r", tokens=PROMPT))
    stored: list[int] = []
    async for message in watch:
        stored += [
            block for event in message.events if event.WhichOneof("event") == "stored"
            for block in event.stored.block_hashes
        ]  # fmt: skip
        if len(stored) >= BLOCKS:
            break
    watch.cancel()
    again, handoff = await ask(group, prefill, PROMPT)
    await release(group, prefill, handoff)

    assert tuple(stored) == HASHES
    assert again == 0
    await group.wait_idle()


async def test_prefill_worker_pulls_only_what_it_lacks_of_the_prefix(group: WorkerGroup) -> None:
    decode = await add_decode_with_head(group)
    prefill = await group.add_prefill()
    _, own = await ask(group, prefill, HEAD[: 2 * BLOCK_SIZE + 1])
    await release(group, prefill, own)
    before = await computed(group, prefill)

    answer = await group.generate(decode, request("r", tokens=PROMPT))

    assert before == Computed(computed=8, cached=0, prefix=0)
    assert await computed(group, prefill) == Computed(computed=8 + 8, cached=8, prefix=8)
    assert answer.usage.kv_bytes_moved == (2 + 2) * BLOCK_BYTES
    await group.wait_idle()


async def test_prefix_that_the_prefill_worker_holds_itself_is_not_moved(group: WorkerGroup) -> None:
    decode = await add_decode_with_head(group)
    prefill = await group.add_prefill()
    _, own = await ask(group, prefill, HEAD)
    await release(group, prefill, own)

    answer = await group.generate(decode, request("r", tokens=PROMPT))

    assert await computed(group, prefill) == Computed(computed=16 + 8, cached=16, prefix=0)
    assert answer.usage.kv_bytes_moved == 2 * BLOCK_BYTES
    await group.wait_idle()


def _set_other_hash(prefix: generation_pb2.KvHandoff) -> None:
    prefix.block_hashes[1] ^= 1


def _add_block(prefix: generation_pb2.KvHandoff) -> None:
    """Offer as many blocks as the prompt has, and more than may be cached of it."""
    prefix.block_hashes.extend([1, 2, 3])
    prefix.blocks.source_block_ids.extend([0, 0, 0])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda prefix: setattr(prefix.layout, "dtype", "float16"), id="another layout"),
        pytest.param(lambda prefix: setattr(prefix, "transport", "pigeon"), id="another transport"),
        pytest.param(_set_other_hash, id="another sequence"),
        pytest.param(_add_block, id="too many blocks"),
        pytest.param(lambda prefix: setattr(prefix, "first_block", 1), id="not from the start"),
        pytest.param(lambda prefix: prefix.blocks.source_block_ids.pop(), id="ids that do not pair"),
        pytest.param(lambda prefix: prefix.ClearField("blocks"), id="no blocks at all"),
        pytest.param(lambda prefix: setattr(prefix, "agent_name", "gone@1"), id="source gone"),
        pytest.param(lambda prefix: prefix.blocks.source_block_ids.reverse(), id="other bytes"),
        pytest.param(lambda prefix: setattr(prefix, "epoch", prefix.epoch - 1), id="another incarnation"),
        pytest.param(lambda prefix: setattr(prefix, "pin_id", 999), id="another pin"),
        pytest.param(lambda prefix: setattr(prefix, "address", "127.0.0.1:1"), id="unreachable holder"),
    ],
)
async def test_bad_prefix_is_dropped_and_the_whole_prompt_computed(
    group: WorkerGroup, change: Callable[[generation_pb2.KvHandoff], None]
) -> None:
    holder = await group.add_prefill(waits=replace(WAITS, pin_s=1.0), namespace="aside")
    engine = HeldSimulatedEngine()
    worker = await group.add_prefill(engine)
    _, prefix = await ask(group, holder, HEAD)
    change(prefix)

    tokens, handoff = await ask(group, worker, PROMPT, prefix=prefix)
    await release(group, worker, handoff)

    assert tokens == BLOCKS * BLOCK_SIZE
    assert await computed(group, worker) == Computed(computed=BLOCKS * BLOCK_SIZE, cached=0, prefix=0)
    assert engine.cached_blocks(HASHES) == BLOCKS
    await group.wait_idle()


async def test_prefix_whose_pin_ended_during_the_pull_is_dropped(group: WorkerGroup) -> None:
    expected = (await local_answer(PROMPT)).token_ids
    decode = await add_decode_with_head(group, waits=replace(WAITS, pin_s=0.1))
    transport = HeldTransport(group.network)
    prefill = await group.add_prefill(transport=transport)

    running = asyncio.ensure_future(group.generate(decode, request("r", tokens=PROMPT)))
    await transport.reached.wait()
    await group.wait_until(decode, lambda info: info.pins == 1)  # its own, and no longer the one it lent
    transport.go.set()
    answer = await running

    assert decisions(answer) == [(True, "remote")]
    assert answer.token_ids == expected
    assert await computed(group, prefill) == Computed(computed=24, cached=0, prefix=0)
    assert answer.usage.kv_bytes_moved == 2 * BLOCK_BYTES
    await group.wait_idle()


async def test_prefix_that_takes_too_long_to_move_is_dropped(group: WorkerGroup) -> None:
    decode = await add_decode_with_head(group)
    prefill = await group.add_prefill(
        transport=HeldTransport(group.network), waits=replace(WAITS, kv_transfer_s=0.1, pin_s=LONG_PIN_S)
    )

    answer = await group.generate(decode, request("r", tokens=PROMPT))

    assert decisions(answer) == [(True, "remote")]
    assert await computed(group, prefill) == Computed(computed=24, cached=0, prefix=0)
    await group.wait_idle()


async def test_prefix_that_would_leave_no_room_for_the_rest_is_dropped(group: WorkerGroup) -> None:
    engine = HeldSimulatedEngine(replace(SMALL, total_blocks=8))
    decode = await add_decode_with_head(group)
    prefill = await group.add_prefill(engine)
    _, lent = await ask(group, prefill, range(500, 509))

    answer = await group.generate(decode, request("r", tokens=PROMPT))
    await release(group, prefill, lent)

    assert decisions(answer) == [(True, "remote")]
    assert await computed(group, prefill) == Computed(computed=8 + 24, cached=0, prefix=0)
    await group.wait_idle()


async def test_cancellation_while_the_prefix_moves_leaks_nothing(group: WorkerGroup) -> None:
    decode = await add_decode_with_head(group)
    transport = HeldTransport(group.network)
    await group.add_prefill(transport=transport)
    call = group.decode(decode).Generate(
        decode_worker_pb2.DecodeWorkerGenerateRequest(request=request("r", tokens=PROMPT)), timeout=GENEROUS_S
    )
    await transport.reached.wait()
    pins_while_moving = (await group.info(decode)).pins

    call.cancel()

    assert pins_while_moving == 2
    await group.wait_idle()


async def test_wait_that_ends_while_the_prefix_moves_leaks_nothing(group: WorkerGroup) -> None:
    expected = (await local_answer(PROMPT)).token_ids
    decode = await add_decode_with_head(group, waits=replace(WAITS, prefill_s=0.3, first_token_s=0.6, pin_s=LONG_PIN_S))
    await group.add_prefill(transport=HeldTransport(group.network))

    answer = await group.generate(decode, request("r", tokens=PROMPT))

    assert decisions(answer) == [(True, "remote"), (False, "fallback_prefill_failed")]
    assert answer.token_ids == expected
    assert answer.usage.cached_tokens == 16
    await group.wait_idle()


async def test_decode_worker_that_goes_while_its_prefix_moves_leaks_nothing(group: WorkerGroup) -> None:
    decode = await add_decode_with_head(group, waits=replace(WAITS, drain_s=0.1))
    transport = HeldTransport(group.network)
    prefill = await group.add_prefill(transport=transport)
    running = asyncio.ensure_future(group.generate(decode, request("r", tokens=PROMPT)))
    await transport.reached.wait()

    group.workers.remove(decode)
    await decode.stop()
    transport.go.set()
    (ended,) = await asyncio.gather(running, return_exceptions=True)

    assert isinstance(ended, Exception)
    await group.wait_until(prefill, lambda info: info.requests == 0)
    await group.wait_idle()
