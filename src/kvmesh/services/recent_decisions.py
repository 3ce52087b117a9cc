"""What a router decided lately, for those who watch.

A decision costs one append of what exists anyway; it is put into words when somebody watches, never before. Memory is
bounded twice, because one decision among a thousand workers is as large as five hundred among two.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import NamedTuple

from kvmesh.core.candidate_columns import shortened
from kvmesh.core.candidates import Selection
from kvmesh.core.ids import AttemptKey
from kvmesh.services.signal import Signal
from kvmesh.v1 import router_pb2
from kvmesh.wire.routing_answers import explanation_to_proto

MAX_DECISIONS = 64
_MAX_CANDIDATES = 20_000


class _Kept(NamedTuple):  # a dataclass would take longer to make than all the rest of `put`
    sequence: int
    decided_at_s: float
    selection: Selection
    booking: AttemptKey | None
    size: int


class RecentDecisions:
    """The last decisions of one router, all methods for its event loop."""

    def __init__(self, *, max_decisions: int = MAX_DECISIONS, max_candidates: int = _MAX_CANDIDATES) -> None:
        """Keep so many, of so many candidates in all; the newest always."""
        self._max_decisions = max_decisions
        self._max_candidates = max_candidates
        self._kept: deque[_Kept] = deque()
        self._size = 0
        self._last = 0
        self._watchers = 0
        self._news = Signal()
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End every watch. Idempotent."""
        self._closing.set()
        self._news.fire()

    def put(self, selection: Selection, booking: AttemptKey | None) -> None:
        """Take a decision. O(1) amortised."""
        self._last += 1
        size = len(selection.candidates) + len(selection.excluded)
        self._kept.append(_Kept(self._last, time.time(), selection, booking, size))
        self._size += size
        while len(self._kept) > 1 and (len(self._kept) > self._max_decisions or self._size > self._max_candidates):
            self._size -= self._kept.popleft().size
        if self._watchers:
            self._news.fire()

    async def watch(
        self, *, interval_s: float, max_decisions: int, max_candidates: int
    ) -> AsyncGenerator[router_pb2.WatchDecisionsResponse]:
        """Yield what is kept, then what comes, in messages of at most `max_decisions` `interval_s` apart or more."""
        seen, is_following = 0, False
        self._watchers += 1
        try:
            while not self._closing.is_set():
                newest = self._last
                shown = [kept for kept in self._kept if kept.sequence > seen][-max_decisions:]
                response = router_pb2.WatchDecisionsResponse(skipped=newest - seen - len(shown) if is_following else 0)
                is_following = True
                for kept in shown:
                    response.decisions.append(_to_proto(kept, max_candidates=max_candidates))
                    await asyncio.sleep(0)  # routing goes on between two of them
                seen = newest
                yield response
                await self._pause(interval_s)
                while self._last == seen and not self._closing.is_set():
                    await self._news.wait()
        finally:
            self._watchers -= 1

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()


def _to_proto(kept: _Kept, *, max_candidates: int) -> router_pb2.RoutedDecision:
    selection = kept.selection
    decision = router_pb2.RoutedDecision(
        sequence=kept.sequence,
        explanation=explanation_to_proto(shortened(selection, limit=max_candidates)),
        candidate_count=len(selection.candidates),
        rejected_count=len(selection.excluded),
        overlap_blocks=selection.overlap_blocks,
    )
    decision.decided_at.FromNanoseconds(round(kept.decided_at_s * 1e9))
    if kept.booking is not None:
        decision.booking.request_id = kept.booking.request_id
        decision.booking.attempt = kept.booking.attempt
    return decision
