"""Route to the worker with the fewest active requests, whatever it has cached."""

import random
from collections.abc import Sequence

from kvmesh.core.candidates import Candidate, RoutingQuery, Scored, Selection, by_worker, draw_least


class LeastLoaded:
    """Cost = active requests; ties uniformly. Stateless."""

    name = "least_loaded"

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return the candidate with the fewest active requests."""
        scores = tuple(Scored(candidate.worker, candidate.active_requests) for candidate in by_worker(candidates))
        return Selection(worker=draw_least(scores, rng).worker, policy=self.name, scores=scores, note="least cost")
