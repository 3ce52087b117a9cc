"""Take any worker, all alike."""

import random
from collections.abc import Sequence

from kvmesh.core.candidate_columns import CandidateColumns
from kvmesh.core.candidates import Candidate, RoutingQuery, Selection


class RandomChoice:
    """Uniform. Stateless."""

    name = "random"

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return a candidate drawn from `rng`."""
        columns = CandidateColumns.of(candidates)
        return Selection(worker=columns.worker(rng.randrange(len(columns))), policy=self.name)
