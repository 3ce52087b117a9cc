"""The router as a processor sees it, in its own process or behind the Router service."""

from collections.abc import Sequence
from typing import Protocol

from kvmesh.core.candidates import RoutingQuery, Selection
from kvmesh.core.ids import AttemptKey, RouterId
from kvmesh.core.reservations import Reservation
from kvmesh.wire.routing import Progress


class RoutingPort(Protocol):
    """Books workers. The processor owns what it books and releases it."""

    @property
    def router_id(self) -> RouterId:
        """The name under which workers report this router's load."""

    async def reserve(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float) -> Reservation:
        """Choose a worker and book it, waiting up to `wait_s` for one to be eligible."""

    def explain_booked(self, reservation: Reservation) -> Selection:
        """Return the selection behind a reservation, with every candidate."""

    def report_progress(self, progress: Sequence[Progress]) -> object:
        """Say how bookings go on."""

    def release(self, key: AttemptKey) -> bool:
        """End a booking; False if it had ended. Raises: NotKnownError if it was never seen."""
