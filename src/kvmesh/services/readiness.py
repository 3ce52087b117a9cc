"""Whether a worker can do all of its work. That is not whether it takes any: a decode worker without its queue, or
without a way to move KV, prefills locally, so it stays routable; who is routed where is told by records and loads.
"""

from collections.abc import Callable
from enum import StrEnum

from kvmesh import telemetry

log = telemetry.logger(__name__)


class Part(StrEnum):
    """What a worker may lack."""

    ENGINE = "engine"
    QUEUE = "queue"
    KV_PLANE = "kv_plane"


class Readiness:
    """What one worker lacks now; health says NOT_SERVING of its role while that is anything."""

    def __init__(self, *, worker_id: str) -> None:
        """Lack nothing."""
        self.on_change: Callable[[bool], None] = lambda ready: None
        """Told whether the worker is ready when that changes."""
        self._worker_id = worker_id
        self._lacks: dict[Part, str] = {}
        self._expected: set[Part] = set()
        """Of those, what is on its way since the start: its arrival is no news."""

    @property
    def is_ready(self) -> bool:
        """Whether nothing is lacking."""
        return not self._lacks

    def expect(self, part: Part, detail: str) -> None:
        """Lack `part` at the start, when it is on its way: nobody is warned."""
        self._expected.add(part)
        self._set(part, detail)

    def set_lack(self, part: Part, detail: str) -> None:
        """Say why `part` is lacking, or "" once it is there. Idempotent."""
        was_expected = part in self._expected
        self._expected.discard(part)
        is_changed = self._set(part, detail)
        if detail and (is_changed or was_expected):
            log.warning("worker.lacks", worker_id=self._worker_id, part=part.value, detail=detail)
        elif is_changed and not was_expected:
            log.info("worker.has", worker_id=self._worker_id, part=part.value)

    def close(self) -> None:
        """Take what is lacking out of the metric; the worker has ended. Idempotent."""
        for part in self._lacks:
            telemetry.WORKERS_LACKING.labels(part=part.value).dec()
        self._lacks.clear()

    def _set(self, part: Part, detail: str) -> bool:
        """Return whether the part went or came."""
        was_there, was_ready = part not in self._lacks, self.is_ready
        if detail:
            self._lacks[part] = detail
        else:
            self._lacks.pop(part, None)
        if was_there != bool(detail):
            return False
        telemetry.WORKERS_LACKING.labels(part=part.value).inc(1 if detail else -1)
        if was_ready != self.is_ready:
            self.on_change(self.is_ready)
        return True
