"""A worker of either role: its engine, its server, its record in discovery, and its end.

start:  listen -> register -> begin to work        (nobody hears of a worker that cannot answer)
drain:  say so in the record, the loads and the health; take nothing new; what runs ends or is cancelled (undrain: back)
stop:   deregister -> drain -> end the streams -> close the server, then the engine
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvmesh import telemetry
from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.discovery.discovery import Discovery, Registration
from kvmesh.engines.engine import Engine
from kvmesh.runtime.role import Listen, Service, stop_all
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.channels import Channels
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.identity import WorkerIdentity, new_epoch
from kvmesh.services.kv_plane import KvPlane
from kvmesh.services.kv_transfer import KvTransfer, LentPins
from kvmesh.services.local_calls import LocalServers
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.readiness import Part, Readiness
from kvmesh.services.warm_ups import WarmUps
from kvmesh.services.worker_control import WorkerControl
from kvmesh.services.worker_events import LoadView, RankView, WorkerEvents
from kvmesh.services.worker_transports import WorkerTransports
from kvmesh.transports.transport import Transport
from kvmesh.v1 import (
    kv_transfer_pb2,
    kv_transfer_pb2_grpc,
    worker_control_pb2,
    worker_control_pb2_grpc,
    worker_events_pb2,
    worker_events_pb2_grpc,
)
from kvmesh.wire.layout import layout_to_wire

log = telemetry.logger(__name__)

_STREAMS_END_S = 1.0
"""Grace of the server once the work is done: only watches and exchanges are open then."""


class Work(Protocol):
    """What makes a worker a decode or a prefill worker."""

    @property
    def counters(self) -> dict[str, int]:
        """Counts since the start, by name."""

    def __len__(self) -> int:
        """Count what it runs."""

    def services(self) -> Sequence[Service]:
        """What it adds to the worker's server."""

    def start(self) -> None:
        """Begin; the worker is registered."""

    async def wait_ready(self) -> None:
        """Wait until work can reach it."""

    def shares(self) -> Sequence[worker_events_pb2.RouterShare]:
        """Return the load by the router that sent it."""

    def reservation_ids(self, router_id: str) -> Sequence[int]:
        """Return the live reservations of one router."""

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Take nothing new and end what runs within `timeout_s`; return (finished, cancelled)."""

    def undrain(self) -> None:
        """Take new work again, after a drain that has ended or was cancelled. Idempotent."""

    async def aclose(self) -> None:
        """End what still runs."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a Work is made of; owned by its Worker."""

    identity: WorkerIdentity
    driver: EngineDriver
    events: WorkerEvents
    pins: LentPins
    peers: Peers
    channels: Channels
    transports: WorkerTransports
    readiness: Readiness
    kv_plane: KvPlane
    models: tuple[str, ...]
    waits: Waits


