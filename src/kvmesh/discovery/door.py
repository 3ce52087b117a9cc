"""Discovery read through a mesh's gRPC door: for programs that call components and have no access to the store."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import NotServedError, Reason
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.discovery import Deleted, DiscoveryEvent, Put, Registration, Snapshot
from kvmesh.v1 import components_pb2, components_pb2_grpc

log = telemetry.logger(__name__)

_RETRY_S = 0.5
_ROLES = {role.value: role for role in WorkerRole}
"""Of this release: a newer mesh may have more."""


class DoorDiscovery:
    """The Discovery of a program beside the mesh; it only reads."""

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
            reader = WatchReader()
            call = self._stub.WatchComponents(components_pb2.WatchComponentsRequest(), wait_for_ready=True)
            self._calls.add(call)
            try:
                async for response in call:
                    for event in reader.events(response):
                        yield event
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


class WatchReader:
    """Reads the messages of one watch."""

    def __init__(self) -> None:
        self._parts: list[WorkerRecord] = []
        """Of a snapshot that is not complete yet."""

    def events(self, response: components_pb2.WatchComponentsResponse) -> Iterator[DiscoveryEvent]:
        """Yield what a message makes known: nothing before the last part of a snapshot."""
        records = [_record(worker, response.namespace) for worker in response.workers if worker.role in _ROLES]
        if response.snapshot:
            self._parts += records
            if response.snapshot_complete:
                yield Snapshot(tuple(self._parts))
                self._parts = []
            return
        for one in response.gone:  # the door has asked it, or it said so itself: it is no suspect
            yield Deleted(WorkerId(one.worker_id), Epoch(one.epoch), graceful=True)
        for record in records:
            yield Put(record)


def _record(worker: components_pb2.ComponentWorker, namespace: str) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(worker.worker_id),
        epoch=Epoch(worker.epoch),
        role=_ROLES[worker.role],
        models=(),
        namespace=namespace,
        block_size=max(worker.block_size, 1),
        total_blocks=worker.total_blocks,
        ranks=max(worker.ranks, 1),
        draining=worker.draining,
        address=worker.address,
        metadata=dict(worker.metadata),
    )
