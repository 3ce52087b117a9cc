"""The gateway: the frontend's gRPC and HTTP doors, and behind them the processor and the router, here or elsewhere."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from kvmesh import telemetry
from kvmesh.core.roster import WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.discovery.discovery import Discovery
from kvmesh.gateway.app import HttpApp, create_app
from kvmesh.gateway.server import HttpServer
from kvmesh.runtime.component_routes import ComponentRoutes
from kvmesh.runtime.processor_role import ProcessorPart, Tokenizers
from kvmesh.runtime.role import Listen, Service, stop_all
from kvmesh.runtime.router_role import RouterPart
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.channels import Channels
from kvmesh.services.components import Components
from kvmesh.services.forwarded import ForwardedService
from kvmesh.services.frontend import Frontend
from kvmesh.services.local_calls import LocalServers
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.peers import Peers
from kvmesh.services.processor import Processor
from kvmesh.services.queue_locator import QueueLocator
from kvmesh.services.remote_processor import RemoteProcessor
from kvmesh.services.router_views import LocalRouterView, RemoteRouterView
from kvmesh.services.topology import TopologyView
from kvmesh.services.totals_views import LocalTotals, RemoteTotals
from kvmesh.services.worker_control import ForwardedWorkerControl
from kvmesh.v1 import (
    components_pb2,
    components_pb2_grpc,
    frontend_pb2,
    frontend_pb2_grpc,
    prefill_queue_pb2,
    router_pb2,
    router_pb2_grpc,
    worker_control_pb2,
    worker_control_pb2_grpc,
)

log = telemetry.logger(__name__)

_STREAMS_END_S = 1.0
_LOOK_AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class Doors:
    """Where clients come in."""

    grpc: Listen
    http: Listen
    max_body_bytes: int
    """Longest HTTP body."""
    max_request_bytes: int
    """Longest gRPC request."""
    grpc_flag: str = "--grpc-port"
    """The option that chooses the gRPC port."""


class GatewayRole:
    """What clients reach."""

    def __init__(
        self,
        *,
        name: str,
        discovery: Discovery,
        namespace: str,
        router: RouterPart | None,
        tokenizers: Tokenizers | None,
        doors: Doors,
        waits: Waits,
        merge_within_s: float,
        local: LocalServers | None = None,
    ) -> None:
        """Process requests here with `tokenizers`, or at the processors of discovery where that is None.

        They are routed by `router`, or by the one that discovery names where that is None. `local` knows the workers of
        this process.
        """
        self.name = name
        self._doors = doors
        self._waits = waits
        self._channels = Channels()
        self._peers = Peers(discovery, namespace=namespace, channels=self._channels)
        self._queues = QueueLocator(peers=self._peers, channels=self._channels)
        self._router = router
        self._part: ProcessorPart | None = None
        self._generator: Processor | RemoteProcessor
        if tokenizers is None:
            self._generator = RemoteProcessor(peers=self._peers, channels=self._channels, waits=waits)
        else:
            self._part = ProcessorPart(
                router=router,
                peers=self._peers,
                channels=self._channels,
                tokenizers=tokenizers,
                waits=waits,
                merge_within_s=merge_within_s,
                local=local,
            )
            self._generator = self._part.processor
        self._topology = TopologyView(
            router=(
                RemoteRouterView(peers=self._peers, channels=self._channels)
                if router is None
                else LocalRouterView(router.router)
            ),
            totals=(
                RemoteTotals(peers=self._peers, channels=self._channels)
                if self._part is None
                else LocalTotals(self._part.processor.totals)
            ),
            peers=self._peers,
            channels=self._channels,
        )
        self._frontend = Frontend(
            generator=self._generator, topology=self._topology.refreshed, request_timeout_s=waits.request_s
        )
        self._components = Components(self._peers, namespace=namespace)
        self._server = GrpcServer(client_write_s=waits.client_write_s, max_request_bytes=doors.max_request_bytes)
        self._services = self._build_services()
        for service in self._services:
            self._server.add(*service)
        self._http_app = self._build_http_app()
        self._component_routes = ComponentRoutes(
            peers=self._peers,
            channels=self._channels,
            rest=self._http_app.rest,
            server=self._server,
            request_s=waits.request_s,
        )
        self._http: HttpServer | None = None

    @property
    def router(self) -> LocalRouter:
        """The router of this process. Raises: RuntimeError where it runs elsewhere."""
        if self._router is None:
            raise RuntimeError("the router runs in another process")
        return self._router.router

    @property
    def processor(self) -> Processor:
        """The processor of this process. Raises: RuntimeError where it runs elsewhere."""
        if self._part is None:
            raise RuntimeError("the processor runs in another process")
        return self._part.processor

    @property
    def address(self) -> str:
        """HOST:PORT of the gRPC door, once started."""
        return self._server.address

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP door, once started. Raises: RuntimeError before."""
        if self._http is None:
            raise RuntimeError("the gateway was not started: it has no address")
        return self._http.address

    async def start(self) -> None:
        """Listen on both doors. Raises: PortTakenError, OSError."""
        doors = self._doors
        self._peers.start()
        if self._router is not None:
            self._router.start()
        self._generator.start()
        self._http = HttpServer(self._http_app, host=doors.http.host, port=doors.http.port)
        await self._http.start()
        await self._server.start(doors.grpc.host, doors.grpc.port, flag=doors.grpc_flag)
        self._topology.start()
        self._component_routes.start()
        self._components.start()

    def topology(self) -> frontend_pb2.Topology:
        """Return the mesh as it is known now."""
        return self._topology.now()

    async def refreshed_topology(self) -> frontend_pb2.Topology:
        """Return the mesh as it is now."""
        return await self._topology.refreshed()

    async def wait_routed(self, full_names: Iterable[str]) -> None:
        """Wait until these services of components are served at the doors; not bounded here."""
        await self._component_routes.wait_routed(full_names)

    async def wait_ready(self) -> None:
        """Wait until a request could be served."""
        while self._unready_reason() is not None:
            await self._changed()

    async def _changed(self) -> None:
        """Wait for news of the workers, of discovery or of the router."""
        soon = asyncio.get_running_loop().time() + _LOOK_AGAIN_S  # discovery may tell the peers after the router
        if self._router is None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(soon):  # of a connection that comes back nobody tells
                    await self._peers.changed()
            return
        await self._router.router.changed(until=soon)

    async def stop(self) -> None:
        """Take nothing new, let running requests end within the drain's bound, close the doors and what they used."""
        ends = [self._drain, self._close_http, self._close_grpc, self._topology.aclose, self._component_routes.aclose]
        ends.append(self._part.aclose if self._part is not None else self._generator.aclose)
        if self._router is not None:
            ends.append(self._router.aclose)
        await stop_all((*ends, self._peers.aclose, self._channels.aclose))

    async def _drain(self) -> None:
        self._server.health.drain()
        drain_s = self._waits.drain_s
        await asyncio.gather(self._generator.drain(drain_s), self._component_routes.drain(drain_s))
        self._frontend.close()
        await self._components.aclose()
        if self._router is not None:
            self._router.close_streams()

    async def _close_http(self) -> None:
        if self._http is not None:
            await self._http.stop(_STREAMS_END_S)

    async def _close_grpc(self) -> None:
        await self._server.drain_and_stop(_STREAMS_END_S)

    def _build_services(self) -> tuple[Service, ...]:
        control = ForwardedWorkerControl(
            find=self._peers.roster.get, channels=self._channels, drain_s=self._waits.drain_s
        )
        return (
            Service(
                self._frontend,
                frontend_pb2.DESCRIPTOR.services_by_name["Frontend"],
                frontend_pb2_grpc.add_FrontendServicer_to_server,
            ),
            Service(
                self._components,
                components_pb2.DESCRIPTOR.services_by_name["Components"],
                components_pb2_grpc.add_ComponentsServicer_to_server,
            ),
            *((self._part.service,) if self._part is not None else ()),
            self._router.service if self._router is not None else self._forwarded_router(),
            Service(
                control,
                worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"],
                worker_control_pb2_grpc.add_WorkerControlServicer_to_server,
            ),
        )

    def _forwarded_router(self) -> Service:
        descriptor = router_pb2.DESCRIPTOR.services_by_name["Router"]
        return Service(
            ForwardedService(descriptor, address=self._peers.router_address, channels=self._channels),
            descriptor,
            router_pb2_grpc.add_RouterServicer_to_server,
        )

    def _build_http_app(self) -> HttpApp:
        queue = prefill_queue_pb2.DESCRIPTOR.services_by_name["PrefillQueue"]
        return create_app(
            services=[
                *((service.descriptor, service.servicer) for service in self._services),
                (queue, ForwardedService(queue, address=self._queues.address, channels=self._channels)),
            ],
            generator=self._generator,
            unready_reason=self._unready_reason,
            max_body_bytes=self._doors.max_body_bytes,
            request_timeout_s=self._waits.request_s,
            client_write_s=self._waits.client_write_s,
        )

    def _unready_reason(self) -> str | None:
        if self._generator.draining:
            return "draining"
        if isinstance(self._generator, RemoteProcessor) and not self._generator.reaches_any():
            return "no processor is reached" if self._peers.processor_addresses() else "no processor is known"
        takers = [record for record in self._peers.roster.records(WorkerRole.DECODE) if not record.draining]
        if not takers:
            return "no decode worker takes requests"
        if self._part is not None:  # a record outlives its worker by the store's time to live
            takers = [record for record in takers if self._part.processor.reaches(record)]
            if not takers:
                return "no decode worker is reached"
        if self._router is None:
            return None
        reached = {record.worker_id for record in takers}
        workers = [one for one in self._router.router.workers() if one.worker.worker_id in reached]
        reported = any(one.report is not None for one in workers if not one.record.draining)
        return None if reported else "no decode worker has reported its load"
