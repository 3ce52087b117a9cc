"""The prefill workers of a simulation, fed by the prefill queue of the core."""

from collections.abc import Callable
from itertools import count

from kvmesh.core.errors import BackOffError
from kvmesh.core.ids import LeaseId, SequenceHash, WorkerRank
from kvmesh.core.lease_capability import Capability, WorkerCapability
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.lease_queue import LeaseQueue
from kvmesh.core.lease_task import TaskSpec
from kvmesh.core.roster import WorkerRole
from kvmesh.simulate.clock import VirtualTime
from kvmesh.simulate.cluster import EPOCH, MODEL, attempt_key, worker_rank
from kvmesh.simulate.engine import Finished, VirtualEngine
from kvmesh.simulate.options import SimulationOptions
from kvmesh.simulate.request import VirtualRequest
from kvmesh.simulate.worker import VirtualWorker

_LEASED_TASKS = 4
_LEASE_TTL_S = 1e9
"""Nobody dies here, so no lease has to be renewed."""


class PrefillSide:
    """Workers that lease when they have nothing to do."""

    def __init__(
        self,
        options: SimulationOptions,
        time: VirtualTime,
        *,
        new_engine: Callable[[], VirtualEngine],
        on_events: Callable[[WorkerRank, Finished, float], None],
        on_done: Callable[[VirtualRequest, float], None],
    ) -> None:
        """Attach the workers; `on_done` hears of every prompt that is computed."""
        self._on_events = on_events
        self._on_done = on_done
        numbers = count()
        self._queue = LeaseQueue(
            QueueLimits(lease_ttl_s=_LEASE_TTL_S), new_lease_id=lambda: LeaseId(str(next(numbers)))
        )
        self._requirement = Capability(MODEL, options.block_size, dtype="", layout="")
        capability = WorkerCapability(frozenset({MODEL}), options.block_size, dtype="", layout="")
        self._leases: dict[int, LeaseId] = {}
        self.workers = [
            VirtualWorker(worker_rank(WorkerRole.PREFILL, number), new_engine(), time, on_finish=self._finish)
            for number in range(options.prefill_workers)
        ]
        for worker in self.workers:
            self._queue.attach(worker.rank.worker_id, EPOCH, capability, now=0.0)

    @property
    def depth(self) -> int:
        """Tasks that wait in the queue."""
        return self._queue.stats().queued

    def submit(
        self, row: int, *, prompt_tokens: int, hashes: tuple[SequenceHash, ...], cached: int, now: float
    ) -> bool:
        """Queue a prefill, `cached` tokens of which its decode worker has; False if the queue is full."""
        spec = TaskSpec(
            attempt_key(row),
            content=b"",
            requirement=self._requirement,
            uncached_tokens=prompt_tokens - cached,
            block_hashes=hashes,
        )
        try:
            self._queue.submit(spec, payload=(row, prompt_tokens, hashes), now=now)
        except BackOffError:
            return False
        for worker in self.workers:
            if not worker.engine.requests:
                self._lease(worker, now=now)
        return True

    def _lease(self, worker: VirtualWorker, *, now: float) -> None:
        grants = self._queue.lease(
            worker.rank.worker_id,
            EPOCH,
            max_tasks=_LEASED_TASKS,
            max_tokens=worker.engine.limits.max_batched_tokens,
            now=now,
            holds=worker.engine.pool.cached_prefix,
        )
        for grant in grants:
            row, prompt_tokens, hashes = grant.payload
            self._leases[row] = grant.lease_id
            worker.add(VirtualRequest(row, prompt_tokens, 0, list(hashes)), now=now)
        self._queue.take_effects()

    def _finish(self, worker: VirtualWorker, finished: Finished, now: float) -> None:
        self._on_events(worker.rank, finished, now)
        for request in finished.ended:
            self._queue.complete(attempt_key(request.number), self._leases.pop(request.number), None, now=now)
            self._on_done(request, now)
        if not worker.engine.requests:
            self._lease(worker, now=now)
