"""The prefill queue's process part: its server and its record in discovery."""

from kvmesh.core.ids import WorkerId
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.discovery import Discovery, Registration
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.identity import WorkerIdentity, new_epoch
from kvmesh.services.prefill_queue import PrefillQueue
from kvmesh.v1 import prefill_queue_pb2, prefill_queue_pb2_grpc

_STREAMS_END_S = 1.0
_NO_BLOCKS = 1
"""A record needs a block size; the queue has no blocks."""


class QueueRole:
    """One prefill queue, found through discovery."""

    def __init__(self, *, worker_id: WorkerId, namespace: str, limits: QueueLimits, discovery: Discovery) -> None:
        """Serve from `start` on."""
        self._identity = WorkerIdentity(worker_id, new_epoch())
        self._namespace = namespace
        self._discovery = discovery
        self._queue = PrefillQueue(limits)
        self._server = GrpcServer()
        self._server.add(
            self._queue,
            prefill_queue_pb2.DESCRIPTOR.services_by_name["PrefillQueue"],
            prefill_queue_pb2_grpc.add_PrefillQueueServicer_to_server,
        )
        self._registration: Registration | None = None

    @property
    def queue(self) -> PrefillQueue:
        """The queue itself."""
        return self._queue

    @property
    def address(self) -> str:
        """HOST:PORT, once started."""
        return self._identity.address

    async def start(self, host: str, port: int = 0) -> None:
        """Listen, then register. Raises: PortTakenError, or what discovery raises."""
        bound = await self._server.start(host, port)
        self._identity.address = f"{host}:{bound}"
        self._registration = await self._discovery.register(
            WorkerRecord(
                worker_id=self._identity.worker_id,
                epoch=self._identity.epoch,
                role=WorkerRole.QUEUE,
                models=(),
                namespace=self._namespace,
                block_size=_NO_BLOCKS,
                address=self._identity.address,
            )
        )

    async def stop(self, drain_s: float) -> None:
        """Deregister, let leased tasks finish within `drain_s`, end the streams, close the server."""
        if self._registration is not None:
            await self._registration.stop()
            self._registration = None
        self._server.health.drain()
        await self._queue.drain(drain_s)
        self._queue.close()
        await self._server.drain_and_stop(_STREAMS_END_S)
