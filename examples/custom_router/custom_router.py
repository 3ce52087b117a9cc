"""A router of one's own: a cost function over what the mesh knows of each worker, and over a figure of its own.

    score = overlap_weight * cached share of the prompt - blocks in use - requests of its queue - requests booked lately

The highest score wins. All shares are 0 to 1, so that the weights compare like with like.
"""

import random
from collections import Counter, deque
from collections.abc import Sequence

from kvmesh.core.candidates import Candidate, RoutingQuery, Scored, Selection
from kvmesh.core.ids import WorkerId, WorkerRank


class CostFunctionRouter:
    """Weighs overlap against load; options come as text: --policy-option overlap_weight=2."""

    name = "custom_router"

    def __init__(self, overlap_weight: str = "2.0", memory: str = "32") -> None:
        self._overlap_weight = float(overlap_weight)
        self._lately: deque[WorkerRank] = deque(maxlen=int(memory))

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return the best of the candidates, ties by `rng`, with every cost so that it can be explained."""
        lately = Counter(self._lately)
        scores = [Scored(each.worker, self._cost_function(query, each, lately[each.worker])) for each in candidates]
        least = min(scored.cost for scored in scores)
        chosen = rng.choice([scored for scored in scores if scored.cost == least])
        return Selection(worker=chosen.worker, policy=self.name, scores=tuple(scores), note="least cost")

    def _cost_function(self, query: RoutingQuery, candidate: Candidate, booked_lately: int) -> float:
        """Return the cost of a worker: its score, negated."""
        cached = candidate.overlap_blocks * candidate.block_size / max(query.prompt_tokens, 1)
        usage = candidate.active_blocks / max(candidate.total_blocks, 1)
        waiting = candidate.waiting_requests / max(candidate.max_requests, 1)
        return usage + waiting + booked_lately / (self._lately.maxlen or 1) - self._overlap_weight * cached

    def booked(self, query: RoutingQuery, worker: WorkerRank) -> None:
        """Remember who got a request: the figure of our own."""
        self._lately.append(worker)

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Forget a worker that is gone."""
        self._lately = deque((each for each in self._lately if each.worker_id != worker_id), self._lately.maxlen)
