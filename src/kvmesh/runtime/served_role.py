"""One role in this process, found by those of others: what `kvmesh serve` runs."""

import asyncio
import socket
from typing import Protocol

from prometheus_client import start_http_server

from kvmesh import telemetry
from kvmesh.core.roster import WorkerRole
from kvmesh.discovery.discovery import Discovery
from kvmesh.runtime.composition import Composition, connect_discovery, node_name
from kvmesh.runtime.gateway_role import GatewayRole
from kvmesh.runtime.role import Listen, Role, stop_all
from kvmesh.runtime.server import check_free
from kvmesh.runtime.settings import Settings

log = telemetry.logger(__name__)

FRONTEND = "frontend"
ROLES = (FRONTEND, *(role.value for role in WorkerRole))
"""What can be served."""

_WILDCARDS = ("0.0.0.0", "::", "[::]")  # recognised, not bound


class _MetricsServer(Protocol):
    server_port: int

    def shutdown(self) -> None: ...

    def server_close(self) -> None: ...


class ServedRole:
    """A role, its discovery and its /metrics."""

    def __init__(self, role: str, settings: Settings) -> None:
        """Check what the settings name. Raises: FixRequestError(INVALID_FIELD) naming the setting and the fix."""
        self._settings = settings
        self._discovery: Discovery = connect_discovery(settings)
        self._role = _make(role, settings, self._discovery)
        self._metrics: _MetricsServer | None = None

    @property
    def name(self) -> str:
        """Its id, as in logs."""
        return self._role.name

    @property
    def addresses(self) -> dict[str, str]:
        """Where it is reached, once started, by protocol."""
        if isinstance(self._role, GatewayRole):
            return {"grpc": self._role.address, "http": f"http://{self._role.http_address}"}
        assert self._metrics is not None
        host = Listen(self._settings.process.host)
        return {"grpc": self._role.address, "metrics": f"http://{host.address(self._metrics.server_port)}/metrics"}

    async def start(self) -> None:
        """Serve. Raises: PortTakenError, OSError."""
        if not isinstance(self._role, GatewayRole):
            process = self._settings.process
            await check_free(process.host, process.metrics_port, flag="--metrics-port")
            self._metrics, _ = start_http_server(process.metrics_port, addr=process.host)
        await self._role.start()

    async def wait_ready(self) -> None:
        """Wait until it can do its work; not bounded."""
        await self._role.wait_ready()

    async def stop(self) -> None:
        """End gracefully, in bounded time. Idempotent."""
        await stop_all((self._role.stop, self._discovery.aclose, self._stop_metrics))

    async def _stop_metrics(self) -> None:
        metrics, self._metrics = self._metrics, None
        if metrics is not None:
            await asyncio.to_thread(metrics.shutdown)
            metrics.server_close()


def _make(role: str, settings: Settings, discovery: Discovery) -> Role:
    process = settings.process
    make = Composition(settings, discovery=discovery)
    node, index = node_name(settings), process.index
    listen = Listen(process.host, process.port, process.advertise or _reached_by(process.host))
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


def _reached_by(host: str) -> str:
    """Return the name of this machine where every address of it is bound, and none of them says where that is."""
    return socket.gethostname() if host in _WILDCARDS else ""
