"""The router: as a part of another role's process, or served by one of its own."""

import random
import secrets
from dataclasses import dataclass

from kvmesh.core.admission import AdmissionRules
from kvmesh.core.ids import RouterId, WorkerId
from kvmesh.core.index_port import CacheIndex
from kvmesh.core.policies.policy import Policy
from kvmesh.core.roster import WorkerRole
from kvmesh.core.routing import RoutingRules
from kvmesh.core.waits import Waits
from kvmesh.discovery.discovery import Discovery
from kvmesh.runtime.role import Announcement, Listen, Service, stop_all
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.decision_log import DecisionLog
from kvmesh.services.local_calls import LocalServers
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.remote_router import ADMISSION_WAIT
from kvmesh.services.router import Router
from kvmesh.v1 import router_pb2, router_pb2_grpc

_STREAMS_END_S = 1.0


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """How a router chooses and books."""

    policy: Policy
    rules: RoutingRules
    reservation_ttl_s: float
    waits: Waits
    """How long Reserve waits for a worker where there is none, and an exchange for a client that does not read."""
    admission: AdmissionRules
    """How long it waits for one with room where all are overloaded."""
    index: CacheIndex
    """Of the kind that the rules name."""
    decision_log: DecisionLog | None
    """Where its decisions are written; None = nowhere."""
    seed: int | None
    """Makes the picks repeatable; None = drawn at the start."""


class RouterPart:
    """A router and its service."""

    def __init__(
        self, plan: RouterPlan, *, namespace: str, discovery: Discovery, local: LocalServers | None = None
    ) -> None:
        """Follow the workers of one namespace, from `start` on; `local` knows those of this process."""
        self.router = LocalRouter(
            discovery=discovery,
            namespace=namespace,
            router_id=RouterId(f"router-{secrets.token_hex(8)}"),
            policy=plan.policy,
            rng=random.Random(plan.seed),
            rules=plan.rules,
            reservation_ttl_s=plan.reservation_ttl_s,
            admission=plan.admission,
            index=plan.index,
            decision_log=plan.decision_log,
            local=local,
        )
        self._servicer = Router(self.router, waits=plan.waits)

    @property
    def service(self) -> Service:
        """Router."""
        return Service(
            self._servicer,
            router_pb2.DESCRIPTOR.services_by_name["Router"],
            router_pb2_grpc.add_RouterServicer_to_server,
        )

    def start(self) -> None:
        """Begin to follow the workers."""
        self.router.start()

    def close_streams(self) -> None:
        """End every watch, so that the server can stop. Idempotent."""
        self._servicer.close()

    async def aclose(self) -> None:
        """Follow nobody any more."""
        await self.router.aclose()


class RouterRole:
    """A router of its own process."""

    def __init__(
        self,
        plan: RouterPlan,
        *,
        worker_id: WorkerId,
        namespace: str,
        discovery: Discovery,
        listen: Listen,
        local: LocalServers | None = None,
    ) -> None:
        """Serve from `start` on."""
        self._announcement = Announcement(
            worker_id,
            WorkerRole.ROUTER,
            namespace=namespace,
            discovery=discovery,
            metadata={ADMISSION_WAIT: repr(plan.admission.wait_s)},
        )
        self._part = RouterPart(plan, namespace=namespace, discovery=discovery, local=local)
        self._listen = listen
        self._server = GrpcServer()
        self._server.add(*self._part.service)

    @property
    def name(self) -> str:
        """Its id."""
        return self._announcement.identity.worker_id

    @property
    def address(self) -> str:
        """HOST:PORT, once started."""
        return self._announcement.identity.address

    async def start(self) -> None:
        """Listen, follow the workers, be found. Raises: PortTakenError, or what discovery raises."""
        bound = await self._server.start(self._listen.host, self._listen.port, flag="--port")
        self._part.start()
        await self._announcement.announce(self._listen.address(bound))

    async def wait_ready(self) -> None:
        """Wait until it is found: who asks before there is a worker waits for one, in bounded time."""
        await self._announcement.wait_announced()

    async def stop(self) -> None:
        """Withdraw, end the streams, close. Idempotent."""
        await stop_all((self._announcement.withdraw, self._close, self._part.aclose))

    async def _close(self) -> None:
        self._server.health.drain()
        self._part.close_streams()
        await self._server.drain_and_stop(_STREAMS_END_S)
