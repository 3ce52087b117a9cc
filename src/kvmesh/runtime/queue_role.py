"""The prefill queue's process part: its server and its record in discovery."""

from kvmesh.core.ids import WorkerId
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.roster import WorkerRole
from kvmesh.discovery.discovery import Discovery
from kvmesh.runtime.role import Announcement, Listen, stop_all
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.prefill_queue import PrefillQueue
from kvmesh.v1 import prefill_queue_pb2, prefill_queue_pb2_grpc

_STREAMS_END_S = 1.0


class QueueRole:
    """One prefill queue, found through discovery."""

    def __init__(
        self,
        *,
        worker_id: WorkerId,
        namespace: str,
        limits: QueueLimits,
        discovery: Discovery,
        listen: Listen,
        drain_s: float,
    ) -> None:
        """Serve from `start` on; leased tasks get `drain_s` to finish at the end."""
        self._announcement = Announcement(worker_id, WorkerRole.QUEUE, namespace=namespace, discovery=discovery)
        self._listen = listen
        self._drain_s = drain_s
        self._queue = PrefillQueue(limits)
        self._server = GrpcServer()
        self._server.add(
            self._queue,
            prefill_queue_pb2.DESCRIPTOR.services_by_name["PrefillQueue"],
            prefill_queue_pb2_grpc.add_PrefillQueueServicer_to_server,
        )

    @property
    def name(self) -> str:
        """Its id."""
        return self._announcement.identity.worker_id

    @property
    def queue(self) -> PrefillQueue:
        """The queue itself."""
        return self._queue

    @property
    def address(self) -> str:
        """HOST:PORT, once started."""
        return self._announcement.identity.address

    async def start(self) -> None:
        """Listen, then be found. Raises: PortTakenError, or what discovery raises."""
        bound = await self._server.start(self._listen.host, self._listen.port, flag="--port")
        await self._announcement.announce(self._listen.address(bound))

    async def wait_ready(self) -> None:
        """Wait until it is found."""
        await self._announcement.wait_announced()

    async def stop(self) -> None:
        """Withdraw, let leased tasks finish, end the streams, close the server. Idempotent."""
        await stop_all((self._announcement.withdraw, self._drain, self._close))

    async def _drain(self) -> None:
        self._server.health.drain()
        await self._queue.drain(self._drain_s)

    async def _close(self) -> None:
        self._queue.close()
        await self._server.drain_and_stop(_STREAMS_END_S)
