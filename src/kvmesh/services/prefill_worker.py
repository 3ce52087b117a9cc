"""PrefillWorker: the direct mode, without the queue."""

from collections.abc import AsyncIterator

import grpc

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.services.prefill_compute import PrefillCompute
from kvmesh.v1 import prefill_worker_pb2, prefill_worker_pb2_grpc


class PrefillWorker(prefill_worker_pb2_grpc.PrefillWorkerServicer):
    """Computes what it is asked for at once."""

    def __init__(self, compute: PrefillCompute) -> None:
        """Serve `compute`."""
        self.draining = False
        self._compute = compute

    async def Generate(
        self,
        request: prefill_worker_pb2.PrefillWorkerGenerateRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> AsyncIterator[prefill_worker_pb2.PrefillWorkerGenerateResponse]:
        """See the contract."""
        if self.draining:
            raise TryElsewhereError(Reason.DRAINING, "this worker takes no new tasks")
        result = await self._compute.compute(request.task)
        is_sent = False
        try:
            yield prefill_worker_pb2.PrefillWorkerGenerateResponse(
                progress=prefill_worker_pb2.PrefillProgress(computed_tokens=result.computed_tokens)
            )
            yield prefill_worker_pb2.PrefillWorkerGenerateResponse(handoff=result.handoff)
            is_sent = True
        finally:
            if not is_sent:  # the caller is gone: nobody will release what it never heard of
                self._compute.give_back(result)
