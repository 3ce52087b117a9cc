"""Which prefill worker is asked directly: the one that would be through with the prompt first.

cost = tokens in flight there + tokens of the prompt that are not believed to be cached there

Only what this decode worker sent is known to be in flight: others' tasks make a worker refuse, not cost more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from kvmesh.core.ids import WorkerId


@dataclass(frozen=True, slots=True)
class PrefillCandidate:
    """A prefill worker as one decode worker sees it."""

    worker_id: WorkerId
    tokens_in_flight: int
    """Uncached tokens of this decode worker's tasks there."""
    cached_tokens: int
    """Of the prompt: believed to be in its cache."""


def choose_prefill_worker(
    candidates: Sequence[PrefillCandidate], *, prompt_tokens: int, rng: Random
) -> PrefillCandidate | None:
    """Return the candidate of the lowest cost, ties at random; None where there is none."""
    costs = [one.tokens_in_flight + max(prompt_tokens - one.cached_tokens, 0) for one in candidates]
    lowest = min(costs, default=0)
    cheapest = [one for one, cost in zip(candidates, costs, strict=True) if cost == lowest]
    return rng.choice(cheapest) if cheapest else None
