"""One role in this process, found by those of others: what `kvmesh serve` runs."""

import socket

from kvmesh import telemetry
from kvmesh.core.roster import WorkerRole
from kvmesh.discovery.discovery import Discovery
from kvmesh.runtime.composition import Composition, connect_discovery, node_name
from kvmesh.runtime.gateway_role import GatewayRole
from kvmesh.runtime.metrics_server import MetricsServer
from kvmesh.runtime.role import Listen, Role, stop_all
from kvmesh.runtime.settings import Settings

log = telemetry.logger(__name__)

FRONTEND = "frontend"
ROLES = (FRONTEND, *(role.value for role in WorkerRole if role is not WorkerRole.COMPONENT))
"""What can be served by its name."""

_WILDCARDS = ("0.0.0.0", "::", "[::]")  # recognised, not bound


class ServedRole:
    """A role, its discovery and its /metrics."""

    def __init__(self, role: str, settings: Settings) -> None:
        """Check what the settings name. Raises: FixRequestError(INVALID_FIELD) naming the setting and the fix."""
        self._discovery: Discovery = connect_discovery(settings)
        self._role = _make(role, settings, self._discovery)
        self._metrics = MetricsServer(settings.process.host, settings.process.metrics_port)

    @property
    def name(self) -> str:
        """Its id, as in logs."""
        return self._role.name

    @property
    def addresses(self) -> dict[str, str]:
        """Where it is reached, once started, by protocol."""
        if isinstance(self._role, GatewayRole):
            return {"grpc": self._role.address, "http": f"http://{self._role.http_address}"}
        return {"grpc": self._role.address, "metrics": self._metrics.url}

    async def start(self) -> None:
        """Serve. Raises: PortTakenError, OSError."""
        if not isinstance(self._role, GatewayRole):
            await self._metrics.start()
        await self._role.start()

    async def wait_ready(self) -> None:
        """Wait until it can do its work; not bounded."""
        await self._role.wait_ready()

    async def stop(self) -> None:
        """End gracefully, in bounded time. Idempotent."""
        await stop_all((self._role.stop, self._discovery.aclose, self._metrics.stop))


def _make(role: str, settings: Settings, discovery: Discovery) -> Role:
    process = settings.process
    make = Composition(settings, discovery=discovery)
    node, index = node_name(settings), process.index
    listen = listen_of(settings)
    if role == FRONTEND:
        return make.gateway(node=node, index=index, grpc_flag="--port")
    match WorkerRole(role):
        case WorkerRole.QUEUE:
            return make.queue(node=node, index=index, listen=listen)
        case WorkerRole.ROUTER:
            return make.router(node=node, index=index, listen=listen)
        case WorkerRole.PROCESSOR:
            return make.processor(node=node, index=index, listen=listen)
        case worker:
            return make.worker(worker, node=node, index=index, listen=listen)


def listen_of(settings: Settings) -> Listen:
    """Return where a process of `serve` listens, unless it is a frontend."""
    process = settings.process
    return Listen(process.host, process.port, process.advertise or _reached_by(process.host), process.advertise_port)


def _reached_by(host: str) -> str:
    """Return the name of this machine where every address of it is bound, and none of them says where that is."""
    return socket.gethostname() if host in _WILDCARDS else ""
