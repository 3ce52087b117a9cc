"""The router as a library: the processor of the same process calls it, and so does the gRPC service in front of it.

Choosing and booking never wait for a stream. What waits, and for how long, is `reserve` alone: for a worker to come.
"""

import asyncio
import random
from collections.abc import Sequence

from kvmesh import telemetry
from kvmesh.core.candidates import RoutingQuery, Selection
from kvmesh.core.errors import NotKnownError, Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey, RouterId, WorkerId, WorkerRank
from kvmesh.core.load_table import LoadTable
from kvmesh.core.policies.policy import Policy, name_of
from kvmesh.core.reservations import Reservation
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore, RoutingRules
from kvmesh.core.worker_views import PotentialLoad, WorkerSnapshot
from kvmesh.discovery.discovery import Discovery
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.router_workers import RouterWorkers
from kvmesh.wire.routing import Progress

log = telemetry.logger(__name__)

_EXPIRE_INTERVAL_S = 1.0


class LocalRouter:
    """One router: its mind, what it follows, its bookings. All methods are for the event loop it was started on."""

    def __init__(
        self,
        *,
        discovery: Discovery,
        namespace: str,
        router_id: RouterId,
        policy: Policy,
        rng: random.Random,
        rules: RoutingRules | None = None,
        reservation_ttl_s: float = 30.0,
    ) -> None:
        """Route by `policy` among the workers of one namespace; `router_id` must be new for every process."""
        self.router_id = router_id
        self.policy_name = name_of(policy)
        self._core = RoutingCore(
            router_id,
            policy=policy,
            rng=rng,
            rules=rules,
            loads=LoadTable(router_id, booking_ttl_s=reservation_ttl_s),
        )
        self._workers = RouterWorkers(self._core, discovery=discovery, namespace=namespace, router_id=router_id)
        self._tasks = OwnedTasks()
        self._fallbacks = telemetry.ROUTING_FALLBACKS.labels(policy=self.policy_name)

    def start(self) -> None:
        """Begin to follow the workers."""
        self._workers.start()
        self._tasks.start(self._expire(), name="router-expire")

    async def aclose(self) -> None:
        """Stop following; whoever waits in `changed` returns."""
        await self._tasks.aclose()
        await self._workers.aclose()
        self._workers.news.fire()

    async def reserve(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float = 0.0) -> Reservation:
        """Choose a worker and book the request on it; the same again gives the same answer.

        Where nobody could serve it, waits up to `wait_s` for somebody to come.
        Raises: as `select`, and ConflictError(ALREADY_EXISTS) if the key is booked for another query or has ended.
        """
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            now = asyncio.get_running_loop().time()
            try:
                reservation = self._core.reserve(key, query, now=now)
            except TryElsewhereError as error:
                if error.reason is not Reason.NO_WORKERS or wait_s <= 0:
                    raise
                if now >= deadline:
                    telemetry.WAIT_ENDED.labels(wait="route_s").inc()
                    raise
                await self._workers.roster_changed.wait(deadline)
            else:
                self._count(reservation.selection)
                return reservation

    def select(self, query: RoutingQuery) -> Selection:
        """Choose a worker and book nothing.

        Raises: NotKnownError(UNKNOWN_MODEL), TryElsewhereError(NO_WORKERS or NO_MATCHING_WORKER),
        BackOffError(OVERLOADED).
        """
        selection = self.explain(query)
        self._count(selection)
        return selection

    def explain(self, query: RoutingQuery) -> Selection:
        """Choose like `select`, only to be told why: it is not counted as a decision. Raises: as `select`."""
        return self._core.select(query, now=self._now())

    def explain_booked(self, reservation: Reservation) -> Selection:
        """Return the selection behind a reservation, whole if it was booked lately."""
        try:
            return self._core.explain(reservation.key)
        except NotKnownError:
            return reservation.selection

    def report_progress(self, progress: Sequence[Progress]) -> list[AttemptKey]:
        """Note how reservations go on; return the keys that are not held here. Those that ended lately are no news."""
        now = self._now()
        unknown = []
        for line in progress:
            try:
                self._core.report_progress(
                    line.key,
                    accepted_load_sequence=line.accepted_load_sequence,
                    prefill_complete=line.prefill_complete,
                    output_blocks=line.output_blocks,
                    now=now,
                )
            except NotKnownError:
                unknown.append(line.key)
        return unknown

    def release(self, key: AttemptKey) -> bool:
        """End a booking; False if it had ended before. Raises: NotKnownError(NOT_FOUND) if it was never seen."""
        return self._core.release(key, now=self._now())

    def potential_loads(self, query: RoutingQuery) -> tuple[PotentialLoad, ...]:
        """Return what every rank that serves the query would carry with it.

        Raises: NotKnownError(UNKNOWN_MODEL), TryElsewhereError(NO_WORKERS).
        """
        return self._core.potential_loads(query, now=self._now())

    def overlaps(self, query: RoutingQuery) -> dict[WorkerRank, int]:
        """Return the leading blocks that each rank holds, not capped. Raises: as `potential_loads`."""
        return self._core.overlaps(query)

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        """Return what is known of every worker rank, by worker."""
        return self._core.workers(now=self._now())

    def find(self, worker_id: WorkerId) -> WorkerRecord | None:
        """Return the live record of a decode or prefill worker, or None. O(1)."""
        return self._core.record(worker_id)

    def models(self) -> frozenset[str]:
        """Return every model that any worker serves."""
        return self._core.models()

    def block_sizes(self, model: str) -> frozenset[int]:
        """Return the block sizes for which a query for this model needs hashes."""
        return self._core.block_sizes(model)

    async def changed(self, until: float | None = None) -> None:
        """Wait for the next thing that a worker, or discovery, says; or for `until` on the loop's clock."""
        await self._workers.news.wait(until)

    async def roster_changed(self, until: float | None = None) -> None:
        """Wait until a worker comes, goes or changes its record; or for `until` on the loop's clock."""
        await self._workers.roster_changed.wait(until)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_INTERVAL_S)
            now = self._now()
            telemetry.RESERVATIONS_EXPIRED.inc(len(self._core.expire(now=now)))
            telemetry.RESERVATIONS.set(sum(worker.reservations for worker in self._core.workers(now=now)))

    def _count(self, selection: Selection) -> None:
        telemetry.ROUTING_DECISIONS.labels(policy=selection.policy).inc()
        if selection.is_staleness_ignored:
            telemetry.ROUTING_STALENESS_IGNORED.inc()
        if selection.fallback:
            self._fallbacks.inc()
            log.warning("policy.failed", policy=self.policy_name, fault=selection.fallback)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
