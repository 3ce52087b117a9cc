"""A real ZMQ publisher of an engine's KV events becomes a worker's event source, whatever is lost on the way."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from kvmesh import telemetry
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.errors import FixRequestError
from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.ids import RouterId, SequenceHash, WorkerRank
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent
from kvmesh.core.policies.policy import build_policy
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.signal import Signal
from kvmesh.services.vllm_source import VllmEventSource, endpoint_of_rank
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.testing.vllm_publisher import VllmPublisher, cleared, packed, removed, stored

WAIT_S = 20.0
CAPTURED_TOKENS = [151644, 872, 198, 9064, 374, 279, 6722, 315, 5616, 30, 151645, 198, 151644, 77091, 198, 151667]
CAPTURED = {
    "type": "BlockStored", "block_hashes": [15760518052499183552], "parent_block_hash": None,
    "token_ids": CAPTURED_TOKENS, "block_size": 16, "lora_id": None, "medium": "GPU", "lora_name": None,
    "extra_keys": [None], "group_idx": 0, "kv_cache_spec_kind": "full_attention",
}  # fmt: skip


class Heard:
    """What a source published, as the set of blocks that a follower would hold."""

    def __init__(self) -> None:
        self.blocks: set[SequenceHash] = set()
        self.clears = 0
        self._changed = Signal()

    def publish(self, events: Sequence[KvEvent]) -> None:
        for event in events:
            match event:
                case BlocksStored():
                    self.blocks.update(event.block_hashes)
                case BlocksRemoved():
                    self.blocks.difference_update(event.block_hashes)
                case CacheCleared():
                    self.blocks.clear()
                    self.clears += 1
        self._changed.fire()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await self._changed.wait()

    async def holds(self, *numbers: int) -> None:
        await self.until(lambda: self.blocks == {block(number) for number in numbers})


class Followed:
    """A publisher, and a source that follows it."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.heard = Heard()
        self._stack = stack

    async def publisher(self, **options: Any) -> VllmPublisher:
        publisher = await VllmPublisher.start(**options)
        self._stack.push_async_callback(publisher.aclose)
        return publisher

    async def source(self, publisher: VllmPublisher, *, replays: bool = True, **options: Any) -> VllmEventSource:
        """Start a source and wait until it hears what is published live."""
        source = VllmEventSource(
            endpoint=publisher.endpoint,
            replay_endpoint=publisher.replay_endpoint if replays else None,
            publish=self.heard.publish,
            block_size=16,
            **{"check_s": 60.0, **options},
        )
        self._stack.push_async_callback(source.aclose)
        source.start()
        async with asyncio.timeout(WAIT_S):
            await publisher.wait_subscribed()
        return source


@pytest.fixture
async def followed() -> AsyncIterator[Followed]:
    async with AsyncExitStack() as stack:
        yield Followed(stack)


def tokens(number: int) -> list[int]:
    """Tokens of the one-block prompt of this number."""
    return list(range(1000 * number, 1000 * number + 16))


def block(number: int) -> SequenceHash:
    return sequence_hashes(local_block_hashes(np.array(tokens(number), dtype=np.uint32), 16))[0]


def one(number: int) -> Any:
    return stored(number, tokens=tokens(number))


async def test_publisher_answers_a_replay_with_what_it_keeps(followed: Followed) -> None:
    publisher = await followed.publisher()
    for number in range(19):
        await publisher.publish(one(number))
    source = await followed.source(publisher)

    async with asyncio.timeout(WAIT_S):
        replies = [reply async for reply in source._replies(10)]

    assert [sequence for sequence, _ in replies] == list(range(10, 19))
    assert replies[0][1] == packed([10.0, [one(10)], 0])


async def test_what_was_published_before_is_learnt_from_the_replay(followed: Followed) -> None:
    publisher = await followed.publisher()
    for number in range(3):
        await publisher.publish(one(number))
    await publisher.publish(removed(1))

    source = await followed.source(publisher)
    await followed.heard.holds(0, 2)

    assert source.position == 3
    assert publisher.replays == [0]


