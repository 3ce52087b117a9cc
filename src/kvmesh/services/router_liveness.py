"""Whether the router of another process lives: asked where it is slow to answer, and again until it is back.

    trusted -- no sign of life within `wait_s` --> suspect: nobody waits for it
    suspect -- it answers a health check, or another router takes its place --> trusted

Reserve may wait for a worker or for room, so that it has no answer yet says nothing: only a health check does.
"""

import asyncio
import contextvars
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh import telemetry
from kvmesh.services.channels import Channels
from kvmesh.services.owned_tasks import OwnedTasks

log = telemetry.logger(__name__)

_LOOK_AGAIN_S = 0.5
_NO_ANSWER = frozenset({grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


class RouterLiveness:
    """Looks at one router at a time, however many ask."""

    def __init__(self, *, channels: Channels, wait_s: float, current: Callable[[], str | None]) -> None:
        """Give a router `wait_s` for a sign of life; `current` says where the router is that counts."""
        self._channels = channels
        self._wait_s = wait_s
        self._current = current
        self._suspect: str | None = None
        self._looks: dict[str, asyncio.Future[bool]] = {}
        self._tasks = OwnedTasks()

    async def aclose(self) -> None:
        """Stop looking."""
        await self._tasks.aclose()

    def is_suspect(self, address: str) -> bool:
        """Tell whether the router there gave no sign of life when it was asked last."""
        return address == self._suspect

    def suspect(self, address: str) -> None:
        """Wait for nobody there until it answers again. Idempotent."""
        if address != self._suspect and address == self._current():
            self._suspect = address
            telemetry.WAIT_ENDED.labels(wait="router_s").inc()
            log.warning("router.suspect", address=address)
            # A context of its own: its log lines do not belong to the request that found out.
            contextvars.Context().run(lambda: self._tasks.start(self._watch(address), name="router-watch"))

    async def answers(self, address: str) -> bool:
        """Ask the router there for a sign of life; it is suspect from then on if it gives none."""
        look = self._looks.get(address)
        if look is None:
            look = self._looks[address] = asyncio.get_running_loop().create_future()
            self._tasks.start(self._look(address, look), name="router-look")
        is_alive = await asyncio.shield(look)
        if not is_alive:
            self.suspect(address)
        return is_alive

    async def _look(self, address: str, look: "asyncio.Future[bool]") -> None:
        is_alive = False
        try:
            is_alive = await self._is_alive(address)
        finally:
            del self._looks[address]
            look.set_result(is_alive)

    async def _watch(self, address: str) -> None:
        while address == self._suspect == self._current():
            await asyncio.sleep(_LOOK_AGAIN_S)
            if await self._is_alive(address):
                log.info("router.back", address=address)
                break
        else:
            successor = self._current()
            log.info("router.gone" if successor is None else "router.replaced", address=address, successor=successor)
        if address == self._suspect:
            self._suspect = None

    async def _is_alive(self, address: str) -> bool:
        """Any answer will do: one that is draining still books."""
        stub = health_pb2_grpc.HealthStub(self._channels.get(address))
        try:
            await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=self._wait_s)
        except grpc.aio.AioRpcError as exc:
            return exc.code() not in _NO_ANSWER
        return True
