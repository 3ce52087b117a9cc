"""The router as a library: the processor of the same process calls it, and so does the gRPC service in front of it.

Choosing and booking never wait for a stream. What waits, and for how long, is `reserve` alone: for a worker to come.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence

from kvmesh import telemetry
from kvmesh.core.admission import AdmissionRules
from kvmesh.core.candidates import RoutingQuery, Selection
from kvmesh.core.decision_log import Decision
from kvmesh.core.errors import MeshError, NotKnownError, Reason
from kvmesh.core.ids import AttemptKey, RouterId, WorkerId, WorkerRank
from kvmesh.core.index_port import CacheIndex, IndexMode
from kvmesh.core.load_table import LoadTable
from kvmesh.core.policies.policy import Policy, name_of
from kvmesh.core.prefix_index import HeldBlock
from kvmesh.core.reservations import Reservation
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore, RoutingRules
from kvmesh.core.worker_views import PotentialLoad, WorkerSnapshot
from kvmesh.discovery.discovery import Discovery
from kvmesh.services.admission import Admission
from kvmesh.services.decision_log import DecisionLog
from kvmesh.services.local_calls import LocalServers
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.recent_decisions import RecentDecisions
from kvmesh.services.router_metrics import RouterMetrics, observe_stage
from kvmesh.services.router_workers import RouterWorkers
from kvmesh.wire.routing import Progress

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
        admission: AdmissionRules | None = None,
        index: CacheIndex | None = None,
        decision_log: DecisionLog | None = None,
        local: LocalServers | None = None,
    ) -> None:
        """Route by `policy` among the workers of one namespace; `router_id` must be new for every process.

        `index` is one of the kind that `rules` name; None = one with its defaults. `local` knows the workers of this
        process; None = there are none.
        """
        rules = rules or RoutingRules()
        self.router_id = router_id
        self.policy_name = name_of(policy)
        self.index_mode = rules.index_mode
        self._metrics = RouterMetrics(self.policy_name, self.index_mode.value)
        self._core = RoutingCore(
            router_id,
            policy=policy,
            rng=rng,
            rules=rules,
            loads=LoadTable(router_id, booking_ttl_s=reservation_ttl_s),
            index=index,
            timer=time.perf_counter,
            observe_stages=observe_stage,
            on_fault=self._metrics.policy_failed,
        )
        self._workers = RouterWorkers(
            self._core,
            discovery=discovery,
            namespace=namespace,
            router_id=router_id,
            follows_caches=rules.index_mode is IndexMode.EVENTS,
            local=local,
        )
        self._admission = Admission(
            self._core,
            admission or AdmissionRules(),
            news=self._workers.news,
            on_booked=self._note_booked,
        )
        self._tasks = OwnedTasks()
        self._decision_log = decision_log
        self.recent_decisions = RecentDecisions()
        self._last_reservation_id = 0

    def start(self) -> None:
        """Begin to follow the workers. Raises: FixRequestError if the decision log cannot be written."""
        if self._decision_log is not None:
            self._decision_log.start()
        self._workers.start()
        self._admission.start()
        self._tasks.start(self._expire(), name="router-expire")

    async def aclose(self) -> None:
        """Stop following; whoever waits in `changed` returns."""
        await self._tasks.aclose()
        await self._admission.aclose()
        await self._workers.aclose()
        self._workers.news.fire()
        if self._decision_log is not None:
            await self._decision_log.aclose()

    def reserve_at_once(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float = 0.0) -> Reservation | None:
        """Book as `reserve` does if that needs no waiting; None where it would have to. Raises: as `reserve`."""
        try:
            return self._admission.reserve_at_once(key, query)
        except MeshError as error:
            if error.reason is Reason.NO_WORKERS and wait_s > 0:
                return None
            self._metrics.refused(error)
            raise

    async def reserve(
        self, key: AttemptKey, query: RoutingQuery, *, wait_s: float = 0.0, until: float | None = None
    ) -> Reservation:
        """Choose a worker and book the request on it; the same again gives the same answer.

        Where nobody could serve it, waits up to `wait_s` for somebody to come; where everybody who could is overloaded,
        as the rules of admission say, but not beyond `until` on the loop's clock.
        Raises: as `select`, and ConflictError(ALREADY_EXISTS) if the key is booked for another query or has ended.
        """
        deadline = self._now() + wait_s
        while True:
            try:
                return await self._admission.reserve(key, query, until=until)
            except MeshError as error:
                is_awaited = error.reason is Reason.NO_WORKERS and wait_s > 0
                if is_awaited and self._now() >= deadline:
                    telemetry.WAIT_ENDED.labels(wait="route_s").inc()
                    is_awaited = False
                if not is_awaited:
                    self._metrics.refused(error)
                    raise
                await self._workers.roster_changed.wait(deadline)

    def select(self, query: RoutingQuery) -> Selection:
        """Choose a worker and book nothing.

        Raises: NotKnownError(UNKNOWN_MODEL), TryElsewhereError(NO_WORKERS or NO_MATCHING_WORKER),
        BackOffError(OVERLOADED).
        """
        try:
            selection = self.explain(query)
        except MeshError as error:
            self._metrics.refused(error)
            raise
        self._metrics.chosen(selection, None, is_booked=False)
        self._note_decision(selection, None)
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
        self._admission.load_changed()
        return unknown

    def release(self, key: AttemptKey, *, cached_tokens: int | None = None) -> bool:
        """End a booking; False if it had ended before. Raises: NotKnownError(NOT_FOUND) if it was never seen.

        `cached_tokens` of the prompt were on the worker, by its own word; None = it did not say.
        """
        self._workers.found(key, cached_tokens)
        was_booked = self._core.release(key, now=self._now())
        self._admission.load_changed()
        return was_booked

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

    @property
    def waiting(self) -> int:
        """Requests that wait for a worker with room."""
        return self._admission.waiting

    def dump_index(self, worker_id: WorkerId | None = None) -> Iterator[HeldBlock]:
        """Return every block that every rank holds by now, parents first, or those of one worker. O(blocks)."""
        return self._core.dump_index(worker_id)

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
            self._admission.load_changed()
            self._metrics.look_at(self._core, now=now)

    def _note_booked(self, reservation: Reservation) -> None:
        if reservation.reservation_id <= self._last_reservation_id:
            return  # asked for again: no new decision
        self._last_reservation_id = reservation.reservation_id
        self._workers.predicted(reservation)
        record = self._core.record(reservation.worker.worker_id)
        self._metrics.chosen(reservation.selection, record, is_booked=True)
        self._note_decision(reservation.selection, reservation.key)

    def _note_decision(self, selection: Selection, booking: AttemptKey | None) -> None:
        self.recent_decisions.put(selection, booking)
        if self._decision_log is not None:
            self._decision_log.put(
                Decision(
                    selection=selection,
                    policy_settings=self._decision_log.policy_settings,
                    at_s=time.time(),
                    booking=booking,
                )
            )

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
