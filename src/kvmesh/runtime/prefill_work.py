"""What makes a worker a prefill worker: it pulls tasks and lends the blocks it computes."""

from collections.abc import Sequence

from kvmesh.runtime.role import Service
from kvmesh.runtime.worker import WorkerParts
from kvmesh.services.handoff_fetch import HandoffFetch
from kvmesh.services.handoff_source import HandoffSource
from kvmesh.services.prefill_compute import PrefillCompute
from kvmesh.services.prefill_pull import PrefillPull
from kvmesh.services.prefill_worker import PrefillWorker
from kvmesh.services.prefix_fetch import PrefixFetch
from kvmesh.v1 import prefill_worker_pb2, prefill_worker_pb2_grpc, worker_events_pb2


class PrefillWork:
    """Leases tasks from the queue, computes, hands over."""

    def __init__(self, parts: WorkerParts) -> None:
        """Pull from `start` on."""
        self._fetcher = HandoffFetch(
            driver=parts.driver, channels=parts.channels, transports=parts.transports, waits=parts.waits
        )
        self._compute = PrefillCompute(
            driver=parts.driver,
            source=HandoffSource(
                identity=parts.identity, driver=parts.driver, pins=parts.pins, transports=parts.transports
            ),
            prefixes=PrefixFetch(driver=parts.driver, fetcher=self._fetcher),
        )
        self._servicer = PrefillWorker(self._compute)
        self._pull = PrefillPull(
            identity=parts.identity,
            models=parts.models,
            driver=parts.driver,
            compute=self._compute,
            peers=parts.peers,
            channels=parts.channels,
            transports=parts.transports,
            waits=parts.waits,
        )

    def __len__(self) -> int:
        return len(self._pull)

    @property
    def counters(self) -> dict[str, int]:
        """Counts since the start."""
        return self._compute.counters

    def services(self) -> Sequence[Service]:
        """PrefillWorker, the direct mode."""
        return (
            Service(
                self._servicer,
                prefill_worker_pb2.DESCRIPTOR.services_by_name["PrefillWorker"],
                prefill_worker_pb2_grpc.add_PrefillWorkerServicer_to_server,
            ),
        )

    def start(self) -> None:
        """Begin to pull."""
        self._pull.start()

    async def wait_ready(self) -> None:
        """Wait for the queue."""
        await self._pull.wait_attached()

    def shares(self) -> Sequence[worker_events_pb2.RouterShare]:
        """Tasks come from the queue: no router sent them."""
        return ()

    def reservation_ids(self, router_id: str) -> Sequence[int]:
        """None: routers book decode workers."""
        return ()

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Lease nothing new, finish what runs within `timeout_s`; return (finished, cancelled)."""
        self._servicer.draining = True
        return await self._pull.drain(timeout_s)

    async def aclose(self) -> None:
        """Stop pulling; what runs is given up."""
        await self._pull.aclose()
        await self._fetcher.aclose()
