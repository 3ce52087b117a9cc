"""One instance of a component of the SDK: its class made, its endpoints served, its record in discovery.

start:  make the instance -> its on_start -> listen -> register    (nobody hears of one that cannot answer)
stop:   deregister -> refuse new requests -> what runs ends or is cancelled -> its on_shutdown -> close
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from kvmesh import telemetry
from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.discovery.discovery import Discovery, Registration
from kvmesh.runtime.role import Listen, stop_all
from kvmesh.runtime.server import GrpcServer
from kvmesh.sdk.context import Place, placed
from kvmesh.sdk.contract import contract_of
from kvmesh.sdk.definitions import ServiceDefinition
from kvmesh.sdk.publications import Publications
from kvmesh.sdk.records import component_metadata
from kvmesh.sdk.runtime import Runtime
from kvmesh.sdk.servicer import ComponentServicer
from kvmesh.services.identity import WorkerIdentity, new_epoch
from kvmesh.services.worker_control import WorkerControl
from kvmesh.v1 import (
    worker_control_pb2,
    worker_control_pb2_grpc,
    worker_events_pb2,
    worker_events_pb2_grpc,
)

log = telemetry.logger(__name__)

_STREAMS_END_S = 1.0


class ComponentRole:
    """One instance of one declared class."""

    def __init__(
        self,
        definition: ServiceDefinition,
        *,
        node: str,
        index: int,
        namespace: str,
        discovery: Discovery,
        waits: Waits,
        listen: Listen,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Be instance `index` on `node`, found in the mesh's `namespace`; `config` is what the class may read.

        Raises: DeclarationError.
        """
        worker_id = WorkerId(f"{node}/{definition.namespace}.{definition.component}/{index}")
        self.identity = WorkerIdentity(worker_id, new_epoch())
        self._definition = definition
        self._contract = contract_of(definition)
        self._namespace = namespace
        self._discovery = discovery
        self._waits = waits
        self._listen = listen
        self._config = dict(config or {})
        self._is_draining = False
        self._is_leaving = False
        """It drains for good."""
        self._server = GrpcServer(client_write_s=waits.client_write_s)
        self._runtime = Runtime(discovery, namespace=namespace, waits=waits)
        self._instance: Any = None
        self._place: Place | None = None
        self._publications: Publications | None = None
        self._servicer: ComponentServicer | None = None
        self._registration: Registration | None = None

    @property
    def name(self) -> str:
        """Its id."""
        return self.identity.worker_id

    @property
    def address(self) -> str:
        """HOST:PORT, once started."""
        return self.identity.address

    @property
    def service_name(self) -> str:
        """Full name of its gRPC service."""
        return str(self._contract.service.full_name)

    @property
    def instance(self) -> Any:
        """The object that serves, once started."""
        return self._instance

    async def start(self) -> None:
        """Make the instance, serve it, register it. Raises: what the class raises; PortTakenError, OSError."""
        definition, runtime = self._definition, self._runtime
        runtime.start()
        publications = Publications(is_draining=lambda: self._is_draining)
        runtime.publications = self._publications = publications
        component = runtime.namespace(definition.namespace).component(definition.component)
        self._place = place = Place(runtime, component, self._config, self.identity.worker_id)
        with placed(place):
            instance = definition.cls()
            for hook in definition.hooks["on_start"]:
                await getattr(instance, hook)()
        self._instance = instance  # from here on its on_shutdown has something to undo
        self._servicer = ComponentServicer(
            self._instance, definition, self._contract, place=place, is_draining=lambda: self._is_draining
        )
        self._add_services(self._servicer, publications)
        bound = await self._server.start(self._listen.host, self._listen.port, flag="--port")
        self.identity.address = self._listen.address(bound)
        self._registration = await self._discovery.register(self._record())
        log.info(
            "component.started",
            worker_id=self.identity.worker_id,
            component=definition.address,
            address=self.identity.address,
        )

    async def wait_ready(self) -> None:
        """Wait until others can find it; not bounded here. Returns at once before `start`."""
        if self._registration is not None:
            await self._registration.wait_registered()

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Take nothing new, wait for what runs; return (finished, 0): what is late ends with the stop. Idempotent."""
        running = self._begin_drain()
        if self._registration is not None:
            await self._registration.update(self._record())
        if self._servicer is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._servicer.wait_idle(), timeout_s)
        return running - self._running, 0

    async def undrain(self) -> bool:
        """Take requests again; return whether it drained. Idempotent. Raises: TryElsewhereError(DRAINING)."""
        if self._is_leaving:
            raise TryElsewhereError(Reason.DRAINING, "this instance is on its way out")
        was_draining, self._is_draining = self._is_draining, False
        if was_draining:
            self._server.health.undrain()
            if self._publications is not None:
                self._publications.drain_changed()
            if self._registration is not None:
                await self._registration.update(self._record())
        return was_draining

    async def describe(self) -> worker_control_pb2.GetInfoResponse:
        """Return what the instance is and does."""
        return worker_control_pb2.GetInfoResponse(
            worker_id=self.identity.worker_id,
            epoch=self.identity.epoch,
            role=WorkerRole.COMPONENT.value,
            engine=self._definition.address,
            requests=self._running,
            draining=self._is_draining,
        )

    async def stop(self) -> None:
        """End gracefully, in bounded time; also after a start that failed. Idempotent."""
        self._is_leaving = True
        self._begin_drain()
        await stop_all((self._deregister, self._close_server, self._shut_down, self._end_threads, self._runtime.aclose))

    @property
    def _running(self) -> int:
        return self._servicer.running if self._servicer is not None else 0

    def _begin_drain(self) -> int:
        self._is_draining = True
        self._server.health.drain()
        if self._publications is not None:
            self._publications.drain_changed()
        return self._running

    async def _deregister(self) -> None:
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.stop()

    async def _close_server(self) -> None:
        if self._publications is not None:
            self._publications.close()
        grace_s = self._waits.drain_s if self._running else _STREAMS_END_S
        await self._server.drain_and_stop(grace_s)

    async def _shut_down(self) -> None:
        instance, self._instance = self._instance, None
        if instance is None or self._place is None:
            return
        hooks = reversed(self._definition.hooks["on_shutdown"])
        with placed(self._place):
            await stop_all([partial(self._run_hook, getattr(instance, hook), hook) for hook in hooks])

    async def _end_threads(self) -> None:
        if self._servicer is not None:
            self._servicer.close()

    async def _run_hook(self, hook: Callable[[], Awaitable[None]], name: str) -> None:
        try:
            async with asyncio.timeout(self._waits.drain_s) as bound:
                await hook()
        except TimeoutError:
            if not bound.expired():
                raise
            log.warning("component.hook_cancelled", hook=name, worker_id=self.name, after_s=self._waits.drain_s)

    def _add_services(self, servicer: ComponentServicer, publications: Publications) -> None:
        self._server.add(servicer, self._contract.service, ComponentServicer.add_to_server)
        self._server.add(
            WorkerControl(self, drain_s=self._waits.drain_s),
            worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"],
            worker_control_pb2_grpc.add_WorkerControlServicer_to_server,
        )
        events = publications.open(self.identity.worker_id, self.identity.epoch)
        if events is not None:
            self._server.add(
                events,
                worker_events_pb2.DESCRIPTOR.services_by_name["WorkerEvents"],
                worker_events_pb2_grpc.add_WorkerEventsServicer_to_server,
            )

    def _record(self) -> WorkerRecord:
        definition, publications = self._definition, self._publications
        assert publications is not None, "started"
        record = WorkerRecord(
            worker_id=self.identity.worker_id,
            epoch=self.identity.epoch,
            role=WorkerRole.COMPONENT,
            models=(),
            namespace=self._namespace,
            block_size=publications.block_size,
            total_blocks=publications.total_blocks,
            address=self.identity.address,
            metadata=component_metadata(
                definition.namespace,
                definition.component,
                contract=self._contract.encode(),
                says_events=publications.is_used,
            ),
        )
        return replace(record, draining=True) if self._is_draining else record
