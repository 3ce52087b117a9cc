"""Route to the worker with the fewest active requests, whatever it has cached."""

import random
from collections.abc import Sequence

from kvmesh.core.candidate_columns import CandidateColumns, ScoreColumns, index_of_least
from kvmesh.core.candidates import Candidate, RoutingQuery, Selection


class LeastLoaded:
    """Cost = active requests; ties uniformly. Stateless."""

    name = "least_loaded"

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return the candidate with the fewest active requests."""
        columns = CandidateColumns.of(candidates)
        costs = columns.active_requests
        worker = columns.worker(index_of_least(costs, rng))
        return Selection(worker=worker, policy=self.name, scores=ScoreColumns(columns, costs), note="least cost")
