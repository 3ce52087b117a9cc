"""Progress of a processor's reservations, told to the router in lists: at most one report per interval."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmesh.core.ids import AttemptKey
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.wire.routing import Progress

REPORT_INTERVAL_S = 0.1


@dataclass(slots=True)
class PendingProgress:
    """What one reservation did since the report before; see `Progress`."""

    accepted_load_sequence: int | None = None
    prefill_complete: bool = False
    output_blocks: int = 0


class ProgressReports:
    """Gathers progress and hands it on; reservations that were dropped meanwhile are left out."""

    def __init__(self, report: Callable[[Sequence[Progress]], object]) -> None:
        """`report` takes what was gathered; called on the event loop."""
        self._report = report
        self._pending: dict[AttemptKey, PendingProgress] = {}
        self._wake = asyncio.Event()
        self._tasks = OwnedTasks()

    def start(self) -> None:
        """Begin to report."""
        self._tasks.start(self._run(), name="progress-reports")

    async def aclose(self) -> None:
        """Report no more."""
        await self._tasks.aclose()

    def of(self, key: AttemptKey) -> PendingProgress:
        """Return the record of this interval, to be changed in place."""
        pending = self._pending.get(key)
        if pending is None:
            pending = self._pending[key] = PendingProgress()
            self._wake.set()
        return pending

    def drop(self, key: AttemptKey) -> None:
        """Forget what was not reported yet: the reservation has ended."""
        self._pending.pop(key, None)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(REPORT_INTERVAL_S)  # the interval itself, during which more is gathered
            self._wake.clear()
            pending, self._pending = self._pending, {}
            if pending:
                self._report(
                    [
                        Progress(
                            key=key,
                            accepted_load_sequence=progress.accepted_load_sequence,
                            prefill_complete=progress.prefill_complete,
                            output_blocks=progress.output_blocks,
                        )
                        for key, progress in pending.items()
                    ]
                )
