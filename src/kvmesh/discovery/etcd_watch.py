"""Follows one namespace of etcd through whatever happens to the connection and the store.

    unknown -- list --> resuming
    watching -- the stream ends --> resuming
    resuming -- watch from the next revision, and the store's history is still ours --> watching
    resuming -- compacted, emptied, or another store --> unknown
    any -- etcd does not answer --> the same, after a pause; the last view stands and nothing is told

A store that was emptied may have grown past our revision before we look: then neither its revision nor its cluster id
betrays it. So a key that we know is looked up at the revision that we know: same change, same lease, same history. The
look comes after the stream is open, since a store that is emptied later ends the stream.
"""

from kvmesh import telemetry
from kvmesh.discovery.discovery import DiscoveryEvent, Snapshot
from kvmesh.discovery.etcd_client import EtcdClient, EtcdUnavailableError, EtcdWatchStream, RevisionGoneError
from kvmesh.discovery.etcd_records import namespace_prefix
from kvmesh.discovery.etcd_retry import Retry
from kvmesh.discovery.etcd_view import RecordView

log = telemetry.logger(__name__)


class EtcdWatch:
    """One watcher's place in the store's history; not to be read by two tasks."""

    def __init__(self, client: EtcdClient, namespace: str) -> None:
        """Begin at the first `read`."""
        self._client = client
        self._prefix = namespace_prefix(namespace)
        self._view = RecordView()
        self._cluster_id = 0
        self._revision: int | None = None
        """All up to it is in the view; None: unknown."""
        self._stream: EtcdWatchStream | None = None
        self._retry = Retry("watch", namespace=namespace)

    async def read(self) -> list[DiscoveryEvent]:
        """Return what is new, at least one event, however long that takes; first of all a Snapshot."""
        while True:
            try:
                if self._revision is None:
                    return [await self._list()]
                if self._stream is None:
                    self._stream = await self._resume(self._revision)
                    self._retry.succeeded()
                if events := await self._read(self._stream):
                    return events
            except RevisionGoneError as exc:
                log.info("discovery.history_gone", reason=str(exc))
                self.close()
                self._revision = None
            except EtcdUnavailableError as exc:
                self.close()
                await self._retry.failed(exc)

    def close(self) -> None:
        """End the stream; no `read` may be running. Idempotent."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    async def _list(self) -> Snapshot:
        listing = await self._client.list(self._prefix)
        self._cluster_id, self._revision = listing.header.cluster_id, listing.header.revision
        telemetry.DISCOVERY_SNAPSHOTS.inc()
        return self._view.reset(listing.kvs)

    async def _resume(self, revision: int) -> EtcdWatchStream:
        """Watch from the next revision on.

        Raises: RevisionGoneError if the store's history is not what we know; EtcdUnavailableError.
        """
        stream = await self._client.watch(self._prefix, start_revision=revision + 1)
        try:
            await self._check_history(revision)
        except BaseException:
            stream.close()
            raise
        return stream

    async def _check_history(self, revision: int) -> None:
        witness = self._view.witness()
        if witness is None:
            answer = await self._client.list(self._prefix)
            # We know that nothing stood there at our revision: all that stands there now came later.
            is_ours = answer.header.revision >= revision and all(kv.mod_revision > revision for kv in answer.kvs)
        else:
            answer = await self._client.get(witness.key, revision=revision)
            is_ours = [(kv.mod_revision, kv.lease_id) for kv in answer.kvs] == [
                (witness.mod_revision, witness.lease_id)
            ]
        if answer.header.cluster_id != self._cluster_id or not is_ours:
            raise RevisionGoneError("another store, or one that was emptied")

    async def _read(self, stream: EtcdWatchStream) -> list[DiscoveryEvent]:
        response = await stream.read()
        if not response.events:
            self._revision = response.header.revision  # a notice of progress: all up to here was sent
            return []
        # Not the header's: it may be ahead of the events.
        self._revision = response.events[-1].kv.mod_revision
        return self._view.apply(response.events)
