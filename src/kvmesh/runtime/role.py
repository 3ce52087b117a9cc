"""What every role of the mesh has in common: it starts, listens, is found, and stops."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from google.protobuf.descriptor import ServiceDescriptor

from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.discovery import Discovery, Registration
from kvmesh.services.channels import host_port
from kvmesh.services.identity import WorkerIdentity, new_epoch

_NO_BLOCKS = 1
"""A record needs a block size; only workers have blocks."""


class Service(NamedTuple):
    """What a server serves."""

    servicer: Any
    descriptor: ServiceDescriptor
    add_to_server: Callable[[Any, Any], None]


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a role listens."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 = any free one."""
    advertise: str = ""
    """Host by which others reach it; "" = `host`."""
    advertise_port: int = 0
    """Port by which others reach it; 0 = the one it binds."""

    def address(self, bound_port: int) -> str:
        """Return HOST:PORT as others are told."""
        return host_port(self.advertise or self.host, self.advertise_port or bound_port)


class Role(Protocol):
    """One role of a mesh."""

    @property
    def name(self) -> str:
        """Its id, as in logs."""

    @property
    def address(self) -> str:
        """HOST:PORT of its gRPC server, once started."""

    async def start(self) -> None:
        """Serve, and be found. Raises: PortTakenError, OSError; `stop` ends what was started until then."""

    async def wait_ready(self) -> None:
        """Wait until it can do its work; not bounded here."""

    async def stop(self) -> None:
        """End gracefully, in bounded time; also after a start that failed. Idempotent."""


class Announcement:
    """The record in discovery of a role that is no worker."""

    def __init__(
        self,
        worker_id: WorkerId,
        role: WorkerRole,
        *,
        namespace: str,
        discovery: Discovery,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare it; nothing is announced before `announce`."""
        self.identity = WorkerIdentity(worker_id, new_epoch())
        self._role = role
        self._namespace = namespace
        self._discovery = discovery
        self._metadata = metadata or {}
        self._registration: Registration | None = None

    async def announce(self, address: str) -> None:
        """Say where it is reached. Raises: what discovery raises."""
        self.identity.address = address
        self._registration = await self._discovery.register(
            WorkerRecord(
                worker_id=self.identity.worker_id,
                epoch=self.identity.epoch,
                role=self._role,
                models=(),
                namespace=self._namespace,
                block_size=_NO_BLOCKS,
                address=address,
                metadata=self._metadata,
            )
        )

    async def wait_announced(self) -> None:
        """Wait until others can find it; not bounded here. Returns at once before `announce`."""
        if self._registration is not None:
            await self._registration.wait_registered()

    async def withdraw(self) -> None:
        """Say that it stops. Idempotent."""
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.stop()


async def stop_all(stops: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run every stop in order, also when one fails; then raise the first failure."""
    async with AsyncExitStack() as stack:
        for stop in reversed(stops):
            stack.push_async_callback(stop)
