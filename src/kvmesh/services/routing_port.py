"""The router as a processor sees it, in its own process or behind the Router service."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.errors import NotKnownError
from kvmesh.core.ids import AttemptKey, Epoch, RouterId, WorkerId
from kvmesh.services.local_router import LocalRouter
from kvmesh.v1 import router_pb2
from kvmesh.wire.routing import Progress
from kvmesh.wire.routing_answers import explanation_to_proto

UNROUTED = RouterId("")
"""Whose load is reported that no router booked."""


@dataclass(frozen=True, slots=True)
class Booking:
    """A booked worker, as far as a processor needs to know it."""

    key: AttemptKey
    worker_id: WorkerId
    epoch: Epoch
    overlap_blocks: int
    """Leading prompt blocks expected in its cache."""
    router_id: RouterId
    """Who booked it; UNROUTED: nobody did."""
    reservation_id: int
    """Its number in that router's books; 0 when UNROUTED."""
    rank: int | None = None
    """Data-parallel rank that was booked; None when UNROUTED: the worker chooses."""
    explanation: router_pb2.Explanation | None = None
    """Every candidate with every term, where it was asked for."""


class RoutingPort(Protocol):
    """Books workers. The processor owns what it books and releases it."""

    async def reserve(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float, explain: bool) -> Booking:
        """Choose a worker and book it, waiting up to `wait_s` for one to be eligible."""

    def report_progress(self, progress: Sequence[Progress]) -> None:
        """Say how bookings go on."""

    def release(self, booking: Booking, *, cached_tokens: int | None = None) -> None:
        """End a booking; the worker had so many of the prompt's tokens cached, None = it did not say. Idempotent."""


class InProcessRouting:
    """The router of the same process: library calls."""

    def __init__(self, router: LocalRouter) -> None:
        """Book with `router`."""
        self._router = router

    async def reserve(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float, explain: bool) -> Booking:
        """See `RoutingPort.reserve`."""
        reservation = await self._router.reserve(key, query, wait_s=wait_s)
        return Booking(
            key=key,
            worker_id=reservation.worker.worker_id,
            epoch=reservation.epoch,
            overlap_blocks=reservation.overlap_blocks,
            router_id=self._router.router_id,
            reservation_id=reservation.reservation_id,
            rank=reservation.worker.rank,
            explanation=explanation_to_proto(self._router.explain_booked(reservation)) if explain else None,
        )

    def report_progress(self, progress: Sequence[Progress]) -> None:
        """See `RoutingPort.report_progress`; what has ended meanwhile is no news."""
        self._router.report_progress(progress)

    def release(self, booking: Booking, *, cached_tokens: int | None = None) -> None:
        """See `RoutingPort.release`."""
        try:
            self._router.release(booking.key, cached_tokens=cached_tokens)
        except NotKnownError:
            return  # it expired, or ended with its worker
