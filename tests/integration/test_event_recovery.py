"""A router that lost track of a worker's cache finds back, routes by load meanwhile, and does not ask too often."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from kvmesh import telemetry
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, SequenceHash, WorkerRank
from kvmesh.core.kv_events import BlocksRemoved
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.reservations import Reservation
from kvmesh.core.routing import RoutingCore
from kvmesh.core.truth_check import TruthRules
from kvmesh.core.worker_views import WorkerSnapshot
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.services.router_workers import RouterWorkers
from kvmesh.testing.scripted_worker import ScriptedWorker

WAIT_S = 20.0
PROMPT = range(64)
OTHER = range(1000, 1064)


class Follower:
    """What follows workers in a router: its mind and its subscriptions."""

    def __init__(self, discovery: MemoryDiscovery, **options: Any) -> None:
        self.core = RoutingCore(RouterId("r"), policy=build_policy("kv_aware"), rng=random.Random(1))
        self.workers = RouterWorkers(
            self.core, discovery=discovery, namespace="default", router_id=RouterId("r"), **options
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await self.workers.news.wait()

    def state(self, worker: ScriptedWorker) -> WorkerSnapshot | None:
        now = asyncio.get_running_loop().time()
        return next((s for s in self.core.workers(now=now) if s.worker == WorkerRank(worker.worker_id)), None)

    def is_degraded(self, worker: ScriptedWorker) -> bool:
        state = self.state(worker)
        return state is not None and state.is_index_degraded

    def overlap(self, worker: ScriptedWorker, tokens: range = PROMPT, *, rank: int = 0) -> int:
        if self.core.record(worker.worker_id) is None:
            return 0
        return self.core.overlaps(query(tokens))[WorkerRank(worker.worker_id, rank)]

    async def until_overlap(self, worker: ScriptedWorker, depth: int, tokens: range = PROMPT, *, rank: int = 0) -> None:
        await self.until(lambda: self.overlap(worker, tokens, rank=rank) == depth)

    def held(self) -> dict[WorkerRank, frozenset[SequenceHash]]:
        """What the index believes of each rank."""
        held: dict[WorkerRank, set[SequenceHash]] = {}
        for pair in self.core.dump_index():
            held.setdefault(pair.worker, set()).add(pair.block_hash)
        return {worker: frozenset(hashes) for worker, hashes in held.items()}

    async def until_held(self, tables: dict[WorkerRank, frozenset[SequenceHash]]) -> None:
        await self.until(lambda: self.held() == tables)

    def reserve(self, number: int, tokens: range = PROMPT) -> Reservation:
        """Book as a router does."""
        now = asyncio.get_running_loop().time()
        reservation = self.core.reserve(key(number), query(tokens), now=now)
        self.workers.predicted(reservation)
        return reservation

    def finish(self, number: int, *, cached_tokens: int | None) -> None:
        """End a booking as a router does, whose processor says what the worker had cached."""
        self.core.release(key(number), now=asyncio.get_running_loop().time())
        self.workers.found(key(number), cached_tokens)


class Mesh:
    def __init__(self, stack: AsyncExitStack) -> None:
        self.discovery = MemoryDiscovery()
        self._stack = stack

    async def worker(self, number: int = 0, **changes: Any) -> ScriptedWorker:
        worker = await ScriptedWorker.start(self.discovery, number, **changes)
        self._stack.push_async_callback(worker.aclose)
        return worker

    async def follower(self, **options: Any) -> Follower:
        follower = Follower(self.discovery, **options)
        follower.workers.start()
        self._stack.push_async_callback(follower.workers.aclose)
        return follower


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        yield Mesh(stack)


def blocks(tokens: range) -> tuple[SequenceHash, ...]:
    return sequence_hashes(local_block_hashes(np.array(tokens, dtype=np.uint32), 16))


def query(tokens: range = PROMPT) -> RoutingQuery:
    return RoutingQuery(model="m", prompt_tokens=len(tokens), block_hashes={16: blocks(tokens)})


def key(number: int) -> AttemptKey:
    return AttemptKey(RequestId(f"r{number}"), 1)


def snapshots() -> float:
    return float(telemetry.KV_SNAPSHOTS._value.get())


def overrun(worker: ScriptedWorker, tokens: range) -> None:
    """Change more at once than a ring of one batch can tell: `tokens` stay, OTHER comes and goes."""
    worker.cache(tokens)
    worker.cache(OTHER)
    worker.events.publish_kv([BlocksRemoved(blocks(OTHER))])


async def test_recovered_cache_keeps_prefixes_and_missed_removals_and_goes_on_from_there(mesh: Mesh) -> None:
    worker = await mesh.worker(ring_size=1)
    hashes = worker.cache(PROMPT)
    follower = await mesh.follower()
    await follower.until(lambda: follower.overlap(worker) == 4)
    before = snapshots()

    worker.events.publish_kv([BlocksRemoved(hashes[2:])])
    overrun(worker, range(100, 132))
    await follower.until(lambda: follower.overlap(worker, range(100, 132)) == 2)
    recovered = (follower.overlap(worker), follower.overlap(worker, OTHER))
    snapshots_then = snapshots() - before
    for first in range(2000, 2005):
        worker.cache(range(first, first + 16))
        await follower.until_overlap(worker, 1, range(first, first + 16))

    assert recovered == (2, 0)
    assert snapshots_then == snapshots() - before == 1  # later events need no second recovery


async def test_second_gap_is_recovered_only_after_the_wait_and_load_decides_meanwhile(mesh: Mesh) -> None:
    resync_s = 1.0
    warm, cold = await mesh.worker(0, ring_size=1), await mesh.worker(1)
    warm.cache(PROMPT)
    follower = await mesh.follower(resync_s=resync_s)
    await follower.until(lambda: follower.overlap(warm) == 4 and follower.overlap(cold) == 0)
    await follower.until(lambda: follower.state(cold) is not None)
    now = asyncio.get_running_loop().time
    degraded_before, gaps_before = telemetry.INDEX_DEGRADED._value.get(), _gaps("fell_behind")
    first_at = now()

    overrun(warm, range(100, 132))
    await follower.until(lambda: follower.overlap(warm, range(100, 132)) == 2)
    preferred = follower.core.select(query(), now=now()).worker
    overrun(warm, range(200, 232))
    await follower.until(lambda: follower.is_degraded(warm))
    meanwhile = (follower.overlap(warm), telemetry.INDEX_DEGRADED._value.get() - degraded_before)
    chosen = {follower.core.select(query(), now=now()).worker for _ in range(40)}
    await follower.until(lambda: not follower.is_degraded(warm))
    await follower.until(lambda: follower.overlap(warm, range(200, 232)) == 2)

    assert preferred == WorkerRank(warm.worker_id)
    assert meanwhile == (0, 1)
    assert chosen == {WorkerRank(warm.worker_id), WorkerRank(cold.worker_id)}  # equally idle: nothing speaks for either
    assert follower.overlap(warm) == 4
    assert now() - first_at >= resync_s
    assert _gaps("fell_behind") - gaps_before == 2


async def test_restarted_worker_is_read_at_once_though_it_was_recovered_a_moment_ago(mesh: Mesh) -> None:
    old = await mesh.worker(0, ring_size=1)
    old.cache(PROMPT)
    follower = await mesh.follower(resync_s=3600.0)
    await follower.until(lambda: follower.overlap(old) == 4)
    overrun(old, range(100, 132))
    await follower.until(lambda: follower.overlap(old, range(100, 132)) == 2)
    overrun(old, range(200, 232))
    await follower.until(lambda: follower.is_degraded(old))
    await old.break_streams()

    new = await mesh.worker(0, epoch=Epoch(2), port=old.port)
    new.cache(range(48))
    await follower.until(lambda: follower.overlap(new) == 3)

    assert not follower.is_degraded(new)
    assert follower.overlap(new, range(100, 132)) == 0


async def test_each_rank_goes_on_from_its_own_position(mesh: Mesh) -> None:
    worker = await mesh.worker(ranks=2)
    worker.cache(PROMPT, rank=0)
    follower = await mesh.follower()
    await follower.until(lambda: follower.overlap(worker, rank=0) == 4)
    for depth in (1, 2, 3):
        worker.cache(range(16 * depth), rank=1)
        await follower.until_overlap(worker, depth, rank=1)
    before = snapshots()

    await worker.break_streams()
    worker.cache(range(2000, 2016), rank=0)
    worker.cache(OTHER, rank=1)
    await worker.serve(port=worker.port)
    await follower.until_overlap(worker, 4, OTHER, rank=1)
    await follower.until_overlap(worker, 1, range(2000, 2016), rank=0)

    positions = {
        request.rank: request.from_sequence
        for request in worker.events.kv_requests
        if request.HasField("from_sequence")
    }
    assert positions == {0: 1, 1: 3}
    assert (follower.overlap(worker, OTHER, rank=0), snapshots() - before) == (0, 0)


async def test_worker_that_evicts_without_a_word_is_found_out_and_read_anew(mesh: Mesh) -> None:
    worker = await mesh.worker()
    hashes = worker.cache(PROMPT)
    follower = await mesh.follower(truth=TruthRules(min_predictions=5))
    await follower.until(lambda: follower.overlap(worker) == 4)
    alarms, wrong = telemetry.INDEX_DRIFT_ALARMS._value.get(), telemetry.INDEX_OVERPREDICTED_BLOCKS._value.get()
    before, predicted_before = snapshots(), telemetry.INDEX_PREDICTED_BLOCKS._value.get()
    worker.evict_silently(hashes[1:])

    for number in range(5):
        predicted = follower.reserve(number).overlap_blocks
        follower.finish(number, cached_tokens=16)
        assert predicted == 3
    await follower.until(lambda: follower.is_degraded(worker))
    await follower.until(lambda: not follower.is_degraded(worker) and follower.overlap(worker) == 1)
    for number in range(10, 20):
        follower.reserve(number)
        follower.finish(number, cached_tokens=16)
    await follower.until(lambda: telemetry.INDEX_PREDICTED_BLOCKS._value.get() - predicted_before == 25)

    assert not follower.is_degraded(worker)
    assert snapshots() - before == 1
    assert telemetry.INDEX_DRIFT_ALARMS._value.get() - alarms == 1
    assert telemetry.INDEX_OVERPREDICTED_BLOCKS._value.get() - wrong == 10


async def test_worker_that_goes_on_lying_stays_degraded_until_it_may_be_read_again(mesh: Mesh) -> None:
    liar = await mesh.worker()
    liar.cache(PROMPT)
    follower = await mesh.follower(truth=TruthRules(min_predictions=5), resync_s=3600.0)
    await follower.until(lambda: follower.overlap(liar) == 4)
    before = snapshots()

    for number in range(5):
        follower.reserve(number)
        follower.finish(number, cached_tokens=0)
    await follower.until(lambda: follower.is_degraded(liar))
    await follower.until(lambda: follower.overlap(liar) == 4 and not follower.is_degraded(liar))
    for number in range(10, 15):
        follower.reserve(number)
        follower.finish(number, cached_tokens=0)
    await follower.until(lambda: follower.is_degraded(liar))

    assert follower.overlap(liar) == 0
    assert snapshots() - before == 1
    assert follower.reserve(20).overlap_blocks == 0


async def test_router_without_an_index_asks_for_loads_only(mesh: Mesh) -> None:
    worker = await mesh.worker()
    worker.cache(PROMPT)
    follower = await mesh.follower(follows_caches=False)

    def is_reported() -> bool:
        state = follower.state(worker)
        return state is not None and state.report is not None

    await follower.until(is_reported)
    for number in range(20):
        follower.reserve(number)
        follower.finish(number, cached_tokens=0)

    assert worker.events.kv_requests == []
    assert not follower.is_degraded(worker)


async def test_removals_that_arrive_in_time_raise_no_alarm(mesh: Mesh) -> None:
    worker = await mesh.worker()
    follower = await mesh.follower(truth=TruthRules(min_predictions=1))
    alarms, wrong = telemetry.INDEX_DRIFT_ALARMS._value.get(), telemetry.INDEX_OVERPREDICTED_BLOCKS._value.get()
    judged_before = telemetry.INDEX_PREDICTED_BLOCKS._value.get()

    for number in range(4):
        hashes = worker.cache(PROMPT)
        await follower.until(lambda: follower.overlap(worker) == 4)
        follower.reserve(number)
        worker.events.publish_kv([BlocksRemoved(hashes)])
        if number % 2:  # the other removals are still on their way when the request ends
            await follower.until(lambda: follower.overlap(worker) == 0)
        follower.finish(number, cached_tokens=0)
        await follower.until(lambda: follower.overlap(worker) == 0)
    await follower.until(lambda: telemetry.INDEX_PREDICTED_BLOCKS._value.get() - judged_before == 12)

    assert telemetry.INDEX_OVERPREDICTED_BLOCKS._value.get() == wrong
    assert telemetry.INDEX_DRIFT_ALARMS._value.get() == alarms
    assert not follower.is_degraded(worker)


async def test_router_started_later_knows_the_same_after_its_first_snapshots(mesh: Mesh) -> None:
    workers = [await mesh.worker(number, ring_size=2, ranks=2) for number in range(3)]
    first = await mesh.follower()
    rng = random.Random(5)
    for worker in workers:
        for rank in worker.record.worker_ranks:
            for start in range(0, 20_000, 1000):
                hashes = worker.cache(range(start, start + 16 * rng.randint(2, 6)), rank=rank.rank)
                worker.events.publish_kv([BlocksRemoved(hashes[len(hashes) // 2 :])], rank=rank.rank)
    tables = {rank: worker.events.cached_blocks(rank.rank) for worker in workers for rank in worker.record.worker_ranks}

    second = await mesh.follower()
    await first.until_held(tables)
    await second.until_held(tables)

    assert all(tables.values())
    assert list(first.core.dump_index()) == list(second.core.dump_index())


def _gaps(cause: str) -> float:
    return float(telemetry.INDEX_GAPS.labels(cause=cause)._value.get())
