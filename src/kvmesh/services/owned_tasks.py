"""Tasks that belong to an object with an `aclose`, for work that outlives the call that starts it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from kvmesh import telemetry

log = telemetry.logger(__name__)


class OwnedTasks:
    """Holds running tasks; what fails is logged, what still runs at `aclose` is cancelled and awaited."""

    def __init__(self) -> None:
        """Start with none."""
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work` until it ends or `aclose`."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def cancel(self) -> None:
        """Cancel what still runs without waiting for its end; a task may call this for itself and the others."""
        for task in self._tasks:
            task.cancel()

    async def aclose(self) -> None:
        """Cancel and await what still runs."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)  # `_done` may come later: awaiting what has ended gives nobody a turn

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task.failed", task=task.get_name(), exc_info=error)
