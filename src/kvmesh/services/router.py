"""Router: the gRPC service in front of a LocalRouter."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

import grpc

from kvmesh.core.candidates import RoutingQuery, Selection
from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey, WorkerId
from kvmesh.core.reservations import Reservation
from kvmesh.core.waits import Waits
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.recent_decisions import MAX_DECISIONS
from kvmesh.services.router_exchange import RouterExchange, WaitToReserve
from kvmesh.services.router_metrics import observe_stage
from kvmesh.v1 import router_pb2, router_pb2_grpc
from kvmesh.wire import routing, routing_answers
from kvmesh.wire.validation import invalid, seconds

if TYPE_CHECKING:
    from kvmesh.v1.router_pb2_grpc import _ServicerContext as Context

_DEFAULT_INTERVAL_S = 1.0
_MIN_INTERVAL_S = 0.1
_DEFAULT_DECISIONS = 16
_DEFAULT_CANDIDATES = 8
_MAX_CANDIDATES = 64
_ANSWER_MARGIN_S = 0.1
"""Of the caller's deadline: so much earlier a wait ends, so that the caller learns why."""


class Router(router_pb2_grpc.RouterServicer):
    """Serves one router to other processes."""

    def __init__(self, router: LocalRouter, *, waits: Waits) -> None:
        """Serve `router`; `waits` bounds Reserve where there is no worker, and an exchange that nobody reads."""
        self._router = router
        self._waits = waits
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End every watch, so that the server can stop. Idempotent."""
        self._closing.set()
        self._router.recent_decisions.close()

    async def Select(self, request: router_pb2.SelectRequest, context: "Context") -> router_pb2.SelectResponse:
        """See the contract."""
        return self._select(request)

    async def Reserve(self, request: router_pb2.ReserveRequest, context: "Context") -> router_pb2.ReserveResponse:
        """See the contract."""
        begun = self._begin_reserve(request, context.time_remaining())
        return begun if isinstance(begun, router_pb2.ReserveResponse) else await begun()

    async def ReportProgress(
        self, request: router_pb2.ReportProgressRequest, context: "Context"
    ) -> router_pb2.ReportProgressResponse:
        """See the contract."""
        return self._report_progress(request)

    async def Release(
        self, request: router_pb2.RouterReleaseRequest, context: "Context"
    ) -> router_pb2.RouterReleaseResponse:
        """See the contract."""
        return self._release(request)

    async def Exchange(  # type: ignore[override]  # the stub's base is synchronous
        self,
        request_iterator: AsyncIterator[router_pb2.RouterExchangeRequest],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> None:
        """See the contract."""
        exchange = RouterExchange(
            self._answer_at_once, self._begin_reserve, write_timeout_s=self._waits.exchange_write_s
        )
        await exchange.run(request_iterator, context, closing=self._closing)

    async def Explain(self, request: router_pb2.ExplainRequest, context: "Context") -> router_pb2.ExplainResponse:
        """See the contract."""
        selection = self._router.explain(self._query(request.query))
        return router_pb2.ExplainResponse(explanation=routing_answers.explanation_to_proto(selection))

    async def ListWorkers(
        self, request: router_pb2.ListWorkersRequest, context: "Context"
    ) -> router_pb2.ListWorkersResponse:
        """See the contract."""
        return router_pb2.ListWorkersResponse(
            workers=self._workers(),
            policy=self._router.policy_name,
            index=self._router.index_mode.value,
            admission_waiting=self._router.waiting,
        )

    async def GetPotentialLoads(
        self, request: router_pb2.GetPotentialLoadsRequest, context: "Context"
    ) -> router_pb2.GetPotentialLoadsResponse:
        """See the contract."""
        loads = self._router.potential_loads(self._query(request.query))
        return router_pb2.GetPotentialLoadsResponse(
            loads=[routing_answers.potential_load_to_proto(load) for load in loads]
        )

    async def GetOverlaps(
        self, request: router_pb2.GetOverlapsRequest, context: "Context"
    ) -> router_pb2.GetOverlapsResponse:
        """See the contract."""
        overlaps = self._router.overlaps(self._query(request.query))
        response = router_pb2.GetOverlapsResponse()
        for worker, blocks in sorted(overlaps.items()):
            record = self._router.find(worker.worker_id)
            if blocks and record is not None:
                response.overlaps.add(
                    worker_id=worker.worker_id, rank=worker.rank, blocks=blocks, block_size=record.block_size
                )
        return response

    async def WatchMetrics(
        self, request: router_pb2.WatchMetricsRequest, context: "Context"
    ) -> AsyncIterator[router_pb2.WatchMetricsResponse]:
        """See the contract."""
        interval_s = _DEFAULT_INTERVAL_S
        if request.HasField("interval"):
            interval_s = seconds(request.interval, path="interval", low=_MIN_INTERVAL_S)
        while not self._closing.is_set():
            yield router_pb2.WatchMetricsResponse(workers=self._workers())
            try:
                async with asyncio.timeout(interval_s):
                    await self._closing.wait()
            except TimeoutError:
                continue

    async def WatchDecisions(
        self, request: router_pb2.WatchDecisionsRequest, context: "Context"
    ) -> AsyncIterator[router_pb2.WatchDecisionsResponse]:
        """See the contract."""
        interval_s = _DEFAULT_INTERVAL_S
        if request.HasField("interval"):
            interval_s = seconds(request.interval, path="interval", low=_MIN_INTERVAL_S)
        watch = self._router.recent_decisions.watch(
            interval_s=interval_s,
            max_decisions=_bounded(
                request.max_decisions, path="max_decisions", default=_DEFAULT_DECISIONS, high=MAX_DECISIONS
            ),
            max_candidates=_bounded(
                request.max_candidates, path="max_candidates", default=_DEFAULT_CANDIDATES, high=_MAX_CANDIDATES
            ),
        )
        async with aclosing(watch) as responses:
            async for response in responses:
                yield response

    async def DumpIndex(
        self, request: router_pb2.DumpIndexRequest, context: "Context"
    ) -> AsyncIterator[router_pb2.DumpIndexResponse]:
        """See the contract. What it streams is the index at one moment."""
        held = self._router.dump_index(WorkerId(request.worker_id) if request.worker_id else None)
        for response in routing_answers.index_entries(held):
            yield response

    def _answer_at_once(self, question: router_pb2.RouterQuestion, answer: router_pb2.RouterAnswer) -> None:
        match question.WhichOneof("question"):
            case "select":
                answer.select.CopyFrom(self._select(question.select))
            case "report_progress":
                answer.report_progress.CopyFrom(self._report_progress(question.report_progress))
            case "release":
                answer.release.CopyFrom(self._release(question.release))
            case other:
                raise AssertionError(f"{other} is answered elsewhere")

    def _select(self, request: router_pb2.SelectRequest) -> router_pb2.SelectResponse:
        selection = self._router.select(self._query(request.query))
        return router_pb2.SelectResponse(worker=self._selected(selection))

    def _begin_reserve(
        self, request: router_pb2.ReserveRequest, remaining_s: float | None
    ) -> router_pb2.ReserveResponse | WaitToReserve:
        """Book, or return how to wait for it: within `remaining_s`, None = no bound, in time to say how it ended."""
        key, query = routing.key_from_proto(request.request_id, request.attempt), self._query(request.query)
        reservation = self._router.reserve_at_once(key, query, wait_s=self._waits.route_s)
        if reservation is not None:
            return self._reserved(request, reservation)
        return partial(self._wait_to_reserve, request, key, query, remaining_s)

    async def _wait_to_reserve(
        self, request: router_pb2.ReserveRequest, key: AttemptKey, query: RoutingQuery, remaining_s: float | None
    ) -> router_pb2.ReserveResponse:
        until = _before_deadline(remaining_s)
        return self._reserved(request, await self._router.reserve(key, query, wait_s=self._waits.route_s, until=until))

    def _reserved(self, request: router_pb2.ReserveRequest, reservation: Reservation) -> router_pb2.ReserveResponse:
        response = router_pb2.ReserveResponse(
            worker=self._selected(reservation.selection),
            router_id=self._router.router_id,
            reservation_id=reservation.reservation_id,
        )
        if request.explain:
            response.explanation.CopyFrom(
                routing_answers.explanation_to_proto(self._router.explain_booked(reservation))
            )
        return response

    def _report_progress(self, request: router_pb2.ReportProgressRequest) -> router_pb2.ReportProgressResponse:
        progress = [
            routing.progress_from_proto(line, path=f"progress[{index}].") for index, line in enumerate(request.progress)
        ]
        unknown = self._router.report_progress(progress)
        return router_pb2.ReportProgressResponse(
            unknown=[router_pb2.ReservationKey(request_id=key.request_id, attempt=key.attempt) for key in unknown]
        )

    def _release(self, request: router_pb2.RouterReleaseRequest) -> router_pb2.RouterReleaseResponse:
        key = routing.key_from_proto(request.key.request_id, request.key.attempt, path="key.")
        has_said = request.HasField("cached_tokens")
        self._router.release(key, cached_tokens=request.cached_tokens if has_said else None)
        return router_pb2.RouterReleaseResponse()

    def _query(self, query: router_pb2.RoutingQuery) -> RoutingQuery:
        began = time.perf_counter()
        made = routing.query_from_proto(query, block_sizes=self._router.block_sizes(query.model))
        observe_stage("hash", time.perf_counter() - began)
        return made

    def _selected(self, selection: Selection) -> router_pb2.SelectedWorker:
        record = self._router.find(selection.worker.worker_id)
        if record is None or record.epoch != selection.epoch:
            raise TryElsewhereError(Reason.WORKER_LOST, f"{selection.worker.worker_id} has just gone")
        return routing_answers.selected_worker_to_proto(selection, record)

    def _workers(self) -> list[router_pb2.RouterWorker]:
        return [routing_answers.router_worker_to_proto(worker) for worker in self._router.workers()]


def _bounded(value: int, *, path: str, default: int, high: int) -> int:
    if value > high:
        raise invalid(path, f"{value} is out of range: 1 to {high}")
    return value or default


def _before_deadline(remaining_s: float | None) -> float | None:
    """Return the moment until which an answer still reaches the caller, on the loop's clock; None = no bound."""
    if remaining_s is None:
        return None
    return asyncio.get_running_loop().time() + max(remaining_s - _ANSWER_MARGIN_S, 0.0)
