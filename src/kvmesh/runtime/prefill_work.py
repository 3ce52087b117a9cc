"""What makes a worker a prefill worker: it pulls tasks, or is asked for them, and lends the blocks it computes."""

import asyncio
from collections.abc import Callable, Sequence

from kvmesh.runtime.role import Service
from kvmesh.runtime.worker import Work, WorkerParts
from kvmesh.services.handoff_fetch import HandoffFetch
from kvmesh.services.handoff_source import HandoffSource
from kvmesh.services.prefill_compute import PrefillCompute
from kvmesh.services.prefill_pull import PrefillPull
from kvmesh.services.prefill_worker import PrefillWorker
from kvmesh.services.prefix_fetch import PrefixFetch
from kvmesh.v1 import prefill_worker_pb2, prefill_worker_pb2_grpc, worker_events_pb2


class PrefillWork:
    """Leases tasks from the queue, or takes those that come directly; computes, hands over."""

    def __init__(
        self, parts: WorkerParts, *, pulls: bool = True, max_direct_tasks: int = 32, checksums: bool = False
    ) -> None:
        """Pull from `start` on, unless `pulls` is False: then tasks come directly alone, so many at once.

        `checksums`: say of each block what its bytes are.
        """
        self._pulls = pulls
        self._fetcher = HandoffFetch(
            driver=parts.driver,
            channels=parts.channels,
            transports=parts.transports,
            waits=parts.waits,
            peers=parts.peers,
            kv_plane=parts.kv_plane,
        )
        self._compute = PrefillCompute(
            driver=parts.driver,
            source=HandoffSource(
                identity=parts.identity,
                driver=parts.driver,
                pins=parts.pins,
                transports=parts.transports,
                checksums=checksums,
            ),
            prefixes=PrefixFetch(driver=parts.driver, fetcher=self._fetcher),
        )
        self._servicer = PrefillWorker(self._compute, max_tasks=max_direct_tasks)
        self._pull = PrefillPull(
            identity=parts.identity,
            models=parts.models,
            driver=parts.driver,
            compute=self._compute,
            peers=parts.peers,
            channels=parts.channels,
            transports=parts.transports,
            readiness=parts.readiness,
            waits=parts.waits,
        )

    def __len__(self) -> int:
        return len(self._pull) + len(self._servicer)

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
        if self._pulls:
            self._pull.start()

    async def wait_ready(self) -> None:
        """Wait for the queue, where tasks come from it."""
        if self._pulls:
            await self._pull.wait_attached()

    def shares(self) -> Sequence[worker_events_pb2.RouterShare]:
        """Tasks come from the queue: no router sent them."""
        return ()

    def reservation_ids(self, router_id: str) -> Sequence[int]:
        """None: routers book decode workers."""
        return ()

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Take nothing new, finish what runs within `timeout_s`; return (finished, cancelled)."""
        counts = await asyncio.gather(self._pull.drain(timeout_s), self._servicer.drain(timeout_s))
        return sum(finished for finished, _ in counts), sum(cancelled for _, cancelled in counts)

    def undrain(self) -> None:
        """Take tasks again. Idempotent."""
        self._servicer.undrain()
        if self._pulls:
            self._pull.undrain()

    async def aclose(self) -> None:
        """Stop pulling; what runs is given up."""
        await self._pull.aclose()
        await self._fetcher.aclose()


def prefill_work(*, pulls: bool, max_direct_tasks: int, checksums: bool) -> Callable[[WorkerParts], Work]:
    """Return what builds a prefill worker's work."""
    return lambda parts: PrefillWork(parts, pulls=pulls, max_direct_tasks=max_direct_tasks, checksums=checksums)
