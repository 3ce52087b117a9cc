"""The one thread that calls NIXL for a worker.

An agent makes progress only within calls. NIXL's own progress thread spins: it would cost a core of an idle worker. So
this thread looks at the agents that serve when it has had nothing to do for a while. A puller needs that to connect;
its reads of memory on the same host, or over a fabric, do without.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from kvmesh.core.errors import MeshError
from kvmesh.transports.nixl_agent import NixlAgent

T = TypeVar("T")

_PROGRESS_S = 0.01


class NixlThread:
    """Runs steps in turn, and keeps serving agents going in between."""

    def __init__(self) -> None:
        """Start with the first step."""
        self.serving: list[NixlAgent] = []
        """For steps to change."""
        self._steps: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, step: Callable[[], T]) -> T:
        """Do a step; cancelled or not, it is over when this is."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="nixl", daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._steps.put(lambda: _settle(future, step))
        return await to_its_end(asyncio.wrap_future(future))

    def stop(self) -> None:
        """End after the steps so far; there must be none afterwards."""
        self._steps.put(None)

    def _work(self) -> None:
        progressed_s = time.monotonic()
        while True:
            try:
                step = self._steps.get(timeout=_PROGRESS_S if self.serving else None)
            except queue.Empty:
                pass
            else:
                if step is None:
                    return
                step()
                del step  # it holds what it was about
            now_s = time.monotonic()
            if now_s - progressed_s >= _PROGRESS_S:
                progressed_s = now_s
                for agent in self.serving:
                    with suppress(MeshError):  # of a peer that went
                        agent.notifications()


def _settle(future: Future[T], step: Callable[[], T]) -> None:
    try:
        future.set_result(step())
    except BaseException as exc:
        future.set_exception(exc)


async def to_its_end(work: asyncio.Future[T] | Coroutine[Any, Any, T]) -> T:
    """Return or raise what `work` does, when it does; a cancellation meanwhile is raised only then."""
    future = asyncio.ensure_future(work)
    is_cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            is_cancelled = True
    if not is_cancelled:
        return future.result()
    future.exception()  # looked at, so that nobody is told that it was not
    raise asyncio.CancelledError
