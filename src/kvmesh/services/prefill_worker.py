"""PrefillWorker: the direct mode, without the queue."""

from collections.abc import AsyncIterator

import grpc

from kvmesh.services.prefill_compute import PrefillCompute
from kvmesh.v1 import prefill_worker_pb2, prefill_worker_pb2_grpc


class PrefillWorker(prefill_worker_pb2_grpc.PrefillWorkerServicer):
    """Computes what it is asked for at once."""

    def __init__(self, compute: PrefillCompute) -> None:
        """Serve `compute`."""
        self._compute = compute

    async def Generate(
        self,
        request: prefill_worker_pb2.PrefillWorkerGenerateRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> AsyncIterator[prefill_worker_pb2.PrefillWorkerGenerateResponse]:
        """See the contract."""
        result = await self._compute.compute(request.task, lease_attempt=0)
        yield prefill_worker_pb2.PrefillWorkerGenerateResponse(
            progress=prefill_worker_pb2.PrefillProgress(computed_tokens=result.computed_tokens)
        )
        yield prefill_worker_pb2.PrefillWorkerGenerateResponse(handoff=result.handoff)
