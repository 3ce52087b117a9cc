"""THE error catalog: what each reason is on the wire, in HTTP, in the OpenAI API, and in words for strangers.

Nothing else in the project maps a reason to a code. Services raise `MeshError`; one interceptor (gRPC) and one
function per HTTP door apply this table.
"""

from dataclasses import dataclass

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvmesh.core import errors
from kvmesh.core.errors import MeshError, Reason

DOMAIN = "kvmesh"
"""`ErrorInfo.domain` of every error of the mesh."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """What one reason means to each kind of caller."""

    code: grpc.StatusCode
    openai_type: str
    """`error.type` in an OpenAI error body."""
    openai_code: str | None
    """`error.code` in an OpenAI error body."""
    retryable: bool
    """True: the same request may succeed later or elsewhere."""
    text: str
    """For strangers; names the fix."""
    error_class: type[MeshError]
    """What a client of ours raises on receiving it."""
    show_message: bool = True
    """True: the error's own message is safe to show after the text. False where it may hold addresses of the mesh or
    the text of somebody's exception: that is for the log."""
    retry_after_s: float | None = None
    """When to try again, for errors that do not say so themselves."""


_C = grpc.StatusCode
_INVALID = "invalid_request_error"
_SERVER = "server_error"
_LIMIT = "rate_limit_error"

CATALOG: dict[Reason, CatalogEntry] = {
    Reason.EMPTY_PROMPT: CatalogEntry(
        _C.INVALID_ARGUMENT, _INVALID, "empty_prompt", False, "The prompt is empty: send at least one token of text.",
        errors.FixRequestError,
    ),
    Reason.INVALID_FIELD: CatalogEntry(
        _C.INVALID_ARGUMENT, _INVALID, "invalid_value", False, "Invalid field.", errors.FixRequestError
    ),
    Reason.UNKNOWN_MODEL: CatalogEntry(
        _C.NOT_FOUND, _INVALID, "model_not_found", False,
        "No live worker serves this model: the list of models has those that are served.",
        errors.NotKnownError,
    ),
    Reason.NO_WORKERS: CatalogEntry(
        _C.UNAVAILABLE, _SERVER, "no_workers", True, "No worker is available: try again shortly.",
        errors.TryElsewhereError,
    ),
    Reason.NO_MATCHING_WORKER: CatalogEntry(
        _C.FAILED_PRECONDITION, _INVALID, "no_matching_worker", False,
        "No worker matches the routing hints: loosen them.", errors.FixRequestError,
    ),
    Reason.NO_CAPABLE_WORKER: CatalogEntry(
        _C.FAILED_PRECONDITION, _SERVER, "no_capable_worker", True, "No prefill worker can do this task.",
        errors.TryElsewhereError,
    ),
    Reason.OVERLOADED: CatalogEntry(
        _C.RESOURCE_EXHAUSTED, _LIMIT, "overloaded", True, "Every eligible worker is at its limit: back off and retry.",
        errors.BackOffError, retry_after_s=1.0,
    ),
    Reason.QUEUE_FULL: CatalogEntry(
        _C.RESOURCE_EXHAUSTED, _LIMIT, "queue_full", True, "The prefill queue is full: back off and retry.",
        errors.BackOffError, retry_after_s=1.0,
    ),
    Reason.LEASE_LOST: CatalogEntry(
        _C.FAILED_PRECONDITION, _SERVER, "lease_lost", False,
        "The lease is no longer held: drop the result, it changes nothing.", errors.ConflictError,
    ),
    Reason.ALREADY_EXISTS: CatalogEntry(
        _C.ALREADY_EXISTS, _INVALID, "already_exists", False,
        "This key is taken: by other content, or by what has ended.", errors.ConflictError,
    ),
    Reason.PREFILL_FAILED: CatalogEntry(
        _C.UNAVAILABLE, _SERVER, "prefill_failed", True,
        "The remote prefill failed, and remote_prefill.required allows no local one: retry, or start a prefill worker.",
        errors.TryElsewhereError, show_message=False,
    ),
    Reason.KV_TRANSFER_FAILED: CatalogEntry(
        _C.UNAVAILABLE, _SERVER, "kv_transfer_failed", True, "Moving the KV cache failed.", errors.TryElsewhereError,
        show_message=False,
    ),
    Reason.PIN_EXPIRED: CatalogEntry(
        _C.FAILED_PRECONDITION, _SERVER, "pin_expired", True,
        "The blocks were given back before the transfer ended: drop and recompute them.", errors.TryElsewhereError,
    ),
    Reason.LAYOUT_MISMATCH: CatalogEntry(
        _C.FAILED_PRECONDITION, _SERVER, "layout_mismatch", False, "The KV layouts of the two workers differ.",
        errors.ConflictError,
    ),
    Reason.WORKER_LOST: CatalogEntry(
        _C.UNAVAILABLE, _SERVER, "worker_lost", True,
        "Whoever was to serve this request is gone or does not answer: retry.",
        errors.TryElsewhereError, show_message=False,
    ),
    Reason.SLOW_CONSUMER: CatalogEntry(
        _C.RESOURCE_EXHAUSTED, _LIMIT, "slow_consumer", False,
        "The client read too slowly: too much output was waiting for it.", errors.BackOffError,
    ),
    Reason.DEADLINE: CatalogEntry(
        _C.DEADLINE_EXCEEDED, _SERVER, "deadline_exceeded", True, "The deadline passed.", errors.OutOfTimeError
    ),
    Reason.DRAINING: CatalogEntry(
        _C.UNAVAILABLE, _SERVER, "draining", True, "This process is shutting down: retry.", errors.TryElsewhereError
    ),
    Reason.NOT_FOUND: CatalogEntry(
        _C.NOT_FOUND, _INVALID, "not_found", False, "Not known here.", errors.NotKnownError
    ),
    Reason.NOT_ATTACHED: CatalogEntry(
        _C.FAILED_PRECONDITION, _SERVER, "not_attached", False, "Attach first: leases end with the attachment.",
        errors.ConflictError,
    ),
    Reason.STALE_EPOCH: CatalogEntry(
        _C.FAILED_PRECONDITION, _SERVER, "stale_epoch", False, "A newer incarnation of this worker is live.",
        errors.ConflictError,
    ),
    Reason.CANCELLED: CatalogEntry(
        _C.CANCELLED, _INVALID, "cancelled", False, "Cancelled by the caller.", errors.RequestCancelledError
    ),
    Reason.UNIMPLEMENTED: CatalogEntry(
        _C.UNIMPLEMENTED, _INVALID, "unimplemented", False, "Not served by this process.", errors.NotServedError
    ),
    Reason.INTERNAL: CatalogEntry(
        _C.INTERNAL, _SERVER, "internal_error", False, "Internal error: the log has it under this request id.",
        errors.MeshError, show_message=False,
    ),
}  # fmt: skip

