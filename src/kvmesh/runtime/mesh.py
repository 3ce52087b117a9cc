"""A whole mesh in this process. Its roles talk gRPC to each other over loopback, but for the streams that carry tokens
and loads: those are handed over in memory, unless `mesh.local_streams` is off.

What it starts, it stops, in this order: the gateway, so that nothing new comes and what runs can end; then the workers,
then the queue and what was separate; then what they shared.
"""

import asyncio

from kvmesh.core.errors import FixRequestError, Reason, TryElsewhereError
from kvmesh.core.roster import WorkerRole
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.composition import Composition
from kvmesh.runtime.engine_registry import EnginePlan
from kvmesh.runtime.gateway_role import GatewayRole
from kvmesh.runtime.role import Listen, Role, stop_all
from kvmesh.runtime.settings import Settings
from kvmesh.runtime.worker import Worker
from kvmesh.services.local_calls import LocalServers
from kvmesh.transports.memory import MemoryNetwork
from kvmesh.v1 import frontend_pb2

_READY_S = 10.0


class Mesh:
    """Every role of a mesh in one process."""

    def __init__(self, settings: Settings, *, plan: EnginePlan | None = None) -> None:
        """Check what the settings name; `plan` brings engines of the caller's own in place of `engine.*`.

        Raises: FixRequestError(INVALID_FIELD) naming the setting and the fix.
        """
        if settings.discovery.store not in ("auto", "memory"):
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"one process needs no store such as {settings.discovery.store!r}: "
                "add --processes, or run each role by `kvmesh serve`",
                field="discovery.store",
            )
        self._discovery = MemoryDiscovery()
        make = Composition(
            settings,
            discovery=self._discovery,
            network=MemoryNetwork(),
            local=LocalServers() if settings.mesh.local_streams else None,
            plan=plan,
        )
        make.check()
        mesh, listen, node = settings.mesh, Listen(), settings.mesh.node_name(0)
        self._gateway = make.gateway(node=node, index=0)
        self._others: list[Role] = []
        if settings.remote_prefill.mode == "queue":
            self._others.append(make.queue(node=node, index=0, listen=listen))
        if mesh.router == "separate":
            self._others.append(make.router(node=node, index=0, listen=listen))
        if mesh.processor == "separate":
            self._others.append(make.processor(node=node, index=0, listen=listen))
        self._workers = [
            make.worker(WorkerRole.DECODE, node=mesh.node_name(index), index=index, listen=listen)
            for index in range(mesh.decode)
        ] + [
            make.worker(WorkerRole.PREFILL, node=mesh.node_name(mesh.decode + index), index=index, listen=listen)
            for index in range(mesh.prefill)
        ]
        self._started: list[Role] = []

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP door, once started."""
        return self._gateway.http_address

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC door, once started."""
        return self._gateway.address

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers: decode, then prefill."""
        return tuple(self._workers)

    @property
    def others(self) -> tuple[Role, ...]:
        """The queue where there is one, and the router and the processor where they are separate."""
        return tuple(self._others)

    @property
    def gateway(self) -> GatewayRole:
        """What clients reach."""
        return self._gateway

    async def start(self) -> None:
        """Serve; returns when the first request can be taken.

        Raises: PortTakenError, TryElsewhereError(NO_WORKERS); what was started until then is ended by `stop`.
        """
        roles: tuple[Role, ...] = (self._gateway, *self._others, *self._workers)
        for role in roles:
            self._started.append(role)
            await role.start()
        try:
            async with asyncio.timeout(_READY_S):
                await asyncio.gather(*(role.wait_ready() for role in roles))
        except TimeoutError as exc:
            raise TryElsewhereError(
                Reason.NO_WORKERS, f"the workers did not come up within {_READY_S:g} s: see the log above"
            ) from exc

    def topology(self) -> frontend_pb2.Topology:
        """Return the mesh as the gateway knows it now."""
        return self._gateway.topology()

    async def stop(self) -> None:
        """End gracefully, each part within the drain's bound; also after a start that failed. Idempotent."""
        started, self._started = self._started, []
        workers = [role for role in started if role in self._workers]
        others = [role.stop for role in started if role in self._others]
        gateway = [self._gateway.stop] if self._gateway in started else []

        async def stop_workers() -> None:
            await asyncio.gather(*(worker.stop() for worker in workers))

        await stop_all((*gateway, stop_workers, *others, self._discovery.aclose))
