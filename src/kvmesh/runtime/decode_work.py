"""What makes a worker a decode worker: it owns requests until they end."""

from collections.abc import Callable, Sequence

from kvmesh.core.remote_prefill import RemotePrefillRules
from kvmesh.runtime.role import Service
from kvmesh.runtime.worker import Work, WorkerParts
from kvmesh.services.decode_requests import DecodeRequests
from kvmesh.services.decode_worker import DecodeWorker
from kvmesh.services.direct_prefills import DirectPrefills
from kvmesh.services.handoff_fetch import HandoffFetch
from kvmesh.services.handoff_source import HandoffSource
from kvmesh.services.prefills import Prefills
from kvmesh.services.queue_lookout import QueueLookout
from kvmesh.services.queued_prefills import QueuedPrefills
from kvmesh.services.remote_prefill import RemotePrefill
from kvmesh.v1 import decode_worker_pb2, decode_worker_pb2_grpc, worker_events_pb2


class DecodeWork:
    """Takes requests, has long prefills done elsewhere, decodes."""

    def __init__(
        self,
        parts: WorkerParts,
        *,
        rules: RemotePrefillRules,
        required: bool,
        direct: bool = False,
        checksums: bool = False,
    ) -> None:
        """Decide by `rules`; `required`: a failed remote prefill fails the request.

        `direct`: ask prefill workers themselves and not the queue. `checksums`: say of lent blocks what is in them.
        """
        fetcher = HandoffFetch(
            driver=parts.driver,
            channels=parts.channels,
            transports=parts.transports,
            waits=parts.waits,
            peers=parts.peers,
            kv_plane=parts.kv_plane,
        )
        self._lookout = None if direct else _lookout(parts, required=required)
        self._remote_prefill = RemotePrefill(
            driver=parts.driver,
            peers=parts.peers,
            prefills=_direct(parts) if direct else _queued(parts, rules, fetcher),
            fetcher=fetcher,
            transports=parts.transports,
            source=HandoffSource(
                identity=parts.identity,
                driver=parts.driver,
                pins=parts.pins,
                transports=parts.transports,
                checksums=checksums,
            ),
            rules=rules,
            waits=parts.waits,
            required=required,
        )
        self._requests = DecodeRequests(
            driver=parts.driver,
            models=parts.models,
            remote_prefill=self._remote_prefill,
            request_timeout_s=parts.waits.request_s,
        )
        self._requests.load_changed = parts.events.load_changed
        self._requests.load_sequence = lambda: parts.events.load_sequence
        self._servicer = DecodeWorker(self._requests, write_timeout_s=parts.waits.exchange_write_s)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def counters(self) -> dict[str, int]:
        """Counts since the start."""
        return self._requests.counters

    def services(self) -> Sequence[Service]:
        """DecodeWorker."""
        return (
            Service(
                self._servicer,
                decode_worker_pb2.DESCRIPTOR.services_by_name["DecodeWorker"],
                decode_worker_pb2_grpc.add_DecodeWorkerServicer_to_server,
            ),
        )

    def start(self) -> None:
        """Begin to look at the queue; requests come by themselves."""
        if self._lookout is not None:
            self._lookout.start()

    async def wait_ready(self) -> None:
        """Ready at once."""

    def shares(self) -> Sequence[worker_events_pb2.RouterShare]:
        """Return the load by the router that sent it."""
        return self._requests.shares()

    def reservation_ids(self, router_id: str) -> Sequence[int]:
        """Return the live reservations of one router."""
        return self._requests.reservation_ids(router_id)

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Take nothing new and end what runs within `timeout_s`; return (finished, cancelled)."""
        return await self._requests.drain(timeout_s)

    def undrain(self) -> None:
        """Take requests again. Idempotent."""
        self._requests.undrain()

    async def aclose(self) -> None:
        """End what still runs, the exchanges too."""
        if self._lookout is not None:
            await self._lookout.aclose()
        await self._requests.aclose()
        self._servicer.close()
        await self._remote_prefill.aclose()


def decode_work(
    *, rules: RemotePrefillRules, required: bool, direct: bool = False, checksums: bool = False
) -> Callable[[WorkerParts], Work]:
    """Return what builds a decode worker's work."""
    return lambda parts: DecodeWork(parts, rules=rules, required=required, direct=direct, checksums=checksums)


def _queued(parts: WorkerParts, rules: RemotePrefillRules, fetcher: HandoffFetch) -> Prefills:
    return QueuedPrefills(
        peers=parts.peers,
        channels=parts.channels,
        waits=parts.waits,
        max_queue_depth=rules.max_queue_depth,
        give_back=fetcher.give_up,
    )


def _lookout(parts: WorkerParts, *, required: bool) -> QueueLookout:
    return QueueLookout(peers=parts.peers, channels=parts.channels, readiness=parts.readiness, required=required)


def _direct(parts: WorkerParts) -> Prefills:
    return DirectPrefills(
        peers=parts.peers,
        channels=parts.channels,
        waits=parts.waits,
        block_size=parts.driver.info.block_size,
    )