HTTP_STATUS: dict[grpc.StatusCode, int] = {
    _C.OK: 200,
    _C.CANCELLED: 499,
    _C.UNKNOWN: 500,
    _C.INVALID_ARGUMENT: 400,
    _C.DEADLINE_EXCEEDED: 504,
    _C.NOT_FOUND: 404,
    _C.ALREADY_EXISTS: 409,
    _C.PERMISSION_DENIED: 403,
    _C.UNAUTHENTICATED: 401,
    _C.RESOURCE_EXHAUSTED: 429,
    _C.FAILED_PRECONDITION: 400,
    _C.ABORTED: 409,
    _C.OUT_OF_RANGE: 400,
    _C.UNIMPLEMENTED: 501,
    _C.INTERNAL: 500,
    _C.UNAVAILABLE: 503,
    _C.DATA_LOSS: 500,
}
"""The field's mapping of gRPC codes (google.rpc.Code) to HTTP."""

_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def foreseen_error(exc: Exception) -> MeshError | None:
    """Return the error of ours that a handler's exception amounts to, or None where nobody foresaw it: INTERNAL."""
    leaf = _leaf(exc)
    if isinstance(leaf, NotImplementedError):  # what generated servicers raise for a method nobody wrote
        return errors.NotServedError(Reason.UNIMPLEMENTED, "")
    return leaf if isinstance(leaf, MeshError) and leaf.reason is not Reason.INTERNAL else None


def _leaf(exc: Exception) -> Exception:
    """Look into the group a TaskGroup raises: a foreseen error speaks for it only if nothing unforeseen is there."""
    if not isinstance(exc, ExceptionGroup):
        return exc
    leaves = [_leaf(inner) for inner in exc.exceptions]
    return next((leaf for leaf in leaves if not isinstance(leaf, MeshError)), leaves[0])


