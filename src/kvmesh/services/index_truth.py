"""Predictions against what requests found, at the pace of the events that explain a difference."""

import asyncio
from collections import deque
from collections.abc import Callable

from kvmesh import telemetry
from kvmesh.core.ids import AttemptKey, WorkerRank
from kvmesh.core.reservations import Reservation
from kvmesh.core.routing import RoutingCore
from kvmesh.core.truth_check import TruthCheck, TruthRules

log = telemetry.logger(__name__)

_EVENT_INTERVALS = 3
_LEAST_WAIT_S = 0.3
"""After so many intervals, and so long at least, what a worker removed before a request ended has been heard."""


class IndexTruth:
    """Judges the bookings of one router; `check` hears of removals from whoever reads the events."""

    def __init__(
        self,
        core: RoutingCore,
        rules: TruthRules | None,
        *,
        event_interval_s: Callable[[], float],
        on_drift: Callable[[WorkerRank], None],
    ) -> None:
        """Tell `on_drift` of every rank whose part of the index has proved wrong; events come every so often."""
        self.check = TruthCheck(rules)
        self._core = core
        self._event_interval_s = event_interval_s
        self._on_drift = on_drift
        self._ended: deque[tuple[float, AttemptKey, int | None]] = deque()
        """Requests to judge: when, which, and how many prompt tokens its worker had cached."""
        self._next: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Judge nothing any more. Idempotent."""
        self._ended.clear()
        if self._next is not None:
            self._next.cancel()

    def predicted(self, reservation: Reservation) -> None:
        """Remember what a booked request was told of its worker's cache. Idempotent; O(1)."""
        selection = reservation.selection
        record = self._core.record(selection.worker.worker_id)
        if record is None or selection.query is None:
            return
        self.check.booked(
            reservation.key,
            selection.worker,
            blocks=selection.query.block_hashes.get(record.block_size, ()),
            overlap_blocks=selection.overlap_blocks,
        )

    def found(self, key: AttemptKey, cached_tokens: int | None) -> None:
        """Compare that with the prompt tokens that the worker had cached, soon; None: it never said.

        Workers tell removals at intervals, and those from before the end are to count.
        """
        loop = asyncio.get_running_loop()
        wait_s = max(_EVENT_INTERVALS * self._event_interval_s(), _LEAST_WAIT_S)
        self._ended.append((loop.time() + wait_s, key, cached_tokens))
        if self._next is None:
            self._next = loop.call_at(self._ended[0][0], self._judge_ended)

    def _judge_ended(self) -> None:
        loop = asyncio.get_running_loop()
        while self._ended and self._ended[0][0] <= loop.time():
            _, key, cached_tokens = self._ended.popleft()
            self._judge(key, cached_tokens)
        self._next = loop.call_at(self._ended[0][0], self._judge_ended) if self._ended else None

    def _judge(self, key: AttemptKey, cached_tokens: int | None) -> None:
        worker = self.check.worker_of(key)
        record = self._core.record(worker.worker_id) if worker is not None else None
        cached_blocks = None
        if record is not None and cached_tokens is not None:
            cached_blocks = cached_tokens // record.block_size
        verdict = self.check.finished(key, cached_blocks=cached_blocks)
        if verdict is None:
            return
        telemetry.INDEX_PREDICTED_BLOCKS.inc(verdict.predicted)
        telemetry.INDEX_OVERPREDICTED_BLOCKS.inc(verdict.overpredicted)
        if verdict.has_drifted:
            share = self.check.overpredicted_share(verdict.worker)
            where = {"worker_id": verdict.worker.worker_id, "rank": verdict.worker.rank}
            log.warning("index.drifted", overpredicted=round(share, 3), **where)
            telemetry.INDEX_DRIFT_ALARMS.inc()
            self._on_drift(verdict.worker)
