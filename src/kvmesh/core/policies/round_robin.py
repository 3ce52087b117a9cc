"""Take the workers in turn, one turn per booking."""

import random
from collections.abc import Sequence

from kvmesh.core.candidates import Candidate, RoutingQuery, Selection, by_worker
from kvmesh.core.ids import WorkerRank
from kvmesh.core.roster import WorkerRole


class RoundRobin:
    """The first candidate after the one booked last for the same model and role, in worker order."""

    name = "round_robin"

    def __init__(self) -> None:
        """Begin with the first worker."""
        self._last: dict[tuple[WorkerRole, str], WorkerRank] = {}  # as many entries as models were ever booked

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return the next in turn; until something is booked that stays the same one."""
        workers = [candidate.worker for candidate in by_worker(candidates)]
        last = self._last.get((query.role, query.model))
        later = [worker for worker in workers if last is not None and worker > last]
        note = f"after {last.worker_id} rank {last.rank}" if last is not None else "first turn"
        return Selection(worker=(later or workers)[0], policy=self.name, note=note)

    def booked(self, query: RoutingQuery, worker: WorkerRank) -> None:
        """Give the turn to the one after this worker."""
        self._last[query.role, query.model] = worker
