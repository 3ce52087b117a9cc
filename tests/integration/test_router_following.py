"""A router follows real servers: what it learns from discovery and from the workers themselves, and when it forgets."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvmesh import telemetry
from kvmesh.core.candidates import RoutingHints, RoutingQuery
from kvmesh.core.errors import NotKnownError, Reason, TryElsewhereError
from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, WorkerId, WorkerRank
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.roster import WorkerRole
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.engines.engine import EngineLoad
from kvmesh.services.local_router import LocalRouter
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.v1 import worker_events_pb2
from kvmesh.wire.routing import Progress

WAIT_S = 20.0
PROMPT = range(64)


class Mesh:
    """A discovery, and what a test starts around it."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.discovery = MemoryDiscovery()
        self._stack = stack

    async def worker(self, number: int = 0, *, registered: bool = True, **changes: Any) -> ScriptedWorker:
        worker = await ScriptedWorker.start(self.discovery if registered else None, number, **changes)
        self._stack.push_async_callback(worker.aclose)
        return worker

    async def router(self, router_id: str = "router-1", *, policy: Any = None, **options: Any) -> LocalRouter:
        router = LocalRouter(
            discovery=self.discovery,
            namespace="default",
            router_id=RouterId(router_id),
            policy=policy or build_policy("kv_aware"),
            rng=random.Random(7),
            **options,
        )
        router.start()
        self._stack.push_async_callback(router.aclose)
        return router


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        yield Mesh(stack)


