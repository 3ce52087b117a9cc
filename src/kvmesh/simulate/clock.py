"""The virtual clock of a simulation: what happens when, in order."""

from collections.abc import Callable
from heapq import heappop, heappush

Happening = Callable[[float], None]
"""Called with the time it happens at."""


class VirtualTime:
    """Things to come, by time, then in the order in which they were put here."""

    def __init__(self) -> None:
        """Begin with nothing to come."""
        self.now = 0.0
        self._coming: list[tuple[float, int, Happening]] = []
        self._count = 0

    def at(self, time_s: float, happen: Happening) -> None:
        """Let something happen at a time that is not past."""
        self._count += 1
        heappush(self._coming, (time_s, self._count, happen))

    def run_until(self, until_s: float) -> None:
        """Let everything happen that is due by then, and what comes of it."""
        while self._coming and self._coming[0][0] <= until_s:
            self.now, _, happen = heappop(self._coming)
            happen(self.now)
