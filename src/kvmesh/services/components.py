"""Components: discovery as programs without access to its store read it."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRecord
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.signal import Signal
from kvmesh.v1 import components_pb2, components_pb2_grpc

if TYPE_CHECKING:
    from kvmesh.v1.components_pb2_grpc import _ServicerContext as Context

_Response = components_pb2.WatchComponentsResponse

_LEAST_INTERVAL_S = 0.05
_PART_BYTES = 2**20 - 2**10
"""Of one message's workers; the rest of a MiB is for what surrounds them."""

_GONE_PER_MESSAGE = 2_048


class Components(components_pb2_grpc.ComponentsServicer):
    """Serves what one process follows of discovery."""

    def __init__(self, peers: Peers, *, namespace: str) -> None:
        """Show the roster of `peers`, which follows `namespace`."""
        self._peers = peers
        self._namespace = namespace
        self._revision = 0
        """Of the roster: whoever has shown this one waits for the next."""
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
        shown, known = self._revision, self._records()
        for response in _snapshot(known.values(), self._namespace):
            yield response
        while not self._is_closing:
            if shown == self._revision:
                await self._changed.wait()
                continue
            shown, before, known = self._revision, known, self._records()
            for response in _delta(before, known, self._namespace):
                yield response
            await asyncio.sleep(_LEAST_INTERVAL_S)  # a storm of changes is told in few messages

    async def _follow(self) -> None:
        while True:
            self._revision += 1
            self._changed.fire()
            await self._peers.changed()

    def _records(self) -> dict[WorkerId, WorkerRecord]:
        return {record.worker_id: record for record in self._peers.roster.records()}


def _snapshot(records: Collection[WorkerRecord], namespace: str) -> Iterator[_Response]:
    parts = _parts(records)
    part = next(parts, [])
    for following in parts:
        yield _Response(workers=part, namespace=namespace, snapshot=True)
        part = following
    yield _Response(workers=part, namespace=namespace, snapshot=True, snapshot_complete=True)


def _delta(
    before: Mapping[WorkerId, WorkerRecord], now: Mapping[WorkerId, WorkerRecord], namespace: str
) -> Iterator[_Response]:
    """Yield what leads from `before` to `now`: nothing where they are equal."""
    gone = [
        components_pb2.ComponentWorkerGone(worker_id=record.worker_id, epoch=record.epoch)
        for record in before.values()
        if record.worker_id not in now
    ]
    for first in range(0, len(gone), _GONE_PER_MESSAGE):
        yield _Response(namespace=namespace, gone=gone[first : first + _GONE_PER_MESSAGE])
    for part in _parts(record for record in now.values() if _is_news(record, before.get(record.worker_id))):
        yield _Response(namespace=namespace, workers=part)


def _is_news(record: WorkerRecord, before: WorkerRecord | None) -> bool:
    return record is not before and record != before


def _parts(records: Iterable[WorkerRecord]) -> Iterator[list[components_pb2.ComponentWorker]]:
    """Yield records in lists that each fit into one message, or are one record that does not."""
    part: list[components_pb2.ComponentWorker] = []
    size = 0
    for record in records:
        worker = _worker(record)
        worker_size = worker.ByteSize() + 8  # its tag and length
        if part and size + worker_size > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(worker)
        size += worker_size
    if part:
        yield part


def _worker(record: WorkerRecord) -> components_pb2.ComponentWorker:
    return components_pb2.ComponentWorker(
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