async def until(router: LocalRouter, condition: Callable[[], bool]) -> None:
    """Wait until what the router hears makes `condition` true."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await router.changed()


async def reported(router: LocalRouter, *workers: ScriptedWorker) -> None:
    """Wait until each of these incarnations has sent a load."""
    wanted = {(worker.worker_id, worker.record.epoch) for worker in workers}

    def heard() -> bool:
        known = {(w.record.worker_id, w.record.epoch) for w in router.workers() if w.report is not None}
        return wanted <= known

    await until(router, heard)


def query(tokens: range = PROMPT, **changes: Any) -> RoutingQuery:
    hashes = sequence_hashes(local_block_hashes(np.array(tokens, dtype=np.uint32), 16))
    return RoutingQuery(model="m", prompt_tokens=len(tokens), block_hashes={16: hashes}, **changes)


def key(request: str = "r1", attempt: int = 1) -> AttemptKey:
    return AttemptKey(RequestId(request), attempt)


def overlap(router: LocalRouter, worker: ScriptedWorker, tokens: range = PROMPT) -> int:
    if router.find(worker.worker_id) is None:
        return 0
    return router.overlaps(query(tokens)).get(WorkerRank(worker.worker_id), 0)


async def test_request_goes_to_the_worker_that_holds_its_prefix(mesh: Mesh) -> None:
    cold, warm = await mesh.worker(0), await mesh.worker(1)
    warm.cache(PROMPT)
    router = await mesh.router()
    await until(router, lambda: overlap(router, warm) == 4)
    await reported(router, cold, warm)

    reservation = await router.reserve(key(), query())

    assert reservation.worker == WorkerRank(warm.worker_id)
    assert reservation.overlap_blocks == 3  # of four full blocks: one token is always computed


async def test_what_a_worker_stores_and_evicts_later_is_heard(mesh: Mesh) -> None:
    worker = await mesh.worker()
    router = await mesh.router()
    await reported(router, worker)

    hashes = worker.cache(PROMPT)
    await until(router, lambda: overlap(router, worker) == 4)
    worker.events.publish_kv([BlocksRemoved(hashes[1:])])

    await until(router, lambda: overlap(router, worker) == 1)


async def test_ranks_have_caches_of_their_own(mesh: Mesh) -> None:
    worker = await mesh.worker(ranks=2)
    router = await mesh.router()
    worker.cache(PROMPT, rank=1)
    ranks = [WorkerRank(worker.worker_id, rank) for rank in (0, 1)]

    await until(router, lambda: router.find(worker.worker_id) is not None and router.overlaps(query())[ranks[1]] == 4)

    assert router.overlaps(query()) == {ranks[0]: 0, ranks[1]: 4}


async def test_restarted_worker_is_cold_and_its_bookings_are_over(mesh: Mesh) -> None:
    old = await mesh.worker(0, epoch=Epoch(1))
    old.cache(PROMPT)
    router = await mesh.router()
    await until(router, lambda: overlap(router, old) == 4)
    await router.reserve(key(), query())
    await old.break_streams()

    new = await mesh.worker(0, epoch=Epoch(2), port=old.port)
    await reported(router, new)
    after_restart = overlap(router, new)
    new.cache(range(32))
    await until(router, lambda: overlap(router, new) == 2)

    assert after_restart == 0
    assert router.release(key()) is False  # it ended with the incarnation
    assert (await router.reserve(key("r2"), query())).epoch == Epoch(2)


async def test_record_of_an_older_epoch_is_ignored(mesh: Mesh) -> None:
    new = await mesh.worker(0, epoch=Epoch(2))
    new.cache(PROMPT)
    router = await mesh.router()
    await until(router, lambda: overlap(router, new) == 4)
    assert new.registration is not None
    new.registration.lose()  # only now would the store take the older one in

    await mesh.worker(0, epoch=Epoch(1))
    marker = await mesh.worker(1)
    await reported(router, marker)

    assert router.find(new.worker_id) == new.record
    assert overlap(router, new) == 4


async def test_words_of_another_incarnation_at_the_same_address_do_not_count(mesh: Mesh) -> None:
    recorded = await mesh.worker(0, epoch=Epoch(2), registered=False)
    recorded.cache(PROMPT)
    await mesh.discovery.register(replace(recorded.record, epoch=Epoch(1)))
    honest = await mesh.worker(1)
    router = await mesh.router()
    await reported(router, honest)
    async with asyncio.timeout(WAIT_S):
        while len(recorded.events.kv_requests) < 2:  # it was heard once, and is asked again
            await router.changed()

    heard = [worker for worker in router.workers() if worker.record.worker_id == recorded.worker_id]

    assert [worker.report for worker in heard] == [None]
    assert overlap(router, recorded) == 0


async def test_stopped_worker_is_gone_at_once(mesh: Mesh) -> None:
    staying, leaving = await mesh.worker(0), await mesh.worker(1)
    leaving.cache(PROMPT)
    router = await mesh.router()
    await until(router, lambda: overlap(router, leaving) == 4)

    await leaving.stop()
    await until(router, lambda: router.find(leaving.worker_id) is None)

    assert [worker.record.worker_id for worker in router.workers()] == [staying.worker_id]
    assert (await router.reserve(key(), query())).worker.worker_id == staying.worker_id


async def test_broken_stream_is_resumed_where_it_ended(mesh: Mesh) -> None:
    worker = await mesh.worker()
    hashes = worker.cache(range(32))
    router = await mesh.router()
    await until(router, lambda: overlap(router, worker) == 2)

    await worker.break_streams()
    booked = await router.reserve(key(), query())
    local = local_block_hashes(np.array(range(32, 48), dtype=np.uint32), 16)
    longer = sequence_hashes(local_block_hashes(np.array(range(48), dtype=np.uint32), 16))
    worker.events.publish_kv([BlocksStored(hashes[1], longer[2:], tuple(local))])
    await worker.serve(port=worker.port)
    await until(router, lambda: overlap(router, worker) == 3)

    assert booked.overlap_blocks == 2  # routing went on by what was known
    first, second = worker.events.kv_requests
    assert not first.HasField("from_sequence")
    assert second.HasField("from_sequence")
    assert (second.from_sequence, second.epoch) == (1, worker.record.epoch)


async def test_stream_that_missed_more_than_the_ring_holds_is_resumed_by_a_snapshot(mesh: Mesh) -> None:
    worker = await mesh.worker(ring_size=1)
    hashes = worker.cache(PROMPT)
    router = await mesh.router()
    await until(router, lambda: overlap(router, worker) == 4)

    await worker.break_streams()
    worker.events.publish_kv([BlocksRemoved(hashes[1:])])
    worker.cache(range(100, 132))
    await worker.serve(port=worker.port)
    await until(router, lambda: overlap(router, worker, range(100, 132)) == 2)

    assert overlap(router, worker) == 1


async def test_worker_whose_record_is_lost_stays_while_it_serves(mesh: Mesh) -> None:
    worker = await mesh.worker()
    worker.cache(PROMPT)
    router = await mesh.router()
    await until(router, lambda: overlap(router, worker) == 4)
    checks_before = _health_checks()
    assert worker.registration is not None

    worker.registration.lose()
    await until(router, lambda: _health_checks() > checks_before)
    worker.say(load=EngineLoad(waiting_requests=1))  # comes after the answer of the health check
    await until(router, lambda: any(w.report and w.report.waiting_requests for w in router.workers()))
    while_suspect = await router.reserve(key(), query())
    await worker.registration.update(worker.record)
    marker = await mesh.worker(1)
    await reported(router, marker)

    assert while_suspect.worker.worker_id == worker.worker_id
    assert overlap(router, worker) == 4  # nothing was forgotten on the way
    assert router.find(worker.worker_id) == worker.record


async def test_worker_whose_record_is_lost_goes_if_it_serves_no_more(mesh: Mesh) -> None:
    worker = await mesh.worker()
    router = await mesh.router()
    await reported(router, worker)
    worker.health.set_serving("", False)
    assert worker.registration is not None

    worker.registration.lose()
    await until(router, lambda: router.find(worker.worker_id) is None)

    with pytest.raises(TryElsewhereError) as caught:
        await router.reserve(key(), query())
    assert caught.value.reason is Reason.NO_WORKERS


async def test_crashed_worker_goes_once_its_record_does(mesh: Mesh) -> None:
    worker, other = await mesh.worker(0), await mesh.worker(1)
    router = await mesh.router()
    await reported(router, worker, other)

    await worker.crash()
    await until(router, lambda: router.find(worker.worker_id) is None)

    assert router.find(other.worker_id) == other.record


async def test_worker_missing_in_a_fresh_snapshot_is_looked_at_before_it_goes(mesh: Mesh) -> None:
    mesh.discovery = MemoryDiscovery(max_buffered=1)
    serving, dead = await mesh.worker(0), await mesh.worker(1)
    router = await mesh.router()
    await reported(router, serving, dead)
    await dead.aclose()

    for worker in (serving, dead):  # two events at once: the watch answers with a snapshot, and that is empty
        assert worker.registration is not None
        worker.registration.lose()
    await until(router, lambda: router.find(dead.worker_id) is None)

    assert router.find(serving.worker_id) == serving.record


async def test_draining_told_by_the_worker_itself_excludes_it(mesh: Mesh) -> None:
    worker = await mesh.worker()
    router = await mesh.router()
    await reported(router, worker)

    worker.say(draining=True)
    await until(router, lambda: all(known.record.draining for known in router.workers()))

    with pytest.raises(TryElsewhereError) as caught:
        await router.reserve(key(), query())
    assert caught.value.reason is Reason.NO_WORKERS


async def test_prefill_workers_and_queues_take_no_requests(mesh: Mesh) -> None:
    prefill = await mesh.worker(0, role=WorkerRole.PREFILL)
    queue = await mesh.worker(1, role=WorkerRole.QUEUE)
    router = await mesh.router()
    await reported(router, prefill)

    with pytest.raises(TryElsewhereError) as caught:
        await router.reserve(key(), query())

    assert caught.value.reason is Reason.NO_WORKERS
    assert router.find(queue.worker_id) is None


async def test_no_worker_within_the_wait_is_told_and_counted(mesh: Mesh) -> None:
    router = await mesh.router()
    waits_before = _wait_ended()
    began = asyncio.get_running_loop().time()

    with pytest.raises(TryElsewhereError) as caught:
        await router.reserve(key(), query(), wait_s=0.05)

    assert caught.value.reason is Reason.NO_WORKERS
    assert asyncio.get_running_loop().time() - began >= 0.05
    assert _wait_ended() - waits_before == 1


async def test_registration_wakes_a_waiting_reserve(mesh: Mesh) -> None:
    router = await mesh.router()
    waiting = asyncio.ensure_future(router.reserve(key(), query(), wait_s=WAIT_S))
    await asyncio.wait([waiting], timeout=0)

    worker = await mesh.worker()

    async with asyncio.timeout(WAIT_S / 2):
        assert (await waiting).worker == WorkerRank(worker.worker_id)


async def test_unknown_model_is_not_waited_for(mesh: Mesh) -> None:
    worker = await mesh.worker()
    router = await mesh.router()
    await reported(router, worker)

    async with asyncio.timeout(WAIT_S / 2):
        with pytest.raises(NotKnownError) as caught:
            await router.reserve(key(), replace(query(), model="other"), wait_s=WAIT_S)

    assert caught.value.reason is Reason.UNKNOWN_MODEL


async def test_shares_of_two_routers_are_told_apart(mesh: Mesh) -> None:
    worker = await mesh.worker()
    one, two = await mesh.router("one"), await mesh.router("two")
    await reported(one, worker)
    await reported(two, worker)
    booked = await one.reserve(key(), query())

    worker.say(
        shares=[
            worker_events_pb2.RouterShare(router_id="one", active_requests=1, prefill_tokens=64, decode_blocks=4),
            worker_events_pb2.RouterShare(router_id="", active_requests=2, prefill_tokens=10, decode_blocks=3),
        ],
        reservation_ids={"one": [booked.reservation_id]},
    )
    await until(two, lambda: two.workers()[0].load.active_requests == 3)
    await until(one, lambda: one.workers()[0].load.active_requests == 3)

    for router, own in ((one, 1), (two, 0)):
        state = router.workers()[0]
        assert (state.load.prefill_tokens, state.load.decode_blocks) == (74, 7)
        assert state.reservations == own


async def test_booking_that_a_later_report_does_not_show_is_over(mesh: Mesh) -> None:
    worker = await mesh.worker()
    router = await mesh.router()
    await reported(router, worker)
    await router.reserve(key(), query())

    unknown = router.report_progress(
        [
            Progress(key=key(), accepted_load_sequence=worker.events.load_sequence),
            Progress(key=key("never-seen")),
        ]
    )
    worker.events.load_changed()
    await until(router, lambda: router.workers()[0].reservations == 0)

    assert unknown == [key("never-seen")]
    assert router.release(key()) is False


async def test_released_booking_leaves_no_load(mesh: Mesh) -> None:
    worker = await mesh.worker()
    router = await mesh.router()
    await reported(router, worker)

    await router.reserve(key(), query())
    while_booked = router.workers()[0].load
    first, second = router.release(key()), router.release(key())

    assert (while_booked.active_requests, while_booked.prefill_tokens, while_booked.decode_blocks) == (1, 64, 4)
    assert router.workers()[0].load.active_requests == 0
    assert (first, second) == (True, False)
    with pytest.raises(NotKnownError):
        router.release(key("never-seen"))


async def test_select_and_explain_book_nothing(mesh: Mesh) -> None:
    worker = await mesh.worker()
    router = await mesh.router()
    await reported(router, worker)

    selected, explained = router.select(query()), router.explain(query())

    assert selected.worker == explained.worker == WorkerRank(worker.worker_id)
    assert router.workers()[0].reservations == 0


async def test_policy_that_fails_is_replaced_and_counted(mesh: Mesh) -> None:
    class Broken:
        name = "broken"

        def select(self, *_: Any) -> WorkerRank:
            return WorkerRank(WorkerId("nobody"))

    worker = await mesh.worker()
    router = await mesh.router(policy=Broken())
    await reported(router, worker)
    counter = telemetry.ROUTING_FALLBACKS.labels(policy="broken")
    before = counter._value.get()

    reservation = await router.reserve(key(), query())

    assert reservation.worker == WorkerRank(worker.worker_id)
    assert counter._value.get() - before == 1


async def test_two_requests_in_a_row_spread_over_idle_workers(mesh: Mesh) -> None:
    workers = [await mesh.worker(number) for number in range(3)]
    router = await mesh.router()
    await reported(router, *workers)

    chosen = {(await router.reserve(key(f"r{number}"), query())).worker for number in range(3)}

    assert chosen == {WorkerRank(worker.worker_id) for worker in workers}


async def test_excluded_worker_is_not_chosen_again(mesh: Mesh) -> None:
    workers = [await mesh.worker(number) for number in range(2)]
    router = await mesh.router()
    await reported(router, *workers)
    first = await router.reserve(key(), query())
    hints = RoutingHints(excluded_workers=frozenset({first.worker.worker_id}))

    second = await router.reserve(key(attempt=2), query(hints=hints))

    assert {first.worker.worker_id, second.worker.worker_id} == {worker.worker_id for worker in workers}


def _wait_ended() -> float:
    return float(telemetry.WAIT_ENDED.labels(wait="route_s")._value.get())


def _health_checks() -> float:
    return float(telemetry.RPC_FINISHED.labels("grpc.health.v1.Health", "Check", "OK")._value.get())
