"""Who waits for room, and who goes first when there is some. No clock, no tasks.

    fcfs      highest (jump_s - arrived_at) first: a jump is a head start in seconds
    priority  lowest priority first, then by arrival; each `ageing_s` waited makes a request one priority more urgent
    shortest  highest weight / max(new_tokens, 1) first; weight = 1 + jump_s, or 1 / (1 - jump_s) for one below 0

Requests that may go to the same workers form a lane. Laws:
    - within a lane nobody overtakes who goes first by the order above, so a large request is not starved by small ones;
    - lanes do not hold each other up: whoever waits for a worker of its own lets the others pass;
    - equals go by arrival.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from kvmesh.core.candidates import RoutingQuery

T = TypeVar("T")

DEFAULT_PRIORITY = 10
"""Of a request that names none; 0 is the most urgent."""
JUMP_S_PER_PRIORITY = 1.0
"""Head start that one priority below the default is worth, in seconds."""


class AdmissionOrder(StrEnum):
    """Who goes first."""

    FCFS = "fcfs"
    PRIORITY = "priority"
    SHORTEST = "shortest"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRules:
    """How Reserve waits while every eligible worker is overloaded."""

    wait_s: float = 0.0
    """0 = not at all."""
    order: AdmissionOrder = AdmissionOrder.FCFS
    max_waiting: int = 1_024
    ageing_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waiting(Generic[T]):
    """One request that waits."""

    item: T
    lane: Hashable
    arrived_at: float
    priority: int = DEFAULT_PRIORITY
    new_tokens: int = 0
    """Prompt tokens that its best worker would have to compute."""

    @property
    def jump_s(self) -> float:
        """Its head start; below 0 it yields."""
        return (DEFAULT_PRIORITY - self.priority) * JUMP_S_PER_PRIORITY


class AdmissionQueue(Generic[T]):
    """Those who wait, by lane; bounded by `rules.max_waiting`; not thread-safe."""

    def __init__(self, rules: AdmissionRules) -> None:
        """Start with nobody."""
        self._rules = rules
        self._lanes: dict[Hashable, dict[Waiting[T], None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def is_full(self) -> bool:
        """Tell whether the next one must be refused."""
        return self._count >= self._rules.max_waiting

    def has_lane(self, lane: Hashable) -> bool:
        """Tell whether somebody waits in this lane."""
        return lane in self._lanes

    def put(self, waiting: Waiting[T]) -> None:
        """Let one wait. The queue must not be full."""
        assert not self.is_full
        self._lanes.setdefault(waiting.lane, {})[waiting] = None
        self._count += 1

    def remove(self, waiting: Waiting[T]) -> None:
        """Let one go. Idempotent."""
        lane = self._lanes.get(waiting.lane)
        if lane is None or waiting not in lane:
            return
        del lane[waiting]
        self._count -= 1
        if not lane:
            del self._lanes[waiting.lane]

    def in_order(self, *, now: float) -> list[Waiting[T]]:
        """Return everybody, the first to go first. O(n log n)."""
        everybody = [waiting for lane in self._lanes.values() for waiting in lane]
        everybody.sort(key=lambda waiting: (order_key(waiting, rules=self._rules, now=now), waiting.arrived_at))
        return everybody


def order_key(waiting: Waiting[T], *, rules: AdmissionRules, now: float) -> float:
    """Return what requests are ordered by; the lowest goes first."""
    match rules.order:
        case AdmissionOrder.FCFS:
            return waiting.arrived_at - waiting.jump_s
        case AdmissionOrder.PRIORITY:
            return waiting.priority - (now - waiting.arrived_at) // rules.ageing_s
        case AdmissionOrder.SHORTEST:
            jump_s = waiting.jump_s
            weight = 1 + jump_s if jump_s >= 0 else 1 / (1 - jump_s)
            return -weight / max(waiting.new_tokens, 1)


def lane_of(query: RoutingQuery) -> Hashable:
    """Return what decides which workers may take a request: requests alike in it wait in one lane."""
    hints = query.hints
    return (
        query.role,
        query.model,
        hints.pinned_worker,
        hints.pinned_rank,
        hints.allowed_workers,
        hints.excluded_workers,
        frozenset(hints.required_labels.items()),
    )
