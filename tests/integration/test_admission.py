"""Reserve's wait for a worker with room, on a router that follows real workers."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvmesh.core.admission import AdmissionOrder, AdmissionRules
from kvmesh.core.candidates import RoutingHints, RoutingQuery
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.errors import BackOffError, ConflictError, MeshError, Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey, RequestId, RouterId
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.reservations import Reservation
from kvmesh.core.routing import RoutingRules
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.engines.engine import EngineLoad
from kvmesh.services.local_router import LocalRouter
from kvmesh.testing.scripted_worker import ScriptedWorker

WAIT_S = 20.0
LONG = AdmissionRules(wait_s=WAIT_S)
ONE_REQUEST_EACH = OverloadRules(max_requests_per_slot=1.0)


@asynccontextmanager
async def router_of(
    workers: int = 1,
    *,
    admission: AdmissionRules = LONG,
    overload: OverloadRules = ONE_REQUEST_EACH,
    discovery: MemoryDiscovery | None = None,
    **rules: Any,
) -> AsyncIterator[tuple[LocalRouter, list[ScriptedWorker]]]:
    """Run a router over workers that take one request each."""
    discovery = discovery or MemoryDiscovery()
    made = [await ScriptedWorker.start(discovery, number, max_requests=1) for number in range(workers)]
    router = LocalRouter(
        discovery=discovery,
        namespace="default",
        router_id=RouterId("router-1"),
        policy=build_policy("kv_aware"),
        rng=random.Random(3),
        rules=RoutingRules(overload=overload, **rules),
        admission=admission,
    )
    router.start()
    try:
        async with asyncio.timeout(WAIT_S):
            while len(router.workers()) < workers or not all(state.report for state in router.workers()):
                await router.changed()
        yield router, made
    finally:
        await router.aclose()
        for worker in made:
            await worker.aclose()


def key(name: str) -> AttemptKey:
    return AttemptKey(RequestId(name), 1)


def query(prompt_tokens: int = 32, **hints: Any) -> RoutingQuery:
    return RoutingQuery(model="m", prompt_tokens=prompt_tokens, hints=RoutingHints(**hints))


async def start_waiting_for_the_same(router: LocalRouter, name: str) -> list["asyncio.Task[Reservation]"]:
    """Let two callers wait for one key."""
    (first,) = await start_waiting(router, (name, query()))
    second = asyncio.create_task(router.reserve(key(name), query()))
    for _ in range(3):  # turns of the loop: it waits after the first of them
        await asyncio.sleep(0)
    assert not second.done()
    return [first, second]


async def booked_again(router: LocalRouter) -> None:
    """Return in the turn of the loop in which somebody is booked, before the caller hears of it."""
    async with asyncio.timeout(WAIT_S):
        while not router.workers()[0].reservations:  # noqa: ASYNC110  # a turn of the loop each
            await asyncio.sleep(0)


async def start_waiting(router: LocalRouter, *requests: tuple[str, RoutingQuery]) -> list["asyncio.Task[Reservation]"]:
    """Let these wait, one after the other; returns when all of them do."""
    tasks = []
    for name, asked in requests:
        before = router.waiting
        tasks.append(asyncio.create_task(router.reserve(key(name), asked), name=name))
        async with asyncio.timeout(WAIT_S):
            while router.waiting == before:  # noqa: ASYNC110  # a turn of the loop each: nothing says that it waits
                await asyncio.sleep(0)
    return tasks


async def admitted_in_turn(router: LocalRouter, held: str, tasks: Sequence["asyncio.Task[Reservation]"]) -> list[str]:
    """Give the one room back again and again; return who got it, in order."""
    order = []
    pending = set(tasks)
    while pending:
        router.release(key(held))
        done, pending = await asyncio.wait(pending, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        held = done.pop().get_name()
        order.append(held)
    return order


async def test_without_a_wait_overload_is_an_error_at_once() -> None:
    async with router_of(admission=AdmissionRules()) as (router, _):
        await router.reserve(key("first"), query())

        with pytest.raises(BackOffError) as refused:
            await router.reserve(key("second"), query())

        assert refused.value.reason is Reason.OVERLOADED


async def test_reserve_waits_for_a_release_and_select_answers_at_once() -> None:
    async with router_of() as (router, workers):
        await router.reserve(key("first"), query())
        (waiting,) = await start_waiting(router, ("second", query()))

        with pytest.raises(BackOffError):
            router.select(query())
        router.release(key("first"))
        reservation = await waiting

        assert reservation.worker.worker_id == workers[0].worker_id
        assert router.waiting == 0
        assert router.workers()[0].reservations == 1


async def test_a_report_of_less_load_wakes_who_waits() -> None:
    async with router_of(overload=OverloadRules(max_waiting_requests=0)) as (router, workers):
        workers[0].say(load=EngineLoad(waiting_requests=3))
        async with asyncio.timeout(WAIT_S):
            while not (report := router.workers()[0].report) or not report.waiting_requests:
                await router.changed()
        (waiting,) = await start_waiting(router, ("r", query()))

        workers[0].say(load=EngineLoad())

        assert (await waiting).worker.worker_id == workers[0].worker_id


async def test_a_new_worker_wakes_who_waits() -> None:
    discovery = MemoryDiscovery()
    async with router_of(discovery=discovery) as (router, _):
        await router.reserve(key("first"), query())
        (waiting,) = await start_waiting(router, ("second", query()))

        newcomer = await ScriptedWorker.start(discovery, 7, max_requests=1)
        try:
            assert (await waiting).worker.worker_id == newcomer.worker_id
        finally:
            await newcomer.aclose()


@pytest.mark.parametrize(
    ("order", "priority", "expected"),
    [
        (AdmissionOrder.FCFS, 10, ["long", "short", "last"]),
        (AdmissionOrder.PRIORITY, 9, ["last", "long", "short"]),
        (AdmissionOrder.SHORTEST, 10, ["short", "last", "long"]),
    ],
)
async def test_who_waits_is_admitted_in_order(order: AdmissionOrder, priority: int, expected: list[str]) -> None:
    async with router_of(admission=AdmissionRules(wait_s=WAIT_S, order=order)) as (router, _):
        await router.reserve(key("held"), query())
        tasks = await start_waiting(
            router,
            ("long", query(4_000, priority=10)),
            ("short", query(16, priority=10)),
            ("last", query(1_000, priority=priority)),
        )

        assert await admitted_in_turn(router, "held", tasks) == expected


async def test_whoever_waits_for_a_worker_of_its_own_lets_the_others_pass() -> None:
    async with router_of(2) as (router, workers):
        pinned_to = {number: query(pinned_worker=workers[number].worker_id) for number in range(2)}
        await router.reserve(key("on 0"), pinned_to[0])
        await router.reserve(key("on 1"), pinned_to[1])
        pinned, anywhere = await start_waiting(router, ("pinned", pinned_to[0]), ("anywhere", query()))

        router.release(key("on 1"))
        free = await anywhere

        assert free.worker.worker_id == workers[1].worker_id
        assert not pinned.done()
        router.release(key("on 0"))
        assert (await pinned).worker.worker_id == workers[0].worker_id


async def test_a_pinned_request_is_never_rerouted_and_fails_when_its_worker_leaves() -> None:
    async with router_of(2) as (router, workers):
        await router.reserve(key("held"), query(pinned_worker=workers[0].worker_id))
        (pinned,) = await start_waiting(router, ("pinned", query(pinned_worker=workers[0].worker_id)))

        await workers[0].stop()

        with pytest.raises(TryElsewhereError) as refused:
            await pinned
        assert refused.value.reason is Reason.NO_MATCHING_WORKER


async def test_nobody_overtakes_who_waits_in_the_same_lane() -> None:
    async with router_of() as (router, _):
        await router.reserve(key("held"), query())
        (early,) = await start_waiting(router, ("early", query(4_000)))

        router.release(key("held"))  # the room is free, and `early` is not awake yet
        late = asyncio.create_task(router.reserve(key("late"), query(16)))
        await early

        assert not late.done()
        router.release(key("early"))
        await late


async def test_room_that_one_waits_for_is_not_taken_by_one_that_could_go_anywhere() -> None:
    async with router_of() as (router, workers):
        await router.reserve(key("held"), query())
        (pinned,) = await start_waiting(router, ("pinned", query(pinned_worker=workers[0].worker_id)))

        router.release(key("held"))
        late = asyncio.create_task(router.reserve(key("late"), query()))
        await pinned

        assert not late.done()
        router.release(key("pinned"))
        await late


async def test_asking_again_for_what_is_booked_waits_for_nothing() -> None:
    async with router_of() as (router, _):
        first = await router.reserve(key("held"), query())
        (waiting,) = await start_waiting(router, ("second", query()))

        again = await router.reserve(key("held"), query())

        assert again.reservation_id == first.reservation_id
        assert not waiting.done()
        router.release(key("held"))
        await waiting


async def test_what_is_booked_is_found_though_its_explanation_is_forgotten_and_the_queue_full() -> None:
    full = AdmissionRules(wait_s=WAIT_S, max_waiting=1)
    async with router_of(admission=full, max_explained=0) as (router, _):
        first = await router.reserve(key("held"), query())
        (waiting,) = await start_waiting(router, ("second", query()))

        again = await router.reserve(key("held"), query())
        with pytest.raises(ConflictError):
            await router.reserve(key("held"), query(64))

        assert again == first
        assert not waiting.done()
        router.release(key("held"))
        await waiting
        with pytest.raises(ConflictError):  # at once, too: it has ended
            await router.reserve(key("held"), query())


async def test_two_that_ask_for_the_same_share_one_place_and_one_booking() -> None:
    async with router_of(admission=AdmissionRules(wait_s=WAIT_S, max_waiting=1)) as (router, _):
        await router.reserve(key("held"), query())
        asked = await start_waiting_for_the_same(router, "same")

        with pytest.raises(ConflictError) as refused:
            await router.reserve(key("same"), query(64))
        waited = router.waiting
        router.release(key("held"))
        first, second = await asyncio.gather(*asked)

        assert refused.value.reason is Reason.ALREADY_EXISTS
        assert waited == 1
        assert first == second
        assert (router.waiting, router.workers()[0].reservations) == (0, 1)


@pytest.mark.parametrize("leaver", [0, 1])
async def test_one_of_two_that_leaves_in_the_moment_of_the_booking_leaves_it_to_the_other(leaver: int) -> None:
    async with router_of() as (router, _):
        await router.reserve(key("held"), query())
        asked = await start_waiting_for_the_same(router, "same")

        router.release(key("held"))
        await booked_again(router)
        asked[leaver].cancel()
        reservation = await asked[1 - leaver]

        assert reservation.key == key("same")
        assert router.workers()[0].reservations == 1


async def test_a_booking_of_which_both_callers_left_unheard_is_ended() -> None:
    async with router_of() as (router, _):
        await router.reserve(key("held"), query())
        asked = await start_waiting_for_the_same(router, "same")

        router.release(key("held"))
        await booked_again(router)
        for task in asked:
            task.cancel()
        await asyncio.wait(asked, timeout=WAIT_S)

        assert all(task.cancelled() for task in asked)
        assert router.workers()[0].reservations == 0


async def test_each_of_two_that_ask_for_the_same_has_its_own_bound() -> None:
    async with router_of() as (router, _):
        await router.reserve(key("held"), query())
        (patient,) = await start_waiting(router, ("same", query()))

        with pytest.raises(BackOffError):
            await router.reserve(key("same"), query(), until=asyncio.get_running_loop().time() + 0.05)
        router.release(key("held"))

        assert (await patient).key == key("same")


async def test_a_full_queue_sheds_at_once_with_a_time_to_come_back() -> None:
    async with router_of(admission=AdmissionRules(wait_s=WAIT_S, max_waiting=1)) as (router, _):
        await router.reserve(key("held"), query())
        (waiting,) = await start_waiting(router, ("first", query()))

        with pytest.raises(BackOffError) as shed:
            await router.reserve(key("second"), query())

        assert (shed.value.reason, shed.value.retry_after_s) == (Reason.OVERLOADED, 1.0)
        assert not waiting.done()
        router.release(key("held"))
        await waiting


async def test_the_wait_ends_at_its_bound_or_at_the_callers() -> None:
    async with router_of(admission=AdmissionRules(wait_s=0.05)) as (router, _):
        await router.reserve(key("held"), query())

        with pytest.raises(BackOffError) as at_its_own:
            await router.reserve(key("second"), query())

        assert at_its_own.value.reason is Reason.OVERLOADED
        assert router.waiting == 0
    async with router_of() as (router, _):
        await router.reserve(key("held"), query())

        with pytest.raises(BackOffError):
            await router.reserve(key("second"), query(), until=asyncio.get_running_loop().time() + 0.05)

        assert router.waiting == 0


async def test_a_caller_that_leaves_leaves_the_queue_and_no_booking() -> None:
    async with router_of() as (router, _):
        await router.reserve(key("held"), query())
        gone, stays = await start_waiting(router, ("gone", query()), ("stays", query()))

        gone.cancel()
        router.release(key("held"))
        await stays

        assert gone.cancelled() or gone.done()
        assert router.workers()[0].reservations == 1
        assert router.waiting == 0


async def test_a_caller_that_leaves_in_the_moment_it_is_booked_leaves_no_booking() -> None:
    async with router_of() as (router, _):
        await router.reserve(key("held"), query())
        (gone,) = await start_waiting(router, ("gone", query()))

        router.release(key("held"))
        await booked_again(router)
        gone.cancel()  # booked, but it has not heard of it
        with pytest.raises(asyncio.CancelledError):
            await gone

        assert router.workers()[0].reservations == 0


async def test_who_waits_when_the_router_stops_is_told() -> None:
    async with router_of() as (router, _):
        await router.reserve(key("held"), query())
        (waiting,) = await start_waiting(router, ("second", query()))

        await router.aclose()

        with pytest.raises(MeshError) as told:
            await waiting
        assert told.value.reason is Reason.DRAINING
