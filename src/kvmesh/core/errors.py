"""Errors of the mesh, classed by what the CALLER should do, each with a stable reason.

The text here is for the operator's log and may name ids and values; the text for strangers, the gRPC code and the
HTTP status of a reason live in `kvmesh.wire.error_catalog` and nowhere else.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Stable reason of an error: `ErrorInfo.reason` on the wire."""

    EMPTY_PROMPT = "EMPTY_PROMPT"
    INVALID_FIELD = "INVALID_FIELD"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    NO_WORKERS = "NO_WORKERS"
    NO_MATCHING_WORKER = "NO_MATCHING_WORKER"
    NO_CAPABLE_WORKER = "NO_CAPABLE_WORKER"
    OVERLOADED = "OVERLOADED"
    QUEUE_FULL = "QUEUE_FULL"
    LEASE_LOST = "LEASE_LOST"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PREFILL_FAILED = "PREFILL_FAILED"
    KV_TRANSFER_FAILED = "KV_TRANSFER_FAILED"
    PIN_EXPIRED = "PIN_EXPIRED"
    LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
    WORKER_LOST = "WORKER_LOST"
    SLOW_CONSUMER = "SLOW_CONSUMER"
    DEADLINE = "DEADLINE"
    DRAINING = "DRAINING"
    NOT_FOUND = "NOT_FOUND"
    NOT_ATTACHED = "NOT_ATTACHED"
    STALE_EPOCH = "STALE_EPOCH"
    CANCELLED = "CANCELLED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"


class MeshError(Exception):
    """An error of the world, not of our code. Raise one of the subclasses."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """Keep `message` for the log; `field` is the offending field's path, `metadata` goes into ErrorInfo."""
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class FixRequestError(MeshError):
    """The request is wrong: sending it again unchanged fails again."""


class NotKnownError(MeshError):
    """What the request names does not exist here."""


class ConflictError(MeshError):
    """The thing exists in a state that forbids this: read the state again before acting."""


class TryElsewhereError(MeshError):
    """This worker or process cannot serve it; another may."""


class BackOffError(MeshError):
    """Full for now: try again after `retry_after_s`."""


class OutOfTimeError(MeshError):
    """A bounded wait ended."""


class RequestCancelledError(MeshError):
    """The caller itself ended it."""


class NotServedError(MeshError):
    """This build or process does not serve the call."""
