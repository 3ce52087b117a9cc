"""Where log lines go: to a reader who may stall or go away, while the event loop may not."""

import io
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from kvmesh import telemetry

_MAX_QUEUED = 4096
"""Lines that wait for their reader: a megabyte or two."""


class QueuedStream(io.TextIOBase):
    """Writing never waits and never fails: what the reader does not take is dropped and counted.

    A thread writes what was queued; it is a daemon, so that a reader who stalls does not keep the process either.
    """

    def __init__(self, write: Callable[[str], object], *, is_terminal: bool, max_queued: int = _MAX_QUEUED) -> None:
        """`write` takes one whole text and may block or raise OSError; `max_queued` texts wait for it at most."""
        self._write = write
        self._is_terminal = is_terminal
        self._queued: queue.Queue[str | None] = queue.Queue(max_queued)
        self._writer = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._writer.start()

    def write(self, text: str) -> int:
        """Queue the text, or drop and count it; the length is that of the whole text."""
        try:
            self._queued.put_nowait(text)
        except queue.Full:
            telemetry.LOG_LINES_DROPPED.inc()
        return len(text)

    def finish(self, within_s: float) -> None:
        """Wait until everything queued is written, but no longer than `within_s`; the last call of all."""
        ends_at = time.monotonic() + within_s
        with suppress(queue.Full):
            self._queued.put(None, timeout=within_s)
            self._writer.join(max(ends_at - time.monotonic(), 0))

    def isatty(self) -> bool:
        """Tell whether the reader is a terminal."""
        return self._is_terminal

    def _run(self) -> None:
        while (text := self._queued.get()) is not None:
            try:
                self._write(text)
            except OSError:
                telemetry.LOG_LINES_DROPPED.inc()


def queued_stderr() -> QueuedStream:
    """Return stderr behind a queue; it writes to the descriptor, so that no lock of `sys.stderr` is ever held."""
    return QueuedStream(partial(_write_all, sys.stderr.fileno()), is_terminal=sys.stderr.isatty())


def _write_all(descriptor: int, text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")
    while data:
        data = data[os.write(descriptor, data) :]
