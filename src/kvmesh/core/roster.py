"""Who serves what: the workers that discovery says are alive.

Laws:
    - a worker_id has at most one record, that of its highest live epoch; a lower one is ignored and said so;
    - `of` lists workers in worker_id order, so that nothing downstream depends on the order of arrival.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.hashing import require_block_size
from kvmesh.core.ids import Epoch, WorkerId, WorkerRank


class WorkerRole(Enum):
    """What a registered process does; routers score candidates of the asked role only."""

    DECODE = "decode"
    PREFILL = "prefill"
    QUEUE = "queue"
    """The prefill queue: found through discovery like a worker, and never a candidate."""
    ROUTER = "router"
    """A router of its own process; never a candidate."""
    PROCESSOR = "processor"
    """A processor of its own process; never a candidate."""
    COMPONENT = "component"
    """A component written with the SDK; never a candidate."""

    @property
    def is_worker(self) -> bool:
        """Tell whether it has an engine, and so a load and a cache."""
        return self in (WorkerRole.DECODE, WorkerRole.PREFILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """What one incarnation of a worker says of itself through discovery."""

    worker_id: WorkerId
    epoch: Epoch
    role: WorkerRole = WorkerRole.DECODE
    models: tuple[str, ...]
    namespace: str = "default"
    block_size: int
    """Tokens in a block."""
    total_blocks: int = 0
    """Blocks in the KV pool of one rank; 0 when it keeps no KV cache."""
    max_requests: int = 0
    """Requests one rank runs at once; 0 = not said."""
    labels: Mapping[str, str] = field(default_factory=dict)
    accepts: frozenset[str] = frozenset()
    """Prompt forms its engine reads, e.g. `tokens`."""
    ranks: int = 1
    """Data-parallel ranks, each with a cache and a load of its own."""
    draining: bool = False
    """It finishes what it has and takes nothing new."""
    address: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Transport metadata; opaque here."""
    worker_ranks: tuple[WorkerRank, ...] = field(init=False, compare=False, repr=False)
    """Every rank of this worker, in order."""

    def __post_init__(self) -> None:
        require_block_size(self.block_size)
        if self.ranks < 1:
            raise FixRequestError(
                Reason.INVALID_FIELD, f"{self.worker_id}: ranks {self.ranks} is below 1", field="ranks"
            )
        ranks = tuple(WorkerRank(self.worker_id, rank) for rank in range(self.ranks))
        object.__setattr__(self, "worker_ranks", ranks)  # once: every routed request reads them of every worker


class RosterOutcome(Enum):
    """What a change did to the roster."""

    ADDED = "added"
    UPDATED = "updated"
    """Same epoch, newer facts."""
    RESTARTED = "restarted"
    """A higher epoch took the place of the one before: what was known of that one is void."""
    REMOVED = "removed"
    STALE_EPOCH = "stale_epoch"
    """Ignored: it is not of the live incarnation of this worker_id."""


class Roster:
    """The live record of every worker; not thread-safe."""

    def __init__(self) -> None:
        """Start empty."""
        self._records: dict[WorkerId, WorkerRecord] = {}
        self._served: dict[tuple[WorkerRole, str], tuple[WorkerRecord, ...]] = {}
        self._block_sizes: dict[tuple[WorkerRole, str], frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: WorkerRecord) -> RosterOutcome:
        """Take a record in unless a higher epoch of its worker_id is alive. Idempotent."""
        before = self._records.get(record.worker_id)
        if before is not None and before.epoch > record.epoch:
            return RosterOutcome.STALE_EPOCH
        self._records[record.worker_id] = record
        self._forget_served()
        if before is None:
            return RosterOutcome.ADDED
        return RosterOutcome.UPDATED if before.epoch == record.epoch else RosterOutcome.RESTARTED

    def remove(self, worker_id: WorkerId, epoch: Epoch) -> RosterOutcome:
        """Forget this incarnation unless it is not the live one."""
        record = self._records.get(worker_id)
        if record is None or record.epoch != epoch:
            return RosterOutcome.STALE_EPOCH
        del self._records[worker_id]
        self._forget_served()
        return RosterOutcome.REMOVED

    def get(self, worker_id: WorkerId) -> WorkerRecord | None:
        """Return the live record, or None."""
        return self._records.get(worker_id)

    def is_live(self, worker: WorkerRank, epoch: Epoch) -> bool:
        """Tell whether this rank belongs to the live incarnation of its worker."""
        record = self._records.get(worker.worker_id)
        return record is not None and record.epoch == epoch and 0 <= worker.rank < record.ranks

    def of(self, role: WorkerRole, model: str) -> tuple[WorkerRecord, ...]:
        """Return the workers of a role that serve a model, draining ones too, by worker_id. O(1) while none changes."""
        served = self._served.get((role, model))
        if served is None:
            served = tuple(record for record in self.records(role) if model in record.models)
            if served:  # names that nobody serves come from strangers: remembering them would have no bound
                self._served[role, model] = served
        return served

    def block_sizes(self, role: WorkerRole, model: str) -> frozenset[int]:
        """Return the block sizes of those workers. O(1) while none changes."""
        sizes = self._block_sizes.get((role, model))
        if sizes is None:
            served = self.of(role, model)
            sizes = frozenset(record.block_size for record in served)
            if served:
                self._block_sizes[role, model] = sizes
        return sizes

    def records(self, role: WorkerRole | None = None) -> tuple[WorkerRecord, ...]:
        """Return every worker, or those of one role, by worker_id."""
        return tuple(record for _, record in sorted(self._records.items()) if role is None or record.role is role)

    def models(self) -> frozenset[str]:
        """Return every model that any worker serves."""
        return frozenset(model for record in self._records.values() for model in record.models)

    def _forget_served(self) -> None:
        self._served.clear()
        self._block_sizes.clear()
