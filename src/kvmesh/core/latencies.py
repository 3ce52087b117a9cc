"""Times that were measured lately: exact samples, few enough to be sent and merged, and quantiles of them."""

import math
from collections import deque
from collections.abc import Sequence

WINDOW_S = 10.0
MAX_SAMPLES = 512


class RecentTimes:
    """The samples of the last `window_s`, the newest `max_samples` at most."""

    def __init__(self, *, window_s: float = WINDOW_S, max_samples: int = MAX_SAMPLES) -> None:
        """Start with none."""
        self._window_s = window_s
        self._samples: deque[tuple[float, float]] = deque(maxlen=max_samples)

    def add(self, seconds: float, *, now: float) -> None:
        """Take a sample; `now` never goes back. O(1)."""
        self._samples.append((now, seconds))

    def at(self, now: float) -> list[float]:
        """Return the samples that are no older than the window, oldest first, and forget the others."""
        while self._samples and now - self._samples[0][0] > self._window_s:
            self._samples.popleft()
        return [seconds for _, seconds in self._samples]


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the least sample that `share` of them, 0 to 1, do not exceed. Raises: ValueError without samples."""
    if not ordered:
        raise ValueError("no samples have no quantile")
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
