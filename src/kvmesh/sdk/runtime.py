"""Runtime: a program's view of the mesh, from which it gets handles and clients."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from kvmesh.core.roster import WorkerRecord
from kvmesh.core.waits import Waits
from kvmesh.discovery.discovery import Discovery
from kvmesh.discovery.door import DoorDiscovery
from kvmesh.sdk.caller import ServiceCaller
from kvmesh.sdk.component_watch import ComponentWatch
from kvmesh.sdk.context import Place, current_runtime, placed
from kvmesh.sdk.definitions import DeclarationError, ServiceDefinition
from kvmesh.sdk.handles import Namespace
from kvmesh.sdk.records import address_of
from kvmesh.services.channels import CHANNEL_OPTIONS, Channels
from kvmesh.services.peers import Peers

if TYPE_CHECKING:
    from kvmesh.sdk.publications import Publications

DEFAULT_TARGET = "127.0.0.1:50051"
"""Where a mesh serves gRPC unless told otherwise."""
_Result = TypeVar("_Result")
_Program = Callable[..., Coroutine[Any, Any, _Result]]


class Runtime:
    """What one program knows of the mesh. `connect` makes one; a served component has its own."""

    def __init__(
        self,
        discovery: Discovery,
        *,
        namespace: str,
        waits: Waits | None = None,
        unreached_door: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Follow the processes of `namespace` from `start` on; `discovery` stays the caller's to close.

        `unreached_door` returns the address of the door that discovery is read by, while nobody answers there.
        """
        self.waits = waits or Waits()
        self.channels = Channels()
        self.publications: Publications | None = None
        """Of the component that this program serves."""
        self.unreached_door = unreached_door
        self._discovery = discovery
        self._namespace = namespace
        self._peers = Peers(discovery, namespace=namespace, channels=self.channels)
        self._watches: dict[tuple[str, str], ComponentWatch] = {}

    def start(self) -> None:
        """Begin to follow."""
        self._peers.start()

    async def aclose(self) -> None:
        """End what runs for it. Idempotent."""
        await asyncio.gather(*(watch.aclose() for watch in self._watches.values()))
        await self._peers.aclose()
        await self.channels.aclose()

    def namespace(self, name: str) -> Namespace:
        """Return the handle of a namespace."""
        return Namespace(self, name)

    def caller(self, service: ServiceDefinition) -> ServiceCaller:
        """Return what calls the endpoints of a declared service, wherever it is served."""
        return ServiceCaller(self, service)

    def workers(self, namespace: str, component: str) -> tuple[WorkerRecord, ...]:
        """Return the running instances of a component that take requests, by id."""
        return tuple(record for record in self._instances(namespace, component) if not record.draining)

    def draining(self, namespace: str, component: str) -> tuple[WorkerRecord, ...]:
        """Return the running instances of a component that drain, by id."""
        return tuple(record for record in self._instances(namespace, component) if record.draining)

    def components(self) -> tuple[tuple[str, str], ...]:
        """Return (namespace, component) of everything that runs, in order."""
        return tuple(sorted({address_of(record) for record in self._peers.roster.records()}))

    async def changed(self) -> None:
        """Wait for somebody to come, go or change."""
        await self._peers.changed()

    def watch(self, namespace: str, component: str) -> ComponentWatch:
        """Return what follows the loads and caches of a component's instances, until this runtime is closed."""
        watch = self._watches.get((namespace, component))
        if watch is None:
            watch = ComponentWatch(
                self._discovery, mesh_namespace=self._namespace, namespace=namespace, component=component
            )
            self._watches[namespace, component] = watch
            watch.start()
        return watch

    def _instances(self, namespace: str, component: str) -> Iterator[WorkerRecord]:
        wanted = (namespace, component)
        return (record for record in self._peers.roster.records() if address_of(record) == wanted)


@asynccontextmanager
async def connect(target: str = DEFAULT_TARGET) -> AsyncIterator[Runtime]:
    """Connect to the mesh whose gRPC door is at `target`, for the block."""
    async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
        door = DoorDiscovery(channel)
        runtime = Runtime(door, namespace="", unreached_door=lambda: None if _is_reached(channel) else target)
        try:
            runtime.start()
            with placed(Place(runtime)):
                yield runtime
        finally:
            await runtime.aclose()
            await door.aclose()


def _is_reached(channel: grpc.aio.Channel) -> bool:
    return channel.get_state() is grpc.ChannelConnectivity.READY


def worker(
    target: str = DEFAULT_TARGET,
) -> Callable[[_Program[_Result]], _Program[_Result]]:
    """Give an async function a `Runtime` as its first argument: of the mesh at `target`, for as long as it runs.

    Where something is connected already, as in `kvmesh.testing.sdk.serving`, it is that. Raises: DeclarationError.
    """
    if callable(target):
        raise DeclarationError("write @worker(), with parentheses")

    def declare(function: _Program[_Result]) -> _Program[_Result]:
        if not inspect.iscoroutinefunction(function):
            name = getattr(function, "__name__", function)
            raise DeclarationError(f"{name} must be async: write `async def {name}(runtime: Runtime)`")

        @wraps(function)
        async def run(*args: Any, **kwargs: Any) -> _Result:
            known = current_runtime()
            if known is not None:
                return await function(known, *args, **kwargs)
            async with connect(target) as runtime:
                return await function(runtime, *args, **kwargs)

        return run

    return declare
