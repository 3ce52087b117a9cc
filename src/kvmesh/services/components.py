"""Components: discovery as programs without access to its store read it."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.signal import Signal
from kvmesh.v1 import components_pb2, components_pb2_grpc

if TYPE_CHECKING:
    from kvmesh.v1.components_pb2_grpc import _ServicerContext as Context


class Components(components_pb2_grpc.ComponentsServicer):
    """Serves what one process follows of discovery."""

    def __init__(self, peers: Peers, *, namespace: str) -> None:
        """Show the roster of `peers`, which follows `namespace`."""
        self._peers = peers
        self._namespace = namespace
        self._is_closing = False
        self._changed = Signal()
        self._tasks = OwnedTasks()

    def start(self) -> None:
        """Begin to hear of changes."""
        self._tasks.start(self._follow(), name="components")

    async def aclose(self) -> None:
        """End every watch, so that the server can stop. Idempotent."""
        self._is_closing = True
        self._changed.fire()
        await self._tasks.aclose()

    async def WatchComponents(
        self, request: components_pb2.WatchComponentsRequest, context: "Context"
    ) -> AsyncIterator[components_pb2.WatchComponentsResponse]:
        """See Components.WatchComponents."""
        while not self._is_closing:
            sent = self._response()
            yield sent
            # Else it changed, or the end began, while that was being sent and nobody waited.
            if not self._is_closing and self._response() == sent:
                await self._changed.wait()

    async def _follow(self) -> None:
        while True:
            await self._peers.changed()
            self._changed.fire()

    def _response(self) -> components_pb2.WatchComponentsResponse:
        return components_pb2.WatchComponentsResponse(
            namespace=self._namespace,
            workers=[
                components_pb2.ComponentWorker(
                    worker_id=record.worker_id,
                    epoch=record.epoch,
                    role=record.role.value,
                    address=record.address,
                    draining=record.draining,
                    block_size=record.block_size,
                    total_blocks=record.total_blocks,
                    ranks=record.ranks,
                    metadata=record.metadata,
                )
                for record in self._peers.roster.records()
            ],
        )
