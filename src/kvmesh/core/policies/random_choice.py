"""Take any worker, all alike."""

import random
from collections.abc import Sequence

from kvmesh.core.candidates import Candidate, RoutingQuery, Selection, by_worker


class RandomChoice:
    """Uniform. Stateless."""

    name = "random"

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return a candidate drawn from `rng`."""
        return Selection(worker=rng.choice(by_worker(candidates)).worker, policy=self.name)
