"""Threads for endpoints that are plain functions: what blocks in them holds up nothing else of the process."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

THREADS = 16
"""Requests of one instance that run in threads at once; the others wait for their turn, within their deadlines."""


class EndpointThreads:
    """The threads of one instance, started as they are needed."""

    def __init__(self, *, name: str) -> None:
        """Name the threads after `name`."""
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix=name)

    async def run(self, method: Callable[[Any], Any], request: Any) -> Any:
        """Return what `method` makes of the request, where it sees the context of the caller. Raises: what it raises.

        Whoever is cancelled meanwhile waits no longer; a method that has begun runs on to its end.
        """
        call = partial(contextvars.copy_context().run, _called, method, request)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Leave out what has not begun; what has is not waited for. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _called(method: Callable[[Any], Any], request: Any) -> Any:
    try:
        return method(request)
    except StopIteration as exc:  # a future cannot hold one: whoever waits for it would wait for ever
        raise RuntimeError(f"{method.__qualname__} raised StopIteration") from exc
