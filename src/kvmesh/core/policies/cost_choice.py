"""From costs to a choice, for every policy that has costs.

Temperature 0 takes the least, ties uniformly; above 0 a softmax over -cost, range-normalised to [0, 1]. The imbalance
guard is SGLang's (github.com/sgl-project/sglang), here per candidate: it bars the busy ones and leaves the rest their
affinity. It sees only candidates that may be chosen, so an idle but unhealthy worker bars nobody.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvmesh.core.candidate_columns import CandidateColumns, Column, index_of_least
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import WorkerRank
from kvmesh.core.lineup import Flags


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

    def flags_of(self, active_requests: Column) -> Flags:
        """Return True at those too busy beside the least busy one, never at that one."""
        least = active_requests.min()
        flags: Flags = (active_requests - least > self.absolute) & (active_requests > self.relative * least)
        return flags


@dataclass(frozen=True, slots=True)
class Choice:
    """One candidate, and why."""

    worker: WorkerRank
    note: str
    why_barred: Callable[[int], str]
    """Of the candidate at an index; "" if it was not."""


def choose(
    candidates: CandidateColumns,
    costs: Column,
    *,
    temperature: float,
    guard: ImbalanceGuard | None,
    rng: random.Random,
) -> Choice:
    """Return the candidate of least cost, or drawn by temperature, of those that the guard leaves."""
    barred = None if guard is None else guard.flags_of(candidates.active_requests)
    allowed = None if barred is None or not np.count_nonzero(barred) else (~barred).nonzero()[0]
    open_costs = costs if allowed is None else costs[allowed]
    if temperature > 0:
        index = rng.choices(range(len(open_costs)), softmax_weights(open_costs, temperature))[0]
        note = f"drawn at temperature {temperature:g}"
    else:
        index = index_of_least(open_costs, rng)
        note = "least cost"
    worker = candidates.worker(index if allowed is None else int(allowed[index]))
    return Choice(worker, note, _nobody if barred is None else _Barred(candidates.active_requests, barred))


def softmax_weights(costs: Sequence[float] | Column, temperature: float) -> list[float]:
    """Return the weight of each cost, highest 1, not normalised: exp(-(cost - least) / range / temperature)."""
    column = np.asarray(costs, np.float64)
    least = column.min()
    spread = column.max() - least
    if spread == 0:
        return [1.0] * len(column)
    with np.errstate(over="ignore", under="ignore"):  # what is too unlikely for a number is 0
        weights: list[float] = np.exp(-((column - least) / spread / temperature)).tolist()
    return weights


def _nobody(_index: int) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class _Barred:
    """Says of the barred candidates that they are."""

    active_requests: Column
    flags: Flags

    def __call__(self, index: int) -> str:
        if not self.flags[index]:
            return ""
        return f"barred: {self.active_requests[index]:.0f} requests, another has {self.active_requests.min():.0f}"