_MAX_MESSAGE_BYTES = 1024
"""Of an error's own message: it travels in trailers, three times and encoded, and peers refuse trailers above 8 KiB."""


def public_text(error: MeshError) -> str:
    """Return what a stranger may read of this error: the catalog's text, then the error's own message where safe."""
    entry, message = CATALOG[error.reason], _public_message(error)
    return f"{_lead(entry)} {message}" if message and message != entry.text else entry.text


def _lead(entry: CatalogEntry) -> str:
    """Return the catalog's text as what a message follows: that begins in lower case, or with a name as it is."""
    return f"{entry.text.removesuffix('.')}{';' if ':' in entry.text else ':'}"


def retry_after_s(error: MeshError) -> float | None:
    """Return how long the caller is to wait before it tries again; None where waiting is not what helps."""
    return error.retry_after_s if error.retry_after_s is not None else CATALOG[error.reason].retry_after_s


def _public_message(error: MeshError) -> str:
    if not CATALOG[error.reason].show_message:
        return ""
    return error.message.encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore")


def http_status(error: MeshError) -> int:
    """Return the HTTP status of this error."""
    return HTTP_STATUS[CATALOG[error.reason].code]


def to_status(error: MeshError) -> status_pb2.Status:
    """Return the google.rpc.Status of this error: one ErrorInfo, RetryInfo and BadRequest where they apply."""
    entry = CATALOG[error.reason]
    status = status_pb2.Status(code=entry.code.value[0], message=public_text(error))
    metadata = {"retryable": str(entry.retryable).lower(), **error.metadata}
    if error.field is not None:
        metadata["field"] = error.field
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=metadata))
    if error.field is not None:
        description = _public_message(error) or entry.text
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=description)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if (wait_s := retry_after_s(error)) is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(wait_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def from_status(status: status_pb2.Status) -> MeshError:
    """Return the MeshError that a peer put on the wire; foreign statuses become the nearest reason of ours."""
    reason, metadata, wait_s = _nearest_reason(status.code), {}, None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
            reason, metadata = Reason(info.reason), dict(info.metadata)
        elif detail.Unpack(retry):
            wait_s = retry.retry_delay.ToNanoseconds() / 1e9
    entry = CATALOG[reason]
    field = metadata.pop("field", None)
    metadata.pop("retryable", None)
    message = status.message.removeprefix(_lead(entry)).removeprefix(entry.text).strip()
    return entry.error_class(reason, message, field=field, retry_after_s=wait_s, metadata=metadata)


def from_rpc_error(error: grpc.aio.AioRpcError) -> MeshError:
    """Return the MeshError behind a failed call of ours."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # foreign details that contradict their call, or are none
        status = None
    if status is None:
        status = status_pb2.Status(code=error.code().value[0], message=error.details() or "")
    return from_status(status)


_REASON_BY_CODE: dict[grpc.StatusCode, Reason] = {
    _C.CANCELLED: Reason.CANCELLED,
    _C.INVALID_ARGUMENT: Reason.INVALID_FIELD,
    _C.OUT_OF_RANGE: Reason.INVALID_FIELD,
    _C.DEADLINE_EXCEEDED: Reason.DEADLINE,
    _C.NOT_FOUND: Reason.NOT_FOUND,
    _C.ALREADY_EXISTS: Reason.ALREADY_EXISTS,
    _C.RESOURCE_EXHAUSTED: Reason.OVERLOADED,
    _C.UNIMPLEMENTED: Reason.UNIMPLEMENTED,
    _C.UNAVAILABLE: Reason.WORKER_LOST,
}


def _nearest_reason(code: int) -> Reason:
    """A status without our ErrorInfo comes from gRPC itself or from a foreign server."""
    if code == code_pb2.OK:
        raise ValueError("an OK status is no error")
    return _REASON_BY_CODE.get(_CODE_BY_NUMBER.get(code, _C.UNKNOWN), Reason.INTERNAL)


def openai_error(error: MeshError) -> dict[str, object]:
    """Return the body of an OpenAI error: {"error": {message, type, param, code}}."""
    entry = CATALOG[error.reason]
    return {
        "error": {
            "message": public_text(error),
            "type": entry.openai_type,
            "param": error.field,
            "code": entry.openai_code,
        }
    }
