"""Route to the worker that costs least, counted in blocks it must compute and hold.

    cost = scale * max(prefill_blocks - credit * overlap_blocks, 0) + decode_blocks + request_weight * active_requests

    prefill_blocks = (active_prefill_tokens + prompt_tokens) / block_size
    decode_blocks  = active blocks + the request's blocks not already active there

Temperature 0 takes the least, ties uniformly; above 0 a softmax over -cost, range-normalised to [0, 1]. The form is
that of the KV router of NVIDIA Dynamo (github.com/ai-dynamo/dynamo); the imbalance guard is SGLang's
(github.com/sgl-project/sglang), here per candidate: it bars the busy ones and leaves the rest their affinity.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvmesh.core.candidates import (
    Candidate,
    CostOverrides,
    RoutingQuery,
    Scored,
    Selection,
    Terms,
    by_worker,
    draw_least,
)
from kvmesh.core.errors import FixRequestError, Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class CostKnobs:
    """Weights of the cost."""

    overlap_credit: float = 1.0
    prefill_scale: float = 1.0
    request_weight: float = 0.0
    """Blocks that one active request counts as."""
    temperature: float = 0.0

    def __post_init__(self) -> None:
        CostOverrides(**self.as_mapping())  # the same ranges

    def overridden_by(self, overrides: CostOverrides) -> "CostKnobs":
        """Return these knobs with those the request sets in their place."""
        changes = {name: getattr(overrides, name) for name in self.as_mapping() if getattr(overrides, name) is not None}
        return replace(self, **changes) if changes else self

    def as_mapping(self) -> dict[str, float]:
        """Return the knobs by name."""
        return {
            "overlap_credit": self.overlap_credit,
            "prefill_scale": self.prefill_scale,
            "request_weight": self.request_weight,
            "temperature": self.temperature,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ImbalanceGuard:
    """Bars candidates far busier than the least busy one, whatever they have cached.

    Affinity feeds on itself: a busy worker caches more and so attracts more. Both bounds must be passed to be barred.
    """

    absolute: int
    """Active requests above those of the least busy candidate."""
    relative: float
    """Times the active requests of the least busy candidate."""

    def __post_init__(self) -> None:
        if self.absolute < 0 or not self.relative >= 1:
            raise FixRequestError(
                Reason.INVALID_FIELD, f"{self}: absolute must be >= 0 and relative >= 1", field="imbalance_guard"
            )

    def is_barred(self, candidate: Candidate, *, least_requests: int) -> bool:
        """Tell whether this candidate is too busy beside the least busy one."""
        requests = candidate.active_requests
        return requests - least_requests > self.absolute and requests > self.relative * least_requests


def cost_terms(candidate: Candidate, *, prompt_tokens: int, knobs: CostKnobs) -> Terms:
    """Compute every term of the cost of a candidate."""
    prefill_blocks = (candidate.active_prefill_tokens + prompt_tokens) / candidate.block_size
    credit_blocks = knobs.overlap_credit * candidate.overlap_blocks
    return Terms(
        prefill_blocks=prefill_blocks,
        credit_blocks=credit_blocks,
        prefill_cost=knobs.prefill_scale * max(prefill_blocks - credit_blocks, 0.0),
        decode_cost=candidate.decode_blocks,
        request_cost=knobs.request_weight * candidate.active_requests,
    )


def softmax_weights(costs: Sequence[float], temperature: float) -> list[float]:
    """Return the weight of each cost, highest 1, not normalised: exp(-(cost - least) / range / temperature)."""
    least = min(costs)
    spread = max(costs) - least
    if spread == 0:
        return [1.0] * len(costs)
    return [math.exp(-(cost - least) / spread / temperature) for cost in costs]


class KvAware:
    """The default policy: cached prefix against load. Stateless.

    The guard sees only candidates that may be chosen, so an idle but unhealthy worker bars nobody.
    """

    name = "kv_aware"

    def __init__(self, knobs: CostKnobs | None = None, *, imbalance_guard: ImbalanceGuard | None = None) -> None:
        """Use the anchor's weights and no guard unless told otherwise."""
        self._knobs = knobs or CostKnobs()
        self._guard = imbalance_guard

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return the candidate of least cost, or drawn by temperature."""
        knobs = self._knobs.overridden_by(query.hints.overrides)
        ordered = by_worker(candidates)
        scores = tuple(self._score(ordered, prompt_tokens=query.prompt_tokens, knobs=knobs))
        open_scores = [scored for scored in scores if not scored.note]
        if knobs.temperature > 0:
            weights = softmax_weights([scored.cost for scored in open_scores], knobs.temperature)
            chosen = rng.choices(open_scores, weights)[0]
            note = f"drawn at temperature {knobs.temperature:g}"
        else:
            chosen = draw_least(open_scores, rng)
            note = "least cost"
        return Selection(worker=chosen.worker, policy=self.name, scores=scores, knobs=knobs.as_mapping(), note=note)

    def _score(self, candidates: Sequence[Candidate], *, prompt_tokens: int, knobs: CostKnobs) -> Iterator[Scored]:
        least_requests = min(candidate.active_requests for candidate in candidates)
        for candidate in candidates:
            terms = cost_terms(candidate, prompt_tokens=prompt_tokens, knobs=knobs)
            is_barred = self._guard is not None and self._guard.is_barred(candidate, least_requests=least_requests)
            note = f"barred: {candidate.active_requests} requests, another has {least_requests}" if is_barred else ""
            yield Scored(candidate.worker, terms.cost, terms, note)
