"""A `random.Random` that is seeded when it is first drawn from: seeding is a good part of what a decision costs."""

import random
from typing import Any


class LateRandom(random.Random):
    """Draws what `random.Random(seed)` would, of the seed that it was last given."""

    def __init__(self) -> None:
        """Be given a seed before the first draw."""
        self._late_seed: int | None = None
        super().__init__(0)

    def seed_late(self, seed: int) -> None:
        """Start anew from this seed."""
        self._late_seed = seed
        self.gauss_next: float | None = None  # the half of a pair that `gauss` keeps back

    def random(self) -> float:
        """Return a float in [0, 1)."""
        self._seed_now()
        return super().random()

    def getrandbits(self, k: int, /) -> int:
        """Return an integer of k random bits."""
        self._seed_now()
        return super().getrandbits(k)

    def getstate(self) -> tuple[Any, ...]:
        """Return what `setstate` takes."""
        self._seed_now()
        return super().getstate()

    def setstate(self, state: tuple[Any, ...]) -> None:
        """Go on from there."""
        self._late_seed = None
        super().setstate(state)

    def _seed_now(self) -> None:
        if self._late_seed is not None:
            seed, self._late_seed = self._late_seed, None
            super(random.Random, self).seed(seed)  # past what random.Random does for seeds that are no integers
