"""Discovery within one process: the instance is shared by every role that runs in it."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from kvmesh.core.errors import ConflictError, FixRequestError, NotKnownError, Reason, TryElsewhereError
from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRecord
from kvmesh.discovery.discovery import Deleted, DiscoveryEvent, Put, Snapshot

_Key = tuple[str, WorkerId]


class MemoryDiscovery:
    """The Discovery of one process and one event loop."""

    def __init__(self, *, max_buffered: int = 1024) -> None:
        """Start empty; a watcher that is `max_buffered` events behind gets a fresh snapshot in their place."""
        self._max_buffered = max_buffered
        self._records: dict[_Key, WorkerRecord] = {}
        self._watchers: set[_Watcher] = set()
        self._is_closed = False

    async def register(self, record: WorkerRecord) -> "MemoryRegistration":
        """See Discovery.register."""
        self.put(record)
        return MemoryRegistration(self, record)

    async def watch(self, namespace: str) -> AsyncGenerator[DiscoveryEvent, None]:
        """See Discovery.watch."""
        watcher = _Watcher(namespace, self._max_buffered)
        if self._is_closed:
            watcher.close()
        self._watchers.add(watcher)
        try:
            while await watcher.has_news():
                if watcher.take_overflow():
                    yield Snapshot(self._of(namespace))
                else:
                    yield watcher.events.popleft()
        finally:
            self._watchers.discard(watcher)

    async def aclose(self) -> None:
        """See Discovery.aclose."""
        self._is_closed = True
        for watcher in self._watchers:
            watcher.close()

    def put(self, record: WorkerRecord) -> None:
        """Take a record in and tell the watchers.

        Raises: ConflictError(STALE_EPOCH) if a higher epoch is live; TryElsewhereError(DRAINING) once closed.
        """
        if self._is_closed:
            raise TryElsewhereError(Reason.DRAINING, "discovery is closed")
        key = (record.namespace, record.worker_id)
        live = self._records.get(key)
        if live is not None and live.epoch > record.epoch:
            raise ConflictError(
                Reason.STALE_EPOCH, f"{record.worker_id} is live with epoch {live.epoch}, above {record.epoch}"
            )
        self._records[key] = record
        self._tell(record.namespace, Put(record))

    def delete(self, record: WorkerRecord, *, graceful: bool) -> None:
        """Take the record of this incarnation out and tell the watchers; nothing happens if it is not live."""
        key = (record.namespace, record.worker_id)
        live = self._records.get(key)
        if live is None or live.epoch != record.epoch:
            return
        del self._records[key]
        self._tell(record.namespace, Deleted(record.worker_id, record.epoch, graceful))

    def _of(self, namespace: str) -> tuple[WorkerRecord, ...]:
        return tuple(record for (of, _), record in sorted(self._records.items()) if of == namespace)

    def _tell(self, namespace: str, event: DiscoveryEvent) -> None:
        for watcher in self._watchers:
            if watcher.namespace == namespace:
                watcher.offer(event)


class MemoryRegistration:
    """The Registration of `MemoryDiscovery`."""

    def __init__(self, discovery: MemoryDiscovery, record: WorkerRecord) -> None:
        self._discovery = discovery
        self._record = record
        self._is_stopped = False

    async def update(self, record: WorkerRecord) -> None:
        """See Registration.update."""
        for field in ("worker_id", "epoch", "namespace"):
            if getattr(record, field) != getattr(self._record, field):
                raise FixRequestError(Reason.INVALID_FIELD, f"{field} of a registration cannot change", field=field)
        if self._is_stopped:
            raise NotKnownError(Reason.NOT_FOUND, f"{record.worker_id} has stopped")
        self._discovery.put(record)
        self._record = record

    async def wait_registered(self) -> None:
        """See Registration.wait_registered; it is, from the beginning."""

    async def stop(self) -> None:
        """See Registration.stop."""
        self._is_stopped = True
        self._discovery.delete(self._record, graceful=True)

    def lose(self) -> None:
        """Delete the record as a store does that lost its lease: for tests. `update` puts it back."""
        self._discovery.delete(self._record, graceful=False)


class _Watcher:
    """The events one watch has not read yet, at most `max_buffered`; beyond that a snapshot is due in their place."""

    def __init__(self, namespace: str, max_buffered: int) -> None:
        self.namespace = namespace
        self.events: deque[DiscoveryEvent] = deque()
        self._max_buffered = max_buffered
        self._needs_snapshot = True
        self._is_closed = False
        self._wake = asyncio.Event()
        self._wake.set()

    def offer(self, event: DiscoveryEvent) -> None:
        if self._needs_snapshot:
            return  # the snapshot, taken when it is read, will show it
        if len(self.events) >= self._max_buffered:
            self.events.clear()
            self._needs_snapshot = True
        else:
            self.events.append(event)
        self._wake.set()

    def take_overflow(self) -> bool:
        due, self._needs_snapshot = self._needs_snapshot, False
        return due

    async def has_news(self) -> bool:
        """Wait for something to read; False once closed, when all is read."""
        while not self.events and not self._needs_snapshot:
            if self._is_closed:
                return False
            self._wake.clear()
            await self._wake.wait()
        return not (self._is_closed and self._needs_snapshot)

    def close(self) -> None:
        self._is_closed = True
        self._wake.set()
