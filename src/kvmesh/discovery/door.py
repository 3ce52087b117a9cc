"""Discovery read through a mesh's gRPC door: for programs that call components and have no access to the store."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import NotServedError, Reason
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.discovery import DiscoveryEvent, Registration, Snapshot
from kvmesh.v1 import components_pb2, components_pb2_grpc

log = telemetry.logger(__name__)

_RETRY_S = 0.5
_ROLES = {role.value: role for role in WorkerRole}


class DoorDiscovery:
    """The Discovery of a program beside the mesh; it only reads. Each message of the door is a snapshot."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """Ask on `channel`, which stays the caller's to close."""
        self._stub = components_pb2_grpc.ComponentsStub(channel)
        self._closing = asyncio.Event()
        self._calls: set[grpc.aio.UnaryStreamCall[Any, Any]] = set()

    async def register(self, record: WorkerRecord) -> Registration:
        """Refuse. Raises: NotServedError(UNIMPLEMENTED) always."""
        raise NotServedError(Reason.UNIMPLEMENTED, "the door lists components: to be listed, register in the store")

    async def watch(self, namespace: str) -> AsyncGenerator[DiscoveryEvent, None]:
        """See Discovery.watch; the namespace is the door's own. While the door is away nothing changes."""
        while not self._closing.is_set():
            call = self._stub.WatchComponents(components_pb2.WatchComponentsRequest(), wait_for_ready=True)
            self._calls.add(call)
            try:
                async for response in call:
                    yield Snapshot(tuple(_records(response)))
            except grpc.aio.AioRpcError as exc:
                log.info("door.lost", error=exc.code().name)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not self._closing.is_set() or (task is not None and task.cancelling()):
                    raise  # else it is the call that `aclose` cancelled, and not this task
            finally:
                self._calls.discard(call)
                call.cancel()
            try:
                async with asyncio.timeout(_RETRY_S):
                    await self._closing.wait()
            except TimeoutError:
                continue

    async def aclose(self) -> None:
        """See Discovery.aclose."""
        self._closing.set()
        for call in tuple(self._calls):
            call.cancel()


def _records(response: components_pb2.WatchComponentsResponse) -> list[WorkerRecord]:
    """Return the records that this release knows the roles of."""
    return [
        WorkerRecord(
            worker_id=WorkerId(worker.worker_id),
            epoch=Epoch(worker.epoch),
            role=_ROLES[worker.role],
            models=(),
            namespace=response.namespace,
            block_size=max(worker.block_size, 1),
            total_blocks=worker.total_blocks,
            ranks=max(worker.ranks, 1),
            draining=worker.draining,
            address=worker.address,
            metadata=dict(worker.metadata),
        )
        for worker in response.workers
        if worker.role in _ROLES
    ]
