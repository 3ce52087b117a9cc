"""The attached prefill workers: one incarnation of each, and what they can do together."""

from dataclasses import dataclass

from kvmesh.core.errors import ConflictError, Reason, TryElsewhereError
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.lease_capability import Capability, WorkerCapability, closest_mismatch


@dataclass(frozen=True, slots=True)
class AttachedWorker:
    """One worker that may lease."""

    worker_id: WorkerId
    epoch: Epoch
    capability: WorkerCapability
    draining: bool = False
    """It gets no further leases."""


class AttachedWorkers:
    """The highest live epoch of each worker_id."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, AttachedWorker] = {}
        self._offers: frozenset[WorkerCapability] = frozenset()
        """What the workers that take leases can do: few distinct values, whatever their number."""

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def draining(self) -> int:
        """Workers that drain."""
        return sum(worker.draining for worker in self._workers.values())

    def get(self, worker_id: WorkerId) -> AttachedWorker | None:
        """Return the attached incarnation."""
        return self._workers.get(worker_id)

    def put(self, worker: AttachedWorker) -> None:
        """Attach a worker or replace what is known of it. O(workers)."""
        self._workers[worker.worker_id] = worker
        self._note_offers()

    def remove(self, worker_id: WorkerId) -> None:
        """Forget a worker. O(workers)."""
        del self._workers[worker_id]
        self._note_offers()

    def refuse_stale(self, worker_id: WorkerId, epoch: Epoch) -> None:
        """Raise ConflictError(STALE_EPOCH) if a higher epoch is attached."""
        worker = self._workers.get(worker_id)
        if worker is not None and epoch < worker.epoch:
            raise ConflictError(
                Reason.STALE_EPOCH,
                f"{worker_id} is attached with epoch {worker.epoch}, not {epoch}",
                metadata={"epoch": str(epoch), "attached_epoch": str(worker.epoch)},
            )

    def require(self, worker_id: WorkerId, epoch: Epoch) -> AttachedWorker:
        """Return this incarnation. Raises: ConflictError(NOT_ATTACHED), ConflictError(STALE_EPOCH)."""
        self.refuse_stale(worker_id, epoch)
        worker = self._workers.get(worker_id)
        if worker is None or worker.epoch != epoch:
            raise ConflictError(Reason.NOT_ATTACHED, f"{worker_id} epoch {epoch} is not attached")
        return worker

    def require_capable(self, requirement: Capability) -> None:
        """Raise TryElsewhereError(NO_CAPABLE_WORKER) if workers take leases, but none that can do this."""
        if not self._offers or any(offer.meets(requirement) for offer in self._offers):
            return
        mismatch = closest_mismatch(self._offers, requirement)
        raise TryElsewhereError(
            Reason.NO_CAPABLE_WORKER,
            f"the task requires {mismatch.field} {mismatch.required!r}, the workers offer {mismatch.offered!r}",
            metadata={"capability": mismatch.field, "required": mismatch.required, "offered": mismatch.offered},
        )

    def _note_offers(self) -> None:
        self._offers = frozenset(worker.capability for worker in self._workers.values() if not worker.draining)
