"""The router of another process, and what a processor does while it does not answer.

Bookings, progress and releases share one stream, see Router.Exchange. A router that is not reached within
`waits.router_s`, or that has no answer by then and gives no sign of life for as long again, is done without: workers
are then taken round robin from discovery, unbooked, and counted, at once while the router is suspect. See
`RouterLiveness`.
"""

import asyncio
import itertools
from collections.abc import Sequence

from kvmesh import telemetry
from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.errors import MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey, Epoch, RouterId, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.services.channels import Channels
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.router_exchange_client import RouterExchangeClient
from kvmesh.services.router_liveness import RouterLiveness
from kvmesh.services.routing_port import UNROUTED, Booking
from kvmesh.v1 import router_pb2, router_pb2_grpc
from kvmesh.wire.routing import Progress, progress_to_proto, query_to_proto
from kvmesh.wire.validation import duration

log = telemetry.logger(__name__)

_LOOK_AGAIN_S = 1.0
"""Between two looks at a router that lets a request wait, and lives."""
UNBOOKED_NOTE = "no router answered: round robin, unbooked"
"""Stands in the explanation of a choice that no router made."""
ADMISSION_WAIT = "admission_wait_s"
"""In the metadata of a router's record: how long Reserve may wait for room, in seconds."""


class RemoteRouter:
    """Books with the router that discovery names."""

    def __init__(self, *, peers: Peers, channels: Channels, waits: Waits) -> None:
        """Find the router by `peers`."""
        self._peers = peers
        self._channels = channels
        self._waits = waits
        self._turn = itertools.count()
        self._exchanges: dict[str, RouterExchangeClient] = {}
        self._tasks = OwnedTasks()
        self._liveness = RouterLiveness(channels=channels, wait_s=waits.router_s, current=peers.router_address)

    async def aclose(self) -> None:
        """Stop reporting; bookings that were not released end by their workers' reports."""
        await self._tasks.aclose()
        for exchange in list(self._exchanges.values()):
            await exchange.aclose()
        await self._liveness.aclose()

    async def reserve(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float, explain: bool) -> Booking:
        """See `RoutingPort.reserve`."""
        address = await self._reach()
        if address is None:
            return await self._unbooked(key, query, wait_s=wait_s, explain=explain)
        request = router_pb2.ReserveRequest(
            request_id=key.request_id, attempt=key.attempt, query=query_to_proto(query), explain=explain
        )
        timeout_s = wait_s + self._admission_wait_s() + self._waits.connect_s
        try:
            answer = await self._ask(address, request, timeout_s)
        except MeshError as error:
            if _is_routers_own(error):
                raise
            log.warning("router.lost", error=error.message)
            answer = None
        if answer is None:
            return await self._unbooked(key, query, wait_s=wait_s, explain=explain)
        return Booking(
            key=key,
            worker_id=WorkerId(answer.worker.worker_id),
            epoch=Epoch(answer.worker.epoch),
            overlap_blocks=answer.worker.overlap_blocks,
            router_id=RouterId(answer.router_id),
            reservation_id=answer.reservation_id,
            rank=answer.worker.rank,
            explanation=answer.explanation if explain else None,
        )

    def report_progress(self, progress: Sequence[Progress]) -> None:
        """See `RoutingPort.report_progress`."""
        request = router_pb2.ReportProgressRequest(progress=[progress_to_proto(line) for line in progress])
        self._tell(router_pb2.RouterQuestion(report_progress=request))

    def release(self, booking: Booking, *, cached_tokens: int | None = None) -> None:
        """See `RoutingPort.release`."""
        if booking.router_id != UNROUTED:
            key = router_pb2.ReservationKey(request_id=booking.key.request_id, attempt=booking.key.attempt)
            request = router_pb2.RouterReleaseRequest(key=key, cached_tokens=cached_tokens)
            self._tell(router_pb2.RouterQuestion(release=request))

    def _admission_wait_s(self) -> float:
        """Return how long the router may let a request wait for room, by what it says of itself."""
        records = self._peers.roster.records(WorkerRole.ROUTER)
        try:
            return max((float(record.metadata.get(ADMISSION_WAIT, 0)) for record in records), default=0.0)
        except ValueError:
            return 0.0

    async def _ask(
        self, address: str, request: router_pb2.ReserveRequest, timeout_s: float
    ) -> router_pb2.ReserveResponse | None:
        """Have the router book, however long it may let the request wait; None once it gives no sign of life."""
        question = router_pb2.RouterQuestion(reserve=request, timeout=duration(timeout_s))
        booked = self._exchange(address).ask(question)
        now = asyncio.get_running_loop().time
        until, look_after_s = now() + timeout_s, self._waits.router_s
        try:
            while not (await asyncio.wait([booked], timeout=look_after_s))[0]:
                is_alive = await self._liveness.answers(address)
                look_after_s = max(look_after_s, _LOOK_AGAIN_S)
                if not booked.done() and not (is_alive and now() < until + look_after_s):
                    return None
            return booked.result().reserve
        finally:
            booked.cancel()

    def _tell(self, question: router_pb2.RouterQuestion) -> None:
        """Send what waits for no answer, at once where an exchange is open, so that it keeps its order."""
        address = self._peers.router_address()
        if address is not None and address in self._exchanges:
            self._exchanges[address].tell(question)
        else:
            self._tasks.start(self._tell_later(question), name="router-tell")

    async def _tell_later(self, question: router_pb2.RouterQuestion) -> None:
        address = await self._reach()
        if address is not None:  # else the booking ends by its worker's reports, or with its time
            self._exchange(address).tell(question)

    def _exchange(self, address: str) -> RouterExchangeClient:
        """Return the exchange with the router there, opened on first use."""
        exchange = self._exchanges.get(address)
        if exchange is None:
            exchange = self._exchanges[address] = RouterExchangeClient(
                router_pb2_grpc.RouterStub(self._channels.get(address)).Exchange(),
                write_timeout_s=self._waits.exchange_write_s,
                on_end=lambda ended: self._forget(address, ended),
            )
        return exchange

    def _forget(self, address: str, ended: RouterExchangeClient) -> None:
        if self._exchanges.get(address) is ended:
            del self._exchanges[address]

    async def _reach(self) -> str | None:
        """Return where the router is once it is connected; None when that takes too long, or it is suspect."""
        address = self._peers.router_address()
        if address is None or self._liveness.is_suspect(address):
            return None
        if address in self._exchanges:
            return address
        try:
            async with asyncio.timeout(self._waits.router_s):
                await self._channels.get(address).channel_ready()
        except TimeoutError:
            self._liveness.suspect(address)
            return None
        return address

    async def _unbooked(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float, explain: bool) -> Booking:
        record = await self._next_worker(query, wait_s=wait_s)
        telemetry.UNBOOKED_PICKS.inc()
        explanation = router_pb2.Explanation(
            policy="round_robin", worker_id=record.worker_id, prompt_tokens=query.prompt_tokens, note=UNBOOKED_NOTE
        )
        return Booking(
            key=key,
            worker_id=record.worker_id,
            epoch=record.epoch,
            overlap_blocks=0,
            router_id=UNROUTED,
            reservation_id=0,
            explanation=explanation if explain else None,
        )

    async def _next_worker(self, query: RoutingQuery, *, wait_s: float) -> WorkerRecord:
        """Return the next of those that the hints allow, waiting for one to come."""
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    eligible = [record for record in self._workers(query) if _is_eligible(record, query)]
                    if eligible:
                        return eligible[next(self._turn) % len(eligible)]
                    await self._peers.changed()
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="route_s").inc()
            raise OutOfTimeError(
                Reason.NO_WORKERS, "the router does not answer and discovery names no eligible worker"
            ) from exc

    def _workers(self, query: RoutingQuery) -> Sequence[WorkerRecord]:
        return self._peers.roster.of(WorkerRole.DECODE, query.model)


def _is_routers_own(error: MeshError) -> bool:
    """Tell whether a router said this, and not the wire to it."""
    is_wire = isinstance(error, TryElsewhereError) and error.reason in (Reason.WORKER_LOST, Reason.DRAINING)
    return not is_wire and not isinstance(error, OutOfTimeError)


def _is_eligible(record: WorkerRecord, query: RoutingQuery) -> bool:
    hints = query.hints
    if hints.pinned_worker is not None and record.worker_id != hints.pinned_worker:
        return False
    return (
        not record.draining
        and record.worker_id not in hints.excluded_workers
        and (not hints.allowed_workers or record.worker_id in hints.allowed_workers)
        and all(record.labels.get(name) == value for name, value in hints.required_labels.items())
    )
