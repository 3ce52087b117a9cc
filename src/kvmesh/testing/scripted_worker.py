"""A worker without an engine: it serves WorkerEvents and health, is registered, and says what a test tells it to."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2_grpc

from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.ids import Epoch, SequenceHash, WorkerId
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored
from kvmesh.core.roster import WorkerRecord
from kvmesh.discovery.memory import MemoryDiscovery, MemoryRegistration
from kvmesh.engines.engine import EngineLoad
from kvmesh.runtime.health import Health
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.worker_events import LoadView, RankView, WorkerEvents
from kvmesh.v1 import worker_events_pb2, worker_events_pb2_grpc

if TYPE_CHECKING:
    from kvmesh.v1.worker_events_pb2_grpc import _ServicerContext as Context


@dataclass(slots=True)
class Said:
    """What the worker reports as its load."""

    load: EngineLoad = EngineLoad()
    shares: list[worker_events_pb2.RouterShare] = field(default_factory=list)
    reservation_ids: dict[str, list[int]] = field(default_factory=dict)
    """By router_id."""
    draining: bool = False


class _RecordedEvents(WorkerEvents):
    """Remembers how it was asked."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kv_requests: list[worker_events_pb2.WatchKvEventsRequest] = []

    def evict_silently(self, block_hashes: Sequence[SequenceHash], *, rank: int) -> None:
        self._histories[rank]._apply(BlocksRemoved(tuple(block_hashes)))

    async def WatchKvEvents(  # noqa: N802  # the contract's name
        self, request: worker_events_pb2.WatchKvEventsRequest, context: "Context"
    ) -> AsyncIterator[worker_events_pb2.WatchKvEventsResponse]:
        self.kv_requests.append(request)
        async for message in super().WatchKvEvents(request, context):
            yield message


class ScriptedWorker:
    """One incarnation; make it with `start` and end it with `stop`, `crash` or, at least, `aclose`."""

    def __init__(self, record: WorkerRecord, *, ring_size: int = 1024) -> None:
        """Be what `record` says, at an address of its own."""
        self.record = record
        self.said = Said()
        self.health = Health()
        self.registration: MemoryRegistration | None = None
        self.events = _RecordedEvents(
            worker_id=record.worker_id,
            epoch=record.epoch,
            block_size=record.block_size,
            ranks=record.ranks,
            load_source=self._view,
            ring_size=ring_size,
        )
        self._server: grpc.aio.Server | None = None

    @classmethod
    async def start(
        cls, discovery: MemoryDiscovery | None, number: int = 0, *, ring_size: int = 1024, port: int = 0, **changes: Any
    ) -> "ScriptedWorker":
        """Serve worker `number` and register it; `changes` are fields of its record, `port` 0 any free one."""
        record = WorkerRecord(
            worker_id=WorkerId(f"node/decode/{number}"), epoch=Epoch(1), models=("m",), block_size=16, total_blocks=1000
        )
        worker = cls(replace(record, **changes), ring_size=ring_size)
        await worker.serve(port=port)
        if discovery is not None:
            try:
                await worker.register(discovery)
            except BaseException:
                await worker.aclose()
                raise
        return worker

    @property
    def worker_id(self) -> WorkerId:
        """Its id."""
        return self.record.worker_id

    @property
    def port(self) -> int:
        """Where it serves, or served last."""
        return int(self.record.address.rpartition(":")[2])

    async def register(self, discovery: MemoryDiscovery) -> None:
        """Put its record."""
        self.registration = await discovery.register(self.record)

    async def serve(self, *, port: int = 0) -> None:
        """Open the server."""
        server = grpc.aio.server(interceptors=[CallInterceptor()], options=[("grpc.so_reuseport", 0)])
        worker_events_pb2_grpc.add_WorkerEventsServicer_to_server(self.events, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        self.health.set_serving("", True)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        self.record = replace(self.record, address=f"127.0.0.1:{bound}")
        self._server = server

    async def break_streams(self) -> None:
        """Close the server without a word; `serve(port=worker.port)` brings it back with all it knows."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def stop(self) -> None:
        """End in good order."""
        if self.registration is not None:
            await self.registration.stop()
        await self.aclose()

    async def crash(self) -> None:
        """Vanish, and the record with it, as when a lease runs out."""
        await self.aclose()
        if self.registration is not None:
            self.registration.lose()

    async def aclose(self) -> None:
        """Close the server; the record stays. Idempotent."""
        self.events.close()
        self.health.close()
        await self.break_streams()

    def cache(self, tokens: Sequence[int], *, rank: int = 0) -> tuple[SequenceHash, ...]:
        """Say that the full blocks of a prompt are cached, and return their hashes."""
        local = local_block_hashes(np.array(tokens, dtype=np.uint32), self.record.block_size)
        hashes = sequence_hashes(local)
        self.events.publish_kv([BlocksStored(None, hashes, tuple(local))], rank=rank)
        return hashes

    def evict_silently(self, block_hashes: Sequence[SequenceHash], *, rank: int = 0) -> None:
        """Drop blocks and tell nobody, which no worker should: only a snapshot shows it."""
        self.events.evict_silently(block_hashes, rank=rank)

    def say(self, **changes: Any) -> None:
        """Report another load; `changes` are fields of `Said`."""
        self.said = replace(self.said, **changes)
        self.events.load_changed()

    def _view(self, router_id: str) -> LoadView:
        said = self.said
        return LoadView(
            draining=said.draining,
            ranks=tuple(RankView(rank=rank, load=said.load, shares=said.shares) for rank in range(self.record.ranks)),
            reservation_ids=said.reservation_ids.get(router_id, []),
        )
