"""The file that a router's decisions are written to, one JSON line each.

A thread writes, so that routing never waits for a disk: what it has no room to take is dropped and counted. A file that
has reached its size becomes FILE.1, in place of the one before, so the log takes at most twice that.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from kvmesh import telemetry
from kvmesh.core.decision_log import Decision, decision_to_mapping, start_mapping
from kvmesh.core.errors import FixRequestError, Reason

log = telemetry.logger(__name__)

_MAX_PENDING = 1_024


class DecisionLog:
    """Writes from `start` to `aclose`."""

    def __init__(
        self, path: Path, *, max_bytes: int, policy_settings: Mapping[str, Any], max_pending: int = _MAX_PENDING
    ) -> None:
        """Append to `path`; `policy_settings` are what the policy was made of, for whoever makes it again."""
        self.policy_settings = policy_settings
        self._path = path
        self._max_bytes = max_bytes
        self._pending: queue.Queue[Decision | None] = queue.Queue(max_pending)
        self._thread: threading.Thread | None = None
        self._file: FileIO | None = None
        self._is_failing = False

    def start(self) -> None:
        """Begin to write. Raises: FixRequestError(INVALID_FIELD) if the file cannot be written."""
        try:
            self._file = self._open()
            self._file.write(orjson.dumps(start_mapping(at_s=time.time()), option=orjson.OPT_APPEND_NEWLINE))
        except OSError as exc:
            if self._file is not None:
                self._file.close()
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"router.decision_log: {self._path} cannot be written: {exc.strerror}",
                field="router.decision_log",
            ) from exc
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    async def aclose(self) -> None:
        """Write what is pending and close. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(self._end, thread)

    def put(self, decision: Decision) -> None:
        """Take a decision, or drop it where too many are pending; never waits."""
        try:
            self._pending.put_nowait(decision)
        except queue.Full:
            telemetry.DECISIONS_DROPPED.inc()

    def _end(self, thread: threading.Thread) -> None:
        self._pending.put(None)  # the thread makes room
        thread.join()

    def _run(self) -> None:
        while (decision := self._pending.get()) is not None:
            try:
                self._write(decision)
            except Exception as exc:  # the disk's, or a value of somebody's policy that JSON has not
                telemetry.DECISIONS_DROPPED.inc()
                if not self._is_failing:
                    log.error("decision_log.failed", path=str(self._path), error=f"{type(exc).__name__}: {exc}")
                self._is_failing = True
            else:
                telemetry.DECISIONS_LOGGED.inc()
                self._is_failing = False
        if self._file is not None:
            self._file.close()

    def _write(self, decision: Decision) -> None:
        line = orjson.dumps(
            decision_to_mapping(decision),
            option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS,
        )
        if self._file is None:
            self._file = self._open()
        if self._file.tell() and self._file.tell() + len(line) > self._max_bytes:
            self._file.close()
            self._file = None
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            self._file = self._open()
        self._file.write(line)

    def _open(self) -> FileIO:
        return self._path.open("ab", buffering=0)  # whoever reads along sees whole lines
