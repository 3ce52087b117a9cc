"""Time that stands still until it is told to pass."""


class VirtualClock:
    """A monotonic clock for tests and simulations: no real time passes, so every delay is exact."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Return the current time in seconds; give it to whatever takes `now`."""
        return self._now_s

    def advance(self, seconds: float) -> float:
        """Let `seconds` pass and return the new time. Raises: ValueError if it is negative."""
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds} s")
        self._now_s += seconds
        return self._now_s