async def test_lost_messages_are_recovered_when_the_next_one_comes(followed: Followed) -> None:
    publisher = await followed.publisher()
    await followed.source(publisher)
    await publisher.publish(one(7))
    await publisher.publish(one(0))
    await followed.heard.holds(0, 7)

    await publisher.publish(one(1), is_lost=True)
    await publisher.publish(removed(0, 7), is_lost=True)
    await publisher.publish(one(2))
    await followed.heard.holds(1, 2)
    await publisher.publish(one(3))
    await followed.heard.holds(1, 2, 3)

    assert publisher.replays == [0, 1]  # from the last one taken in; later messages ask for nothing
    assert followed.heard.clears == 0


async def test_messages_lost_at_the_end_are_found_by_the_check(followed: Followed) -> None:
    publisher = await followed.publisher()
    await publisher.publish(one(0))
    await followed.source(publisher, check_s=0.05)
    await followed.heard.holds(0)

    await publisher.publish(one(1), is_lost=True)

    await followed.heard.holds(0, 1)


async def test_more_lost_than_is_kept_means_learning_anew(followed: Followed) -> None:
    publisher = await followed.publisher(buffer_batches=2)
    await publisher.publish(one(0))
    await followed.source(publisher)
    await followed.heard.holds(0)

    for number in (1, 2, 3):
        await publisher.publish(one(number), is_lost=True)
    await publisher.publish(one(4))
    await followed.heard.holds(3, 4)

    assert followed.heard.clears == 1


async def test_loss_without_replay_forgets_everything(followed: Followed) -> None:
    publisher = await followed.publisher()
    source = await followed.source(publisher, replays=False)
    await publisher.publish(one(0))
    await followed.heard.holds(0)

    await publisher.publish(one(1), is_lost=True)
    await publisher.publish(one(2))
    await followed.heard.holds(2)

    assert (followed.heard.clears, source.position) == (1, 2)


async def test_publisher_that_does_not_answer_is_asked_again_later_for_everything(followed: Followed) -> None:
    unanswered = telemetry.ENGINE_EVENT_REPLAYS.labels(outcome="no_answer")
    before = unanswered._value.get()
    publisher = await followed.publisher()
    await publisher.publish(one(0))
    await followed.source(publisher, replay_timeout_s=0.05, check_s=0.1)
    await followed.heard.holds(0)

    publisher.answers_replays = False
    await publisher.publish(one(1), is_lost=True)
    await publisher.publish(one(2))
    await followed.heard.holds(2)
    publisher.answers_replays = True
    await followed.heard.holds(0, 1, 2)

    assert unanswered._value.get() > before


@pytest.mark.parametrize("replays", [True, False])
async def test_restarted_publisher_begins_anew(followed: Followed, replays: bool) -> None:
    old = await followed.publisher()
    source = await followed.source(old, replays=replays)
    for number in range(3):
        await old.publish(one(number))
    await followed.heard.holds(0, 1, 2)
    await old.aclose()

    new = await followed.publisher(endpoint=old.endpoint, replay_endpoint=old.replay_endpoint)
    async with asyncio.timeout(WAIT_S):
        await new.wait_subscribed()
    await new.publish(one(7))
    await followed.heard.holds(7)
    await new.publish(one(8))
    await followed.heard.holds(7, 8)

    assert source.position == 1


async def test_restart_is_noticed_though_the_new_life_is_further_than_the_old_one(followed: Followed) -> None:
    old = await followed.publisher()
    await followed.source(old)
    await old.publish(one(0))
    await followed.heard.holds(0)
    await old.aclose()

    new = await followed.publisher(endpoint=old.endpoint, replay_endpoint=old.replay_endpoint)
    async with asyncio.timeout(WAIT_S):
        await new.wait_subscribed()
    for number in range(5, 8):
        await new.publish(one(number), is_lost=True)
    await new.publish(one(8))

    await followed.heard.holds(5, 6, 7, 8)


