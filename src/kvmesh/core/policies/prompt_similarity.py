"""Route a prompt to the worker whose first prompt reads most like it: the demonstration policy.

    1. the most similar remembered prompt, if its similarity reaches the threshold;
    2. else the first worker, by name, that has no prompt yet;
    3. else the most similar one all the same.

Similarity is difflib's ratio of the remembered prompt to the new one, 0..1. Equals go to the first by name, so the
choice is deterministic. What a worker remembers is the first prompt booked on it, until the worker is gone.
Cost = -similarity.
"""

import random
from collections.abc import Sequence
from difflib import SequenceMatcher

from kvmesh.core.candidate_columns import CandidateColumns
from kvmesh.core.candidates import Candidate, RoutingQuery, Scored, Selection
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import WorkerId, WorkerRank

_COMPARED_CHARACTERS = 512
"""The comparison is quadratic and runs between two requests: only the head of a prompt is remembered and compared."""


class PromptSimilarity:
    """String similarity in place of a KV cache; one prompt per worker rank and model is kept."""

    name = "prompt_similarity"

    def __init__(self, threshold: float = 0.6) -> None:
        """Take prompts of at least this similarity, 0..1, for the same. Raises: FixRequestError(INVALID_FIELD)."""
        if not 0 <= threshold <= 1:
            raise FixRequestError(Reason.INVALID_FIELD, f"threshold {threshold} is not in 0..1", field="threshold")
        self._threshold = threshold
        self._prompts: dict[WorkerRank, dict[str, str]] = {}

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return the worker by the rule above. Raises: FixRequestError(INVALID_FIELD) if the query has no text."""
        if query.prompt_text is None:
            raise FixRequestError(Reason.INVALID_FIELD, f"{self.name} needs the prompt's text", field="prompt_text")
        matcher = SequenceMatcher(None, b=query.prompt_text[:_COMPARED_CHARACTERS], autojunk=False)
        scores = []
        cold = []
        columns = CandidateColumns.of(candidates)
        for worker in map(columns.worker, range(len(columns))):
            remembered = self._prompts.get(worker, {}).get(query.model)
            if remembered is None:
                cold.append(worker)
                scores.append(Scored(worker, 0.0, note="has no prompt yet"))
            else:
                matcher.set_seq1(remembered)
                scores.append(Scored(worker, -matcher.ratio()))
        warm = [scored for scored in scores if not scored.note]
        best = min(warm, key=lambda scored: scored.cost, default=None)
        is_similar = best is not None and -best.cost >= self._threshold
        worker = best.worker if best is not None and (is_similar or not cold) else cold[0]
        return Selection(
            worker=worker,
            policy=self.name,
            scores=tuple(scores),
            knobs={"threshold": self._threshold},
            note="similar" if is_similar else "first without a prompt" if cold else "most similar, below the threshold",
        )

    def booked(self, query: RoutingQuery, worker: WorkerRank) -> None:
        """Remember the prompt if it is the worker's first."""
        if query.prompt_text is not None:
            prompts = self._prompts.setdefault(worker, {})
            prompts.setdefault(query.model, query.prompt_text[:_COMPARED_CHARACTERS])

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Forget the prompts of every rank of a worker."""
        for worker in [known for known in self._prompts if known.worker_id == worker_id]:
            del self._prompts[worker]