class Worker:
    """One worker."""

    def __init__(
        self,
        *,
        worker_id: WorkerId,
        role: WorkerRole,
        models: tuple[str, ...],
        namespace: str,
        engine: Engine,
        transports: Sequence[Transport],
        discovery: Discovery,
        waits: Waits,
        build: Callable[[WorkerParts], Work],
        listen: Listen,
        labels: Mapping[str, str] | None = None,
        local: LocalServers | None = None,
    ) -> None:
        """Own `engine` and `transports`, best first, from now on; `build` makes the role's work.

        Clients of the same process find it in `local`.
        """
        self._local = local or LocalServers()
        self._labels = dict(labels or {})
        self.identity = WorkerIdentity(worker_id, new_epoch())
        self._role = role
        self._namespace = namespace
        self._listen = listen
        self._discovery = discovery
        self._waits = waits
        self._is_draining = False
        self._is_leaving = False
        """It drains for good: it stops, or its engine has crashed."""
        self._out_of_service = ""
        """Why the engine takes nothing, as it was last told."""
        self._registration: Registration | None = None
        self._tasks = OwnedTasks()
        info = engine.info
        driver = EngineDriver(engine, on_turn=self._on_turn, on_crash=self._on_crash, name=worker_id)
        events = WorkerEvents(
            worker_id=worker_id,
            epoch=self.identity.epoch,
            block_size=max(info.block_size, 1),
            load_source=self._load_view,
        )
        channels = Channels()
        peers = Peers(discovery, namespace=namespace, channels=channels)
        sources = WorkerRole.PREFILL if role is WorkerRole.DECODE else WorkerRole.DECODE
        readiness = Readiness(worker_id=worker_id)
        self._parts = WorkerParts(
            identity=self.identity,
            driver=driver,
            events=events,
            pins=LentPins(driver, pin_ttl_s=waits.pin_s),
            peers=peers,
            channels=channels,
            transports=WorkerTransports(transports),
            readiness=readiness,
            kv_plane=KvPlane(peers=peers, sources=sources, readiness=readiness),
            models=models,
            waits=waits,
        )
        self._warm_ups = WarmUps(
            peers=self._parts.peers,
            sources=sources,
            transports=self._parts.transports,
            waits=waits,
        )
        self._work = build(self._parts)
        self._server = GrpcServer(client_write_s=waits.client_write_s)
        for service in self._work.services():
            self._server.add(*service, serving=False)  # until it works, and has what it needs
        for service in self._own_services():
            self._server.add(*service)

    @property
    def name(self) -> str:
        """Its id."""
        return self.identity.worker_id

    @property
    def address(self) -> str:
        """HOST:PORT, once started."""
        return self.identity.address

    async def start(self) -> None:
        """Listen, register, work. Raises: PortTakenError, or what discovery raises; nothing is left running then."""
        try:
            await self._start()
        except BaseException:
            await stop_all((self._deregister, self.aclose))
            raise

    async def _start(self) -> None:
        parts = self._parts
        bound = await self._server.start(self._listen.host, self._listen.port, flag="--port")
        self.identity.address = self._listen.address(bound)
        self._local.add(self.identity.address, self._server.stream_handler)
        parts.driver.start()
        memory = await parts.driver.call(lambda engine: engine.kv_memory())
        if memory is not None:
            await parts.transports.serve(self.identity.agent_name, memory)
            self._warm_ups.start(memory)
        parts.kv_plane.start(unserved=self._unserved() if memory is not None else "")
        parts.peers.start()
        self._registration = await self._discovery.register(self._record())
        self._work.start()
        parts.readiness.on_change = self._set_serving
        self._set_serving(parts.readiness.is_ready)
        log.info("worker.started", worker_id=self.identity.worker_id, address=self.identity.address)

    async def wait_ready(self) -> None:
        """Wait until it is found and work can reach it; a worker that drains never gets there."""
        if self._registration is not None:
            await self._registration.wait_registered()
        await self._work.wait_ready()

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Take nothing new and end what runs within `timeout_s`; return (finished, cancelled). Idempotent."""
        if not self._is_draining:
            self._is_draining = True
            self._server.health.drain()
            log.info("worker.draining", worker_id=self.identity.worker_id, running=len(self._work))
            if self._registration is not None:
                await self._registration.update(self._record())
        return await self._empty(timeout_s)

    async def undrain(self) -> bool:
        """Take new work again; return whether it drained. Idempotent. Raises: TryElsewhereError(DRAINING)."""
        if self._is_leaving:
            raise TryElsewhereError(Reason.DRAINING, "this worker is on its way out")
        was_draining, self._is_draining = self._is_draining, False
        if was_draining:
            self._work.undrain()
            self._server.health.undrain()
            log.info("worker.undrained", worker_id=self.identity.worker_id)
            self._parts.events.load_changed()
            if self._registration is not None:
                await self._registration.update(self._record())
        return was_draining

    async def stop(self) -> None:
        """Deregister, drain with the setting's bound, and close everything."""
        try:
            self._is_leaving = True
            await self._deregister()
            self._is_draining = True
            self._server.health.drain()
            await self._empty(self._waits.drain_s)
        finally:
            await self.aclose()
        log.info("worker.stopped", worker_id=self.identity.worker_id)

    async def aclose(self) -> None:
        """Close everything at once, leaving the record to its lease, as a killed process does; what runs fails."""
        parts = self._parts
        self._local.remove(self.identity.address)
        await self._tasks.aclose()
        parts.events.close()
        await self._work.aclose()
        await self._server.drain_and_stop(_STREAMS_END_S)
        await self._warm_ups.aclose()
        await parts.kv_plane.aclose()
        await parts.peers.aclose()
        parts.pins.close()
        await parts.driver.aclose()
        await asyncio.gather(parts.transports.aclose(), parts.channels.aclose())
        parts.readiness.close()

    async def describe(self) -> worker_control_pb2.GetInfoResponse:
        """Return what the worker is and does."""
        parts, info = self._parts, self._parts.driver.info
        pool = await parts.driver.call(lambda engine: engine.pool_stats())
        answer = worker_control_pb2.GetInfoResponse(
            worker_id=self.identity.worker_id,
            epoch=self.identity.epoch,
            role=self._role.value,
            models=parts.models,
            engine=info.name,
            used_blocks=pool.used_blocks,
            total_blocks=info.total_blocks,
            pins=pool.pins,
            imports=pool.imports,
            requests=len(self._work),
            counters=self._work.counters,
            draining=self._is_draining,
            cached_blocks=pool.cached_blocks,
        )
        if info.layout is not None:
            answer.layout.CopyFrom(layout_to_wire(info.layout))
        return answer

    async def _deregister(self) -> None:
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.stop()

    async def _empty(self, timeout_s: float) -> tuple[int, int]:
        """Drain the work, then give those who were handed blocks the time of a transfer to fetch them."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        counts = await self._work.drain(timeout_s)
        if not await self._parts.pins.wait_none(min(max(until - loop.time(), 0.0), self._waits.kv_transfer_s)):
            telemetry.WAIT_ENDED.labels(wait="kv_transfer_s").inc()
        return counts

    def _on_crash(self) -> None:
        """Have nothing more sent here: without its engine a worker can only refuse."""
        self._is_leaving = True
        self._tasks.start(self._retire(), name="retire")

    async def _retire(self) -> None:
        await self.drain(0)

    def _own_services(self) -> tuple[Service, ...]:
        return (
            Service(
                self._parts.events,
                worker_events_pb2.DESCRIPTOR.services_by_name["WorkerEvents"],
                worker_events_pb2_grpc.add_WorkerEventsServicer_to_server,
            ),
            Service(
                WorkerControl(self, drain_s=self._waits.drain_s),
                worker_control_pb2.DESCRIPTOR.services_by_name["WorkerControl"],
                worker_control_pb2_grpc.add_WorkerControlServicer_to_server,
            ),
            Service(
                KvTransfer(self.identity, self._parts.pins),
                kv_transfer_pb2.DESCRIPTOR.services_by_name["KvTransfer"],
                kv_transfer_pb2_grpc.add_KvTransferServicer_to_server,
            ),
        )

    def _record(self) -> WorkerRecord:
        info = self._parts.driver.info
        record = WorkerRecord(
            worker_id=self.identity.worker_id,
            epoch=self.identity.epoch,
            role=self._role,
            models=self._parts.models,
            namespace=self._namespace,
            block_size=max(info.block_size, 1),
            total_blocks=info.total_blocks,
            max_requests=info.max_sequences,
            labels=self._labels,
            accepts=frozenset(form.value for form in info.accepts),
            address=self.identity.address,
            metadata={
                "engine": info.name,
                "max_context_tokens": str(info.max_context_tokens),
                **self._parts.transports.metadata,
            },
        )
        return replace(record, draining=True) if self._is_draining else record

    def _load_view(self, router_id: str) -> LoadView:
        return LoadView(
            draining=self._is_draining or bool(self._parts.driver.load.out_of_service),
            ranks=(RankView(load=self._parts.driver.load, shares=self._work.shares()),),
            reservation_ids=self._work.reservation_ids(router_id),
        )

    def _on_turn(self, kv_events: Sequence[Any]) -> None:
        if self._parts.driver.load.out_of_service != self._out_of_service:
            self._service_changed()
        self._parts.events.publish_kv(kv_events)
        self._parts.events.load_changed()

    def _service_changed(self) -> None:
        """Say once that the engine takes nothing, or again does; the loads say it to routers."""
        before, now = self._out_of_service, self._parts.driver.load.out_of_service
        self._out_of_service = now
        if bool(before) == bool(now):
            return
        self._parts.readiness.set_lack(Part.ENGINE, now)
        if now:
            log.warning("worker.out_of_service", worker_id=self.identity.worker_id, detail=now)
        else:
            log.info("worker.in_service", worker_id=self.identity.worker_id)

    def _set_serving(self, serving: bool) -> None:
        for service in self._work.services():
            self._server.health.set_serving(service.descriptor.full_name, serving)

    def _unserved(self) -> str:
        """Return why nobody can pull from this worker, where its work is to be pulled from."""
        is_source = self._role is WorkerRole.PREFILL and not self._parts.transports.served_reaches
        return "no transport can serve its blocks" if is_source else ""
