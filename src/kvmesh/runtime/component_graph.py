"""Services of a graph in this process: with a door of their own where no mesh is there to join, found by its store."""

from collections.abc import Sequence

from kvmesh.discovery.discovery import Discovery
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.component_config import ServiceConfig
from kvmesh.runtime.component_role import ComponentRole
from kvmesh.runtime.composition import Composition, connect_discovery, node_name
from kvmesh.runtime.gateway_role import GatewayRole
from kvmesh.runtime.metrics_server import MetricsServer
from kvmesh.runtime.role import Role, stop_all
from kvmesh.runtime.served_role import listen_of
from kvmesh.runtime.settings import EngineSettings, Settings


class ComponentGraph:
    """Every instance of a graph's services, in this process."""

    def __init__(
        self, services: Sequence[ServiceConfig], settings: Settings, *, first_index: int | None = None
    ) -> None:
        """Serve them in this order; `first_index` is this process's number among those of the same service.

        Raises: DeclarationError, FixRequestError(INVALID_FIELD).
        """
        self._settings = settings
        self._is_alone = not settings.discovery.endpoints
        self.discovery: Discovery = MemoryDiscovery() if self._is_alone else connect_discovery(settings)
        """Where the instances are found."""
        self._gateway = self._make_gateway() if self._is_alone else None
        start = settings.process.index if first_index is None else first_index
        process = settings.process
        self.roles: tuple[ComponentRole, ...] = tuple(
            ComponentRole(
                service.definition,
                node=node_name(settings),
                index=start + number,
                namespace=settings.namespace,
                discovery=self.discovery,
                waits=settings.waits,
                listen=listen_of(settings),
                config=service.values,
            )
            for service in services
            for number in range(service.workers)
        )
        """The instances."""
        self._metrics = MetricsServer(process.host, process.metrics_port)
        self._started: list[Role] = []

    @property
    def name(self) -> str:
        """What is served, as in logs."""
        return ", ".join(role.name for role in self.roles)

    @property
    def addresses(self) -> dict[str, str]:
        """Where it is reached, once started: the door's, or those of the instances alone."""
        found = {role.name: role.address for role in self.roles}
        if self._gateway is not None:
            return {"http": f"http://{self._gateway.http_address}", "grpc": self._gateway.address, **found}
        return {**(found if len(found) > 1 else {"grpc": self.roles[0].address}), "metrics": self._metrics.url}

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP door, once started. Raises: RuntimeError where the door is another process's."""
        return self._door.http_address

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC door, once started. Raises: RuntimeError where the door is another process's."""
        return self._door.address

    async def start(self) -> None:
        """Serve. Raises: PortTakenError, OSError, what the classes raise; `stop` ends what was started until then."""
        roles: tuple[Role, ...] = (*((self._gateway,) if self._gateway is not None else ()), *self.roles)
        for role in roles:
            self._started.append(role)
            await role.start()
        if self._gateway is None:
            await self._metrics.start()
        else:
            await self._gateway.wait_routed(role.service_name for role in self.roles)

    async def wait_ready(self) -> None:
        """Wait until every instance can be found; not bounded here."""
        for role in self.roles:
            await role.wait_ready()

    async def stop(self) -> None:
        """End the instances, who calls before who is called; then the door. Idempotent."""
        started, self._started = self._started, []
        doors = [role.stop for role in started if role is self._gateway]
        await stop_all(
            (
                *(role.stop for role in reversed(started) if role is not self._gateway),
                *doors,
                self._metrics.stop,
                self._close,
            )
        )

    @property
    def _door(self) -> GatewayRole:
        if self._gateway is None:
            raise RuntimeError("the door is the mesh's, which was joined")
        return self._gateway

    def _make_gateway(self) -> GatewayRole:
        # No model is served here: the door is for the components, and echo costs nothing to have.
        settings = self._settings.model_copy(update={"engine": EngineSettings(name="echo")})
        return Composition(settings, discovery=self.discovery).gateway(node=node_name(settings), index=0)

    async def _close(self) -> None:
        await self.discovery.aclose()
