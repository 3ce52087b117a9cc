"""How often etcd is asked again while it does not answer, and what the log says of it."""

import asyncio
import random

from kvmesh import telemetry

log = telemetry.logger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 0.5
"""Short: a store that comes back must be whole again soon, and it refuses cheaply while it is away."""


class Retry:
    """The state of one retrying loop: one line when etcd stops to answer, one when it answers again."""

    def __init__(self, work: str, **keys: object) -> None:
        """`work` and `keys` say in the log what is being retried."""
        self._log = log.bind(work=work, **keys)
        self._pause_s = _FIRST_PAUSE_S
        self._is_failing = False

    async def failed(self, error: Exception) -> None:
        """Note a failure and wait until the next attempt is due."""
        telemetry.DISCOVERY_FAILURES.inc()
        if not self._is_failing:
            self._is_failing = True
            self._log.warning("discovery.unreachable", error=str(error))
        pause_s = self._pause_s * random.uniform(0.5, 1.0)  # jitter of a retry, no secret
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)

    def succeeded(self) -> None:
        """Note that etcd answered."""
        if self._is_failing:
            self._is_failing = False
            self._log.info("discovery.reached")
        self._pause_s = _FIRST_PAUSE_S