async def test_unreadable_messages_are_counted_and_passed_over(followed: Followed) -> None:
    counters = [telemetry.ENGINE_EVENTS_IGNORED.labels(reason=reason) for reason in ("malformed_batch", "other_medium")]
    before = [counter._value.get() for counter in counters]
    publisher = await followed.publisher()
    await followed.source(publisher)

    await publisher.publish_payload(b"\xc1")
    await publisher.publish(stored(1, tokens=tokens(1), medium="CPU"), one(2))
    await followed.heard.holds(2)
    await publisher.publish(cleared(), one(3))
    await followed.heard.holds(3)

    assert [counter._value.get() for counter in counters] == [count + 1 for count in before]
    assert publisher.replays == [0]


@pytest.mark.parametrize("seed", range(4))
async def test_random_losses_and_restarts_end_in_the_truth(followed: Followed, seed: int) -> None:
    rng = random.Random(seed)
    publisher = await followed.publisher()
    await followed.source(publisher, check_s=0.05, replay_timeout_s=0.5)
    truth: set[int] = set()

    for _ in range(400):
        is_lost = rng.random() < 0.2
        if rng.random() < 0.01:
            await publisher.aclose()
            publisher = await followed.publisher(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint)
            truth.clear()
        if rng.random() < 0.01:
            truth.clear()
            await publisher.publish(cleared(), is_lost=is_lost)
        elif truth and rng.random() < 0.4:
            number = rng.choice(sorted(truth))
            truth.discard(number)
            await publisher.publish(removed(number), is_lost=is_lost)
        else:
            number = rng.choice([number for number in range(60) if number not in truth])
            truth.add(number)
            await publisher.publish(one(number), is_lost=is_lost)

    await followed.heard.holds(*truth)


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://127.0.0.1:5557", 0, "tcp://127.0.0.1:5557"),
        ("tcp://127.0.0.1:5557", 3, "tcp://127.0.0.1:5560"),
        ("inproc://events", 2, "inproc://events_dp2"),
    ],
)
def test_each_rank_has_the_next_port(endpoint: str, rank: int, expected: str) -> None:
    assert endpoint_of_rank(endpoint, rank) == expected


def test_ranks_cannot_be_counted_without_a_port() -> None:
    with pytest.raises(FixRequestError):
        endpoint_of_rank("ipc:///tmp/events", 1)


async def test_router_finds_what_an_engine_publishes(followed: Followed) -> None:
    discovery = MemoryDiscovery()
    async with AsyncExitStack() as stack:
        worker = await ScriptedWorker.start(discovery, ranks=2)
        stack.push_async_callback(worker.aclose)
        router = LocalRouter(
            discovery=discovery,
            namespace="default",
            router_id=RouterId("r"),
            policy=build_policy("kv_aware"),
            rng=random.Random(7),
        )
        stack.push_async_callback(router.aclose)
        router.start()
        publisher = await followed.publisher()
        source = VllmEventSource(
            endpoint=publisher.endpoint,
            replay_endpoint=publisher.replay_endpoint,
            publish=lambda events: worker.events.publish_kv(events, rank=1),
            block_size=16,
        )
        stack.push_async_callback(source.aclose)
        source.start()
        hashes = sequence_hashes(local_block_hashes(np.array(CAPTURED_TOKENS, dtype=np.uint32), 16))
        query = RoutingQuery(model="m", prompt_tokens=16, block_hashes={16: hashes})

        async def overlap_becomes(depth: int) -> dict[WorkerRank, int]:
            async with asyncio.timeout(WAIT_S):
                while router.find(worker.worker_id) is None or set(router.overlaps(query).values()) != {0, depth}:
                    await router.changed()
            return router.overlaps(query)

        await publisher.publish(CAPTURED)
        found = await overlap_becomes(1)
        await publisher.publish({"type": "BlockRemoved", "block_hashes": [15760518052499183552], "group_idx": 0})
        gone = await overlap_becomes(0)

    assert found == {WorkerRank(worker.worker_id, 0): 0, WorkerRank(worker.worker_id, 1): 1}
    assert gone == {WorkerRank(worker.worker_id, 0): 0, WorkerRank(worker.worker_id, 1): 0}
