"""The figures of a replay."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.replay.outcome import Outcome

_MS = 1000.0


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles (interpolated), in milliseconds; None where there is no sample."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay found. `requests` = finished + `errors` + `lost`."""

    requests: int
    lost: int
    """Neither finished nor a typed error."""
    duplicated: int
    """Finished twice, or with more tokens than asked for."""
    short: int
    """Finished with fewer tokens than asked for, as where the context ends."""
    errors: int
    error_reasons: dict[str, int]
    """Errors by reason."""
    lost_reasons: dict[str, int]
    """Lost requests by how their streams ended."""
    hit_rate: float | None
    """Cached over prompt tokens of the finished requests, 0..1."""
    predicted_hit_rate: float | None
    """The same as the router predicted it."""
    duration_s: float
    """From the first request's time to the last stream's end."""
    schedule_lag_ms: Distribution
    """From when the trace makes a request to when it was sent: the replay's own delay."""
    ttft_ms: Distribution
    """From when a request was sent to its first token."""
    itl_ms: Distribution
    """Between two tokens; the gap before a chunk is divided over its tokens."""
    e2e_ms: Distribution
    """From when a request was sent to its finish."""


def summarise(outcomes: Sequence[Outcome], *, duration_s: float) -> ReplayResult:
    """Return the figures of requests that have all ended."""
    finished = [one for one in outcomes if one.is_finished]
    prompt_tokens = sum(one.prompt_tokens for one in finished)
    errors = Counter(one.error for one in outcomes if one.error is not None)
    lost = Counter(one.lost for one in outcomes if one.lost is not None)
    return ReplayResult(
        requests=len(outcomes),
        lost=lost.total(),
        duplicated=sum(one.is_duplicated for one in outcomes),
        short=sum(one.tokens < one.max_tokens for one in finished),
        errors=errors.total(),
        error_reasons=dict(errors.most_common()),
        lost_reasons=dict(lost.most_common()),
        hit_rate=_share(sum(one.cached_tokens for one in finished), prompt_tokens),
        predicted_hit_rate=_share(sum(one.predicted_cached_tokens for one in finished), prompt_tokens),
        duration_s=duration_s,
        # A timer of the event loop may be half a millisecond early, which is no lag.
        schedule_lag_ms=_distribution(max(one.sent_at - one.scheduled_at, 0.0) for one in outcomes),
        ttft_ms=_distribution(one.first_token_at - one.sent_at for one in outcomes if one.first_token_at is not None),
        itl_ms=_distribution_of(_token_gaps_s(outcomes)),
        e2e_ms=_distribution(one.finished_at - one.sent_at for one in finished if one.finished_at is not None),
    )


def _token_gaps_s(outcomes: Sequence[Outcome]) -> npt.NDArray[np.float64]:
    """Return one sample per token, all requests together."""
    gaps_s = [np.repeat(np.asarray(one.gaps_s), np.asarray(one.gap_tokens)) for one in outcomes if one.gaps_s]
    return np.concatenate(gaps_s) if gaps_s else np.empty(0)


def _distribution(samples_s: Iterable[float]) -> Distribution:
    return _distribution_of(np.fromiter(samples_s, dtype=np.float64))


def _distribution_of(samples_s: npt.NDArray[np.float64]) -> Distribution:
    if not len(samples_s):
        return Distribution()
    p50, p90, p99 = np.percentile(samples_s, (50, 90, 99)) * _MS
    return Distribution(float(samples_s.mean() * _MS), float(p50), float(p90), float(p99))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
