"""Workers whose record went without a word: each stays while it answers that it serves.

The store may have lost the record on its own, so its word alone takes nobody away; the worker's own health does.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh import telemetry
from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRecord
from kvmesh.services.channels import CHANNEL_OPTIONS
from kvmesh.services.owned_tasks import OwnedTasks

log = telemetry.logger(__name__)

_HEALTH_TIMEOUT_S = 2.0
_HEALTH_INTERVAL_S = 2.0
"""Between two looks at a suspect, with jitter: after a storm of deletions everybody looks at everybody."""


class Suspects:
    """Looks at the suspects of one follower of discovery, each through a channel of its own."""

    def __init__(self, *, on_gone: Callable[[WorkerRecord], None]) -> None:
        """`on_gone` is told, once, of a suspect that no longer serves."""
        self._on_gone = on_gone
        self._looking: dict[WorkerId, asyncio.Task[None]] = {}
        self._tasks = OwnedTasks()

    def suspect(self, record: WorkerRecord) -> None:
        """Keep looking at a worker until it is trusted, or gone. Idempotent."""
        if record.worker_id not in self._looking:
            log.warning("worker.suspect", worker_id=record.worker_id, epoch=record.epoch)
            self._looking[record.worker_id] = self._tasks.start(self._look(record), name=f"suspect-{record.worker_id}")

    def trust(self, worker_id: WorkerId) -> None:
        """Stop looking: its record is back, or it is gone for good. Idempotent."""
        looking = self._looking.pop(worker_id, None)
        if looking is not None:
            looking.cancel()

    async def aclose(self) -> None:
        """Stop looking at all. Idempotent."""
        await self._tasks.aclose()
        self._looking.clear()

    async def _look(self, record: WorkerRecord) -> None:
        async with grpc.aio.insecure_channel(record.address, options=CHANNEL_OPTIONS) as channel:
            while True:
                if not await _is_serving(channel):
                    break
                await asyncio.sleep(_HEALTH_INTERVAL_S * random.uniform(0.5, 1.0))  # jitter, no secret
        del self._looking[record.worker_id]
        self._on_gone(record)


async def _is_serving(channel: grpc.aio.Channel) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
