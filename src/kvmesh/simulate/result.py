"""What a simulation comes to: figures per policy, and what plots are drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution, in the unit of its numbers; None where there is nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Numbers, counts: Numbers | None = None) -> "Spread":
        """Summarise values, each counted so many times; a percentile is the least value that so many do not exceed."""
        if not len(values):
            return cls(None, None, None, None)
        weights = np.ones(len(values)) if counts is None else counts
        order = np.argsort(values, kind="stable")
        upto = np.cumsum(weights[order])
        places = np.searchsorted(upto, np.array([0.5, 0.9, 0.99]) * upto[-1])
        p50, p90, p99 = (round(float(value), 3) for value in values[order][places])
        return cls(round(float(values @ weights / upto[-1]), 3), p50, p90, p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What a simulation measured, for plots and for who wants more than the figures."""

    ttft_ms: Numbers
    """Per request, in order of the trace."""
    e2e_ms: Numbers
    gap_ms: Numbers
    """Between tokens, the distinct ones."""
    gap_count: Numbers
    """How many tokens came after each gap."""
    cached: Numbers
    """Of each request's prompt: tokens, in file order blocks."""
    prompt: Numbers
    """In the same unit."""
    arrival_s: Numbers
    sampled_s: Numbers
    """When the load was looked at."""
    load: Numbers
    """Requests on each worker then, in file order blocks computed so far, shape (samples, workers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """The figures of one policy."""

    policy: str
    requests: int
    reuse: float
    """Share of the prompts that was cached where they went: tokens; in file order blocks, begun ones counted whole."""
    balance: float
    """Uncached prompt tokens (in file order blocks) of the worker that computed most, over the mean; 1 = all alike."""
    ttft_ms: Spread
    itl_ms: Spread
    """Between one token and the next, over all tokens."""
    e2e_ms: Spread
    duration_s: float
    """Virtual seconds to the end of the last request."""
    preempted: int
    """Requests that lost their blocks while they ran."""
    uncached: tuple[int, ...]
    """What each worker had to compute, in the unit of `balance`; of prefill workers where there are any."""
    fallbacks: int
    """Requests that the router had to place itself, because the policy raised or named nobody."""
    fallback: str
    """Why, of the first of them; "" = none."""
    timeline: Timeline = field(repr=False, compare=False)


def summarise(
    policy: str,
    timeline: Timeline,
    *,
    uncached: Sequence[int],
    fallbacks: Sequence[str],
    duration_s: float,
    preempted: int = 0,
) -> PolicyResult:
    """Return the figures of what was measured."""
    return PolicyResult(
        policy=policy,
        requests=len(timeline.ttft_ms),
        reuse=float(timeline.cached.sum() / timeline.prompt.sum()),
        balance=max(uncached) * len(uncached) / sum(uncached) if any(uncached) else 1.0,
        ttft_ms=Spread.of(timeline.ttft_ms),
        itl_ms=Spread.of(timeline.gap_ms, timeline.gap_count),
        e2e_ms=Spread.of(timeline.e2e_ms),
        duration_s=duration_s,
        preempted=preempted,
        uncached=tuple(uncached),
        fallbacks=len(fallbacks),
        fallback=next(iter(fallbacks), ""),
        timeline=timeline,
    )
