"""Take the workers in turn, one turn per booking."""

import random
from bisect import bisect_right
from collections.abc import Sequence

from kvmesh.core.candidate_columns import CandidateColumns
from kvmesh.core.candidates import Candidate, RoutingQuery, Selection
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
        columns = CandidateColumns.of(candidates)
        last = self._last.get((query.role, query.model))
        index = 0 if last is None else bisect_right(range(len(columns)), last, key=columns.worker) % len(columns)
        note = f"after {last.worker_id} rank {last.rank}" if last is not None else "first turn"
        return Selection(worker=columns.worker(index), policy=self.name, note=note)

    def booked(self, query: RoutingQuery, worker: WorkerRank) -> None:
        """Give the turn to the one after this worker."""
        self._last[query.role, query.model] = worker
