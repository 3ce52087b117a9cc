"""Reserve's wait for room: who finds every eligible worker overloaded waits in a bounded queue, with a deadline each.

    arrives -- a worker has room, nobody waits in its lane --> booked at once
            -- queue full --> shed
            -> waits -- room, and its turn --> admitted
                     -- its deadline --> timed out
                     -- its caller gone --> cancelled
                     -- it can be booked nowhere any more, e.g. its pinned worker left --> failed

Whoever waits is booked by one task, in order, whenever a load may have gone down; so no two compete for one room.
Whoever asks for what is booked is answered at once, whoever asks for what somebody waits for waits along.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh import telemetry
from kvmesh.core.admission import AdmissionOrder, AdmissionQueue, AdmissionRules, Waiting, lane_of
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.errors import BackOffError, ConflictError, MeshError, Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey
from kvmesh.core.reservations import Reservation, is_same_query
from kvmesh.core.routing import RoutingCore
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.signal import Flag, Signal

_MIN_INTERVAL_S = 0.005
"""Between two looks at the queue: loads change far more often than rooms appear."""
_MAX_ADMITTED = 64
"""At one look, so that the loop runs others too."""
_LOOK_AGAIN_S = 1.0
_RETRY_AFTER_S = 1.0


@dataclass(slots=True, eq=False)
class _Wish:
    """What the callers of one key wait for, mostly a single one."""

    key: AttemptKey
    query: RoutingQuery
    booked: asyncio.Future[Reservation]
    callers: int = 0
    """Those who wait now."""
    was_told: bool = False
    """A caller has its booking, and with it the duty to release it."""


class Admission:
    """Books at once where there is room, and lets wait where there is none."""

    def __init__(
        self, core: RoutingCore, rules: AdmissionRules, *, news: Signal, on_booked: Callable[[Reservation], None]
    ) -> None:
        """Book in `core`; `news` fires when workers say something, `on_booked` hears of every booking as it is made."""
        self._core = core
        self._rules = rules
        self._news = news
        self._on_booked = on_booked
        self._queue: AdmissionQueue[_Wish] = AdmissionQueue(rules)
        self._waiting: dict[AttemptKey, Waiting[_Wish]] = {}
        """Until the last of its callers has its answer, or has left."""
        self._arrival = Flag()
        self._room = Flag()
        self._may_have_room = False
        self._tasks = OwnedTasks()

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return len(self._queue)

    def start(self) -> None:
        """Begin to admit."""
        if self._rules.wait_s > 0:
            self._tasks.start(self._admit(), name="router-admission")
            self._tasks.start(self._follow_news(), name="router-admission-news")

    async def aclose(self) -> None:
        """Admit nobody any more; whoever waits is told DRAINING."""
        await self._tasks.aclose()
        for waiting in self._queue.in_order(now=0.0):
            if not waiting.item.booked.done():
                waiting.item.booked.set_exception(TryElsewhereError(Reason.DRAINING, "this router is shutting down"))

    def load_changed(self) -> None:
        """Look whether there is room now; cheap while nobody waits."""
        if self._queue:
            self._look_soon()

    def reserve_at_once(self, key: AttemptKey, query: RoutingQuery) -> Reservation | None:
        """Book; None if it would have to wait for room.

        Raises: what `RoutingCore.reserve` raises; BackOffError(OVERLOADED) where waiting is not allowed.
        """
        if self._may_have_room:
            self._admit_some()  # room that is there belongs to whoever waits for it
        waiting = self._waiting.get(key)
        if waiting is not None:
            if not is_same_query(waiting.item.query, query):
                raise ConflictError(Reason.ALREADY_EXISTS, f"{key}: waits for room with other content")
            return None
        held = self._core.find_booked(key, query, now=asyncio.get_running_loop().time())
        if held is not None:
            return held
        if self._rules.wait_s <= 0 or not self._queue.has_lane(lane_of(query)):
            try:
                return self._book(key, query)
            except BackOffError as error:
                if self._rules.wait_s <= 0 or error.reason is not Reason.OVERLOADED:
                    raise
        if self._queue.is_full:
            telemetry.ADMISSION_WAITS.labels(outcome="shed").inc()
            raise BackOffError(
                Reason.OVERLOADED,
                f"{len(self._queue)} requests wait for room already",
                retry_after_s=_RETRY_AFTER_S,
            )
        return None

    async def reserve(self, key: AttemptKey, query: RoutingQuery, *, until: float | None = None) -> Reservation:
        """Book, waiting for room as the rules say, but not beyond `until` on the loop's clock.

        Raises: what `reserve_at_once` raises; BackOffError(OVERLOADED) when the wait is over.
        """
        reservation = self.reserve_at_once(key, query)
        if reservation is not None:
            return reservation
        return await self._wait(self._waiting.get(key) or self._put(key, query), until)

    def _put(self, key: AttemptKey, query: RoutingQuery) -> Waiting[_Wish]:
        loop = asyncio.get_running_loop()
        waiting = Waiting(
            item=_Wish(key, query, loop.create_future()),
            lane=lane_of(query),
            arrived_at=loop.time(),
            priority=query.hints.priority,
            new_tokens=self._new_tokens(query),
        )
        self._queue.put(waiting)
        self._waiting[key] = waiting
        telemetry.ADMISSION_WAITING.set(len(self._queue))
        self._arrival.fire()
        self._look_soon()  # under some orders it goes before those that wait
        return waiting

    async def _wait(self, waiting: Waiting[_Wish], until: float | None) -> Reservation:
        """Wait as one of a wish's callers, each with a deadline of its own."""
        loop = asyncio.get_running_loop()
        arrived_at = loop.time()
        deadline = arrived_at + self._rules.wait_s
        wish = waiting.item
        wish.callers += 1
        outcome = "failed"
        try:
            async with asyncio.timeout_at(deadline if until is None else min(deadline, until)):
                reservation = await asyncio.shield(wish.booked)  # another may wait for the same
            outcome = "admitted"
            wish.was_told = True
            return reservation
        except TimeoutError as exc:
            outcome = "timed_out"
            raise BackOffError(
                Reason.OVERLOADED,
                f"no worker had room for {loop.time() - arrived_at:.1f} s",
                retry_after_s=_RETRY_AFTER_S,
            ) from exc
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            wish.callers -= 1
            if not wish.callers:
                self._end(waiting)
            telemetry.ADMISSION_WAITING.set(len(self._queue))
            telemetry.ADMISSION_WAITS.labels(outcome=outcome).inc()
            telemetry.ADMISSION_WAIT.observe(loop.time() - arrived_at)

    def _end(self, waiting: Waiting[_Wish]) -> None:
        """Forget a wish without callers; a booking that none of them heard of, all having left, is ended."""
        wish = waiting.item
        self._queue.remove(waiting)
        del self._waiting[wish.key]
        if wish.booked.done() and wish.booked.exception() is None and not wish.was_told:
            self._core.release(wish.key, now=asyncio.get_running_loop().time())
            self.load_changed()

    async def _follow_news(self) -> None:
        """Look for room when a worker says something, and now and then: that loads grow stale is no news."""
        while True:
            await self._arrival.wait()
            while self._queue:
                await self._news.wait(asyncio.get_running_loop().time() + _LOOK_AGAIN_S)
                self._look_soon()

    async def _admit(self) -> None:
        while True:
            await self._room.wait()
            if self._may_have_room:
                self._admit_some()
            await asyncio.sleep(_MIN_INTERVAL_S)

    def _admit_some(self) -> None:
        """Book those whose turn it is, lane by lane, until a lane's first finds no room."""
        self._may_have_room = False
        full_lanes, admitted = set(), 0
        for waiting in self._queue.in_order(now=asyncio.get_running_loop().time()):
            wish = waiting.item
            if waiting.lane in full_lanes or wish.booked.done():
                continue
            try:
                reservation = self._book(wish.key, wish.query)
            except BackOffError:
                full_lanes.add(waiting.lane)
                continue
            except MeshError as error:
                wish.booked.set_exception(error)
            else:
                wish.booked.set_result(reservation)
            self._queue.remove(waiting)
            admitted += 1
            if admitted == _MAX_ADMITTED:
                self._look_soon()
                return

    def _look_soon(self) -> None:
        self._may_have_room = True
        self._room.fire()

    def _book(self, key: AttemptKey, query: RoutingQuery) -> Reservation:
        reservation = self._core.reserve(key, query, now=asyncio.get_running_loop().time())
        self._on_booked(reservation)
        return reservation

    def _new_tokens(self, query: RoutingQuery) -> int:
        """Return what the worker with most of the prompt would have to compute; it counts under `shortest` alone."""
        if self._rules.order is not AdmissionOrder.SHORTEST:
            return 0
        try:
            overlaps = self._core.overlaps(query)
        except MeshError:
            return query.prompt_tokens
        cached = 0
        for worker, blocks in overlaps.items():
            record = self._core.record(worker.worker_id)
            cached = max(cached, blocks * record.block_size if record is not None else 0)
        return max(query.prompt_tokens - cached, 0)
