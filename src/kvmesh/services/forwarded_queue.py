"""PrefillQueue's counts at the gateway: asked of the live queue for those who come by REST."""

from typing import TYPE_CHECKING

import grpc

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.services.channels import Channels
from kvmesh.services.peers import Peers
from kvmesh.v1 import prefill_queue_pb2, prefill_queue_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error

if TYPE_CHECKING:
    from kvmesh.v1.prefill_queue_pb2_grpc import PrefillQueueAsyncStub
    from kvmesh.v1.prefill_queue_pb2_grpc import _ServicerContext as Context

_TIMEOUT_S = 2.0


class ForwardedQueue:
    """Forwards the two questions of operators; tasks and leases go to the queue itself."""

    def __init__(self, *, peers: Peers, channels: Channels) -> None:
        """Find the queue by `peers`."""
        self._peers = peers
        self._channels = channels

    async def GetStats(
        self, request: prefill_queue_pb2.GetStatsRequest, context: "Context"
    ) -> prefill_queue_pb2.GetStatsResponse:
        """See the contract. Raises: TryElsewhereError(NO_WORKERS) while no queue is known."""
        try:
            return await self._stub().GetStats(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from exc

    async def ListDead(
        self, request: prefill_queue_pb2.ListDeadRequest, context: "Context"
    ) -> prefill_queue_pb2.ListDeadResponse:
        """See the contract. Raises: TryElsewhereError(NO_WORKERS) while no queue is known."""
        try:
            return await self._stub().ListDead(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from exc

    def _stub(self) -> "PrefillQueueAsyncStub":
        address = self._peers.queue_address()
        if address is None:
            raise TryElsewhereError(Reason.NO_WORKERS, "no prefill queue is known: prefills run locally")
        return prefill_queue_pb2_grpc.PrefillQueueStub(self._channels.get(address))
