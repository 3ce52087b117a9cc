"""Whether an upstream takes requests, by how they end there; once it does not, a probe finds out when it does again.

    in service -> not reached, or `_IN_A_ROW` failures in a row -> out of service -> a probe or a request succeeds

A probe asks less than a request does: an upstream that was let in by one is out again after a single failure, and the
pauses between its probes grow until a request succeeds there.
"""

import asyncio
from collections.abc import Awaitable, Callable

from kvmesh.core.errors import MeshError, OutOfTimeError, Reason, TryElsewhereError

_IN_A_ROW = 3
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_OF_THE_UPSTREAM = frozenset({Reason.INTERNAL, Reason.UNKNOWN_MODEL})
"""A key or a model that it refuses is ours, whatever the request; other refusals are about the request."""


class Breaker:
    """Counts one upstream's failures. Every method is for one event loop, `out_of_service` for any thread."""

    def __init__(self, probe: Callable[[], Awaitable[None]], *, pause_s: float = _PAUSE_S) -> None:
        """Call `probe` every `pause_s` while it is out of service; it raises MeshError for as long as that lasts."""
        self.out_of_service = ""
        """Why it takes nothing now; empty while it does."""
        self._probe = probe
        self._shortest_pause_s = self._pause_s = pause_s
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None

    def succeeded(self) -> None:
        """Note that a request was answered to its end."""
        self._failures = 0
        self._pause_s = self._shortest_pause_s
        self.out_of_service = ""
        if self._probing is not None:
            self._probing.cancel()
            self._probing = None

    def failed(self, error: MeshError, *, is_unreachable: bool) -> None:
        """Note how a request failed; `is_unreachable`: it never got there. Its own faults do not count."""
        if not isinstance(error, TryElsewhereError | OutOfTimeError) and error.reason not in _OF_THE_UPSTREAM:
            return
        self._failures += 1
        if self.out_of_service or not (is_unreachable or self._failures >= _IN_A_ROW):
            return
        self.out_of_service = f"{error.reason.value}: {error.message}"
        self._probing = asyncio.get_running_loop().create_task(self._probe_until_well(), name="upstream-probe")

    async def aclose(self) -> None:
        """Stop probing. Idempotent."""
        probing, self._probing = self._probing, None
        if probing is not None:
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)

    async def _probe_until_well(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s)
            try:
                await self._probe()
            except MeshError:
                continue
            self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
            self._failures = _IN_A_ROW - 1
            self._probing = None
            self.out_of_service = ""
            return
