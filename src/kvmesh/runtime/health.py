"""grpc.health.v1 per service name.

The servicer of grpcio-health-checking is not used: its Watch streams outlive a shutdown, so that one watcher makes
every stop last its whole grace period, and its `set` awaits the slowest watcher. Here a change is a plain call, and
watchers end when the server does.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.core.errors import NotKnownError, Reason, TryElsewhereError

LIVENESS = "liveness"
"""Name that is SERVING as long as the process answers, through a drain too: a restart would cut what may still end."""
SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking has no types
    """Which services serve; "" is the process itself, never derived from the others.

    A watcher always gets the latest state; states that came and went while it was being written to are skipped.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {LIVENESS: _Response.SERVING}
        self._serving: dict[str, bool] = {}
        """What `set_serving` was told, a drain aside."""
        self._draining = False
        self._closed = False
        self._changed = asyncio.Event()
        """Set at the next change, which then puts a new event here."""

    def set_serving(self, service: str, serving: bool) -> None:
        """Make a service known and tell whether it serves; it is NOT_SERVING after `drain`, until `undrain`."""
        self._serving[service] = serving
        wanted = _Response.SERVING if serving and not self._draining else _Response.NOT_SERVING
        self._statuses[service] = wanted
        self._notify()

    def drain(self) -> None:
        """Report NOT_SERVING for every service but the liveness. Idempotent."""
        self._draining = True
        self._statuses = {
            service: status if service == LIVENESS else _Response.NOT_SERVING
            for service, status in self._statuses.items()
        }
        self._notify()

    def undrain(self) -> None:
        """Report again what `set_serving` was told. Idempotent."""
        self._draining = False
        for service, serving in self._serving.items():
            self.set_serving(service, serving)

    def close(self) -> None:
        """End every watch after its last status. Idempotent."""
        self._closed = True
        self._notify()

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the status of every registered service."""
        statuses = {service: _Response(status=status) for service, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the status of a service. Raises: NotKnownError(NOT_FOUND) if it is not registered."""
        status = self._statuses.get(request.service)
        if status is None:
            raise NotKnownError(Reason.NOT_FOUND, f"no service named {request.service!r} is served here")
        return _Response(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream the status of a service at once and at each change; SERVICE_UNKNOWN until it is registered."""
        sent = None
        while True:
            changed = self._changed  # before the status is read: a change during the yield must not be missed
            status = self._statuses.get(request.service, _Response.SERVICE_UNKNOWN)
            if status != sent:
                yield _Response(status=status)
                sent = status
            elif self._closed:
                raise TryElsewhereError(Reason.DRAINING, "the server is stopping")
            else:
                await changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
