"""The gateway: frontend, processor and router in one process part, with a gRPC and an HTTP door."""

import random
import secrets
from collections.abc import Mapping

from kvmesh import telemetry
from kvmesh.core.ids import RouterId
from kvmesh.core.policies.policy import Policy
from kvmesh.core.roster import WorkerRole
from kvmesh.core.routing import RoutingRules
from kvmesh.core.waits import Waits
from kvmesh.discovery.discovery import Discovery
from kvmesh.gateway.app import create_app
from kvmesh.gateway.server import HttpServer
from kvmesh.runtime.server import GrpcServer
from kvmesh.runtime.worker import Service
from kvmesh.services.channels import Channels
from kvmesh.services.exchange_client import ExchangePool
from kvmesh.services.forwarded_queue import ForwardedQueue
from kvmesh.services.frontend import Frontend
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.peers import Peers
from kvmesh.services.processor import Processor
from kvmesh.services.processor_service import Processor as ProcessorService
from kvmesh.services.router import Router
from kvmesh.services.routing_port import InProcessRouting
from kvmesh.services.topology import TopologyView
from kvmesh.services.worker_control import ForwardedWorkerControl
from kvmesh.tokenizing.tokenizer import Tokenizer
from kvmesh.v1 import (
    frontend_pb2,
    frontend_pb2_grpc,
    prefill_queue_pb2,
    processor_pb2,
    processor_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    worker_control_pb2,
    worker_control_pb2_grpc,
)

log = telemetry.logger(__name__)

_STREAMS_END_S = 1.0


class GatewayRole:
    """What clients reach."""

    def __init__(
        self,
        *,
        discovery: Discovery,
        namespace: str,
        policy: Policy,
        rules: RoutingRules,
        reservation_ttl_s: float,
        seed: int | None,
        tokenizers: Mapping[str, Tokenizer | None],
        waits: Waits,
        max_body_bytes: int,
    ) -> None:
        """Serve the models of `tokenizers`; `seed` makes the router's picks repeatable."""
        self._waits = waits
        self._channels = Channels()
        self._peers = Peers(discovery, namespace=namespace)
        name = secrets.token_hex(8)
        self.router = LocalRouter(
            discovery=discovery,
            namespace=namespace,
            router_id=RouterId(f"router-{name}"),
            policy=policy,
            rng=random.Random(seed),
            rules=rules,
            reservation_ttl_s=reservation_ttl_s,
        )
        self.processor = Processor(
            router=InProcessRouting(self.router),
            peers=self._peers,
            exchanges=ExchangePool(processor_id=f"processor-{name}", channels=self._channels, waits=waits),
            tokenizers=tokenizers,
            waits=waits,
        )
        self._topology = TopologyView(
            router=self.router, peers=self._peers, channels=self._channels, totals=lambda: self.processor.totals
        )
        self._frontend = Frontend(
            generator=self.processor, topology=self._topology.refreshed, request_timeout_s=waits.request_s
        )
        self._router_service = Router(self.router, route_wait_s=waits.route_s)
        self._max_body_bytes = max_body_bytes
        self._server = GrpcServer()
        self._services = self._build_services()
        for service in self._services:
            self._server.add(*service)
        self._http: HttpServer | None = None

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC door, once started."""
        return self._server.address

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP door, once started. Raises: RuntimeError before."""
        if self._http is None:
            raise RuntimeError("the gateway was not started: it has no address")
        return self._http.address

    async def start(self, *, grpc_host: str, grpc_port: int, http_host: str, http_port: int) -> None:
        """Listen on both doors. Raises: PortTakenError, OSError."""
        self._peers.start()
        self.router.start()
        self.processor.start()
        self._http = HttpServer(self._app(), host=http_host, port=http_port)
        await self._http.start()
        await self._server.start(grpc_host, grpc_port)
        self._topology.start()

    def topology(self) -> frontend_pb2.Topology:
        """Return the mesh as it is known now."""
        return self._topology.now()

    async def refreshed_topology(self) -> frontend_pb2.Topology:
        """Return the mesh with the queue's counts as they are now."""
        return await self._topology.refreshed()

    async def wait_ready(self) -> None:
        """Wait until the router knows a decode worker that has reported its load."""
        while self._unready_reason() is not None:
            await self.router.changed()

    async def stop(self) -> None:
        """Take nothing new, let running requests end within the drain's bound, close the doors and what they used."""
        self._server.health.drain()
        await self.processor.drain(self._waits.drain_s)
        self._frontend.close()
        self._router_service.close()
        if self._http is not None:
            await self._http.stop(_STREAMS_END_S)
        await self._server.drain_and_stop(_STREAMS_END_S)
        await self._topology.aclose()
        await self.processor.aclose()
        await self.router.aclose()
        await self._peers.aclose()
        await self._channels.aclose()

    def _build_services(self) -> tuple[Service, ...]:
        return (
            Service(
                self._frontend,
                frontend_pb2.DESCRIPTOR.services_by_name["Frontend"],
                frontend_pb2_grpc.add_FrontendServicer_to_server,
            ),
            Service(
                ProcessorService(self.processor),
                processor_pb2.DESCRIPTOR.services_by_name["Processor"],
                processor_pb2_grpc.add_ProcessorServicer_to_server,
            ),
            Service(
                self._router_service,
                router_pb2.DESCRIPTOR.services_by_name["Router"],
                router_pb2_grpc.add_RouterServicer_to_server,
            ),
            Service(
                ForwardedWorkerControl(find=self.router.find, channels=self._channels, drain_s=self._waits.drain_s),
                worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"],
                worker_control_pb2_grpc.add_WorkerControlServicer_to_server,
            ),
        )

    def _app(self) -> object:
        queue = ForwardedQueue(peers=self._peers, channels=self._channels)
        return create_app(
            services=[
                *((service.descriptor, service.servicer) for service in self._services),
                (prefill_queue_pb2.DESCRIPTOR.services_by_name["PrefillQueue"], queue),
            ],
            generator=self.processor,
            unready_reason=self._unready_reason,
            max_body_bytes=self._max_body_bytes,
            request_timeout_s=self._waits.request_s,
        )

    def _unready_reason(self) -> str | None:
        if self.processor.draining:
            return "draining"
        live = [worker for worker in self.router.workers() if worker.record.role is WorkerRole.DECODE]
        if not live:
            return "no decode worker is alive"
        return None if any(worker.report is not None for worker in live) else "no decode worker has reported its load"
