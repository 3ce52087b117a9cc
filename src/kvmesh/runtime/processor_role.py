"""The processor: as a part of the frontend's process, or served by one of its own."""

import secrets
from collections.abc import Mapping

from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.discovery.discovery import Discovery
from kvmesh.runtime.role import Announcement, Listen, Service, stop_all
from kvmesh.runtime.router_role import RouterPart
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.channels import Channels
from kvmesh.services.exchange_pool import ExchangePool
from kvmesh.services.local_calls import LocalServers
from kvmesh.services.peers import Peers
from kvmesh.services.processor import Processor
from kvmesh.services.processor_service import Processor as ProcessorService
from kvmesh.services.remote_router import RemoteRouter
from kvmesh.services.routing_port import InProcessRouting
from kvmesh.tokenizing.tokenizer import Tokenizer
from kvmesh.v1 import processor_pb2, processor_pb2_grpc

_STREAMS_END_S = 1.0

Tokenizers = Mapping[str, Tokenizer | None]
"""By model; None: its workers read text."""


class ProcessorPart:
    """A processor, its routing and its service."""

    def __init__(
        self,
        *,
        router: RouterPart | None,
        peers: Peers,
        channels: Channels,
        tokenizers: Tokenizers,
        waits: Waits,
        merge_within_s: float,
        local: LocalServers | None = None,
    ) -> None:
        """Book with `router`, or with the one that `peers` names where that is None."""
        self._waits = waits
        self._remote_router = RemoteRouter(peers=peers, channels=channels, waits=waits) if router is None else None
        self.processor = Processor(
            router=InProcessRouting(router.router) if router is not None else _present(self._remote_router),
            peers=peers,
            exchanges=ExchangePool(
                processor_id=f"processor-{secrets.token_hex(8)}",
                channels=channels,
                waits=waits,
                merge_within_s=merge_within_s,
                local=local,
            ),
            tokenizers=tokenizers,
            waits=waits,
        )

    @property
    def service(self) -> Service:
        """Processor."""
        return Service(
            ProcessorService(self.processor, totals=self.processor.totals),
            processor_pb2.DESCRIPTOR.services_by_name["Processor"],
            processor_pb2_grpc.add_ProcessorServicer_to_server,
        )

    def start(self) -> None:
        """Begin to report progress."""
        self.processor.start()

    async def drain(self) -> None:
        """Take nothing new and let what runs end, within the drain's bound."""
        await self.processor.drain(self._waits.drain_s)

    async def aclose(self) -> None:
        """Stop; requests that still run lose their workers."""
        await self.processor.aclose()
        if self._remote_router is not None:
            await self._remote_router.aclose()


class ProcessorRole:
    """A processor of its own process, with a router of its own or without."""

    def __init__(
        self,
        *,
        node: str,
        index: int,
        router: RouterPart | None,
        tokenizers: Tokenizers,
        waits: Waits,
        merge_within_s: float,
        namespace: str,
        discovery: Discovery,
        listen: Listen,
        local: LocalServers | None = None,
    ) -> None:
        """Serve from `start` on; what `router` knows is served as well."""
        self._announcements = [
            Announcement(WorkerId(f"{node}/{role.value}/{index}"), role, namespace=namespace, discovery=discovery)
            for role in (WorkerRole.PROCESSOR, *((WorkerRole.ROUTER,) if router is not None else ()))
        ]
        self._listen = listen
        self._router = router
        self._channels = Channels()
        self._peers = Peers(discovery, namespace=namespace, channels=self._channels)
        self._part = ProcessorPart(
            router=router,
            peers=self._peers,
            channels=self._channels,
            tokenizers=tokenizers,
            waits=waits,
            merge_within_s=merge_within_s,
            local=local,
        )
        self._server = GrpcServer(client_write_s=waits.client_write_s)
        self._server.add(*self._part.service)
        if router is not None:
            self._server.add(*router.service)

    @property
    def name(self) -> str:
        """Its id."""
        return self._announcements[0].identity.worker_id

    @property
    def address(self) -> str:
        """HOST:PORT, once started."""
        return self._announcements[0].identity.address

    async def start(self) -> None:
        """Listen, follow the mesh, be found. Raises: PortTakenError, or what discovery raises."""
        bound = await self._server.start(self._listen.host, self._listen.port, flag="--port")
        self._peers.start()
        if self._router is not None:
            self._router.start()
        self._part.start()
        for announcement in self._announcements:
            await announcement.announce(self._listen.address(bound))

    async def wait_ready(self) -> None:
        """Wait until it is found: requests wait for a worker, in bounded time."""
        for announcement in self._announcements:
            await announcement.wait_announced()

    async def stop(self) -> None:
        """Withdraw, let what runs end within the drain's bound, close. Idempotent."""
        closes = [self._part.aclose, self._peers.aclose, self._channels.aclose]
        if self._router is not None:
            closes.insert(1, self._router.aclose)
        withdrawals = [announcement.withdraw for announcement in self._announcements]
        await stop_all((*withdrawals, self._drain, self._close, *closes))

    async def _drain(self) -> None:
        self._server.health.drain()
        await self._part.drain()

    async def _close(self) -> None:
        if self._router is not None:
            self._router.close_streams()
        await self._server.drain_and_stop(_STREAMS_END_S)


def _present(router: RemoteRouter | None) -> RemoteRouter:
    assert router is not None
    return router
