"""What a router counts of its decisions, its bookings and its index."""

import time
from collections.abc import Callable
from functools import cache

from prometheus_client import Counter, Histogram

from kvmesh import telemetry
from kvmesh.core.candidates import Selection
from kvmesh.core.errors import MeshError
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore

log = telemetry.logger(__name__)

_FAULT_INTERVAL_S = 10.0
"""Between two log lines of a policy that goes on failing."""


class RouterMetrics:
    """Counts for one router."""

    def __init__(self, policy_name: str, index: str, *, now: Callable[[], float] = time.monotonic) -> None:
        """Name the policy in what is counted; `index` is what caches are known by."""
        self._policy_name = policy_name
        self._now = now
        self._failed: set[str] = set()
        self._unlogged = 0
        self._logged_at = 0.0
        self._fallbacks = telemetry.ROUTING_FALLBACKS.labels(policy=policy_name)
        telemetry.INDEX_MODE.labels(mode=index).set(1)

    def chosen(self, selection: Selection, record: WorkerRecord | None, *, is_booked: bool) -> None:
        """Count a decision; `record` is the chosen worker's."""
        telemetry.ROUTING_DECISIONS.labels(policy=selection.policy).inc()
        _outcomes("booked" if is_booked else "selected").inc()
        if is_booked and record is not None and selection.query is not None:
            telemetry.ROUTED_PROMPT_TOKENS.inc(selection.query.prompt_tokens)
            telemetry.ROUTED_CACHED_TOKENS.inc(selection.overlap_blocks * record.block_size)
        if selection.is_staleness_ignored:
            telemetry.ROUTING_STALENESS_IGNORED.inc()
        if selection.fallback:
            self._fallbacks.inc()

    def policy_failed(self, method: str, fault: str, error: BaseException | None) -> None:
        """Log that a method of the policy failed: with its traceback the first time, then once in a while."""
        if method == "booked":  # one that failed to select is counted with its choice
            self._fallbacks.inc()
        self._unlogged += 1
        is_first = method not in self._failed
        self._failed.add(method)
        if is_first or self._now() - self._logged_at >= _FAULT_INTERVAL_S:
            log.warning(
                "policy.failed", policy=self._policy_name, fault=fault, failures=self._unlogged,
                exc_info=error if is_first else None,
            )  # fmt: skip
            self._unlogged, self._logged_at = 0, self._now()

    def refused(self, error: MeshError) -> None:
        """Count a decision that chose nobody."""
        _outcomes(error.reason.value.lower()).inc()

    def look_at(self, core: RoutingCore, *, now: float) -> None:
        """Set the gauges; O(workers)."""
        stats = core.index_stats
        telemetry.INDEX_PAIRS.set(stats.pairs)
        telemetry.INDEX_BLOCKS.set(stats.keys)
        telemetry.INDEX_ASIDE.set(stats.aside_pairs)
        telemetry.RESERVATIONS.set(sum(worker.reservations for worker in core.workers(now=now)))


def observe_stage(stage: str, seconds: float) -> None:
    """Note how long a stage of a decision took: hash, match, load, select, or total for all but hash."""
    _stages(stage).observe(seconds)


@cache
def _outcomes(outcome: str) -> Counter:
    return telemetry.ROUTING_OUTCOMES.labels(outcome=outcome)


@cache
def _stages(stage: str) -> Histogram:
    return telemetry.ROUTING_STAGE.labels(stage=stage)
