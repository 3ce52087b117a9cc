"""What a failed HTTP request answers, on the mesh's routes and on the OpenAI API's. The texts are the catalog's."""

import base64
import math
from dataclasses import dataclass
from typing import Any

import grpc
import orjson
from google.rpc import status_pb2
from starlette.exceptions import HTTPException

from kvmesh import telemetry
from kvmesh.core.errors import FixRequestError, MeshError, NotKnownError, NotServedError, Reason
from kvmesh.gateway.json_messages import to_dict
from kvmesh.wire import error_catalog

Headers = list[tuple[bytes, bytes]]

_DEFAULT_RETRY_AFTER_S = 1.0
_CODE_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}
_log = telemetry.logger(__name__)


class HttpRefusalError(Exception):
    """A refusal that only HTTP knows: its status is not that of the reason's gRPC code."""

    def __init__(self, http_status: int, error: MeshError, *, headers: Headers | None = None) -> None:
        super().__init__(error.message)
        self.http_status = http_status
        self.error = error
        self.headers = headers or []


class RpcAbortedError(Exception):
    """A servicer ended the call with a status of its own."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed request, ready to be told."""

    http_status: int
    status: status_pb2.Status
    error: MeshError
    headers: Headers

    def mesh_body(self) -> bytes:
        """Return google.rpc.Status as JSON."""
        return orjson.dumps(self.mesh_status())

    def mesh_status(self) -> dict[str, Any]:
        """Return google.rpc.Status as the value of its JSON, each detail with its @type."""
        details = [_detail(detail) for detail in self.status.details]
        return {"code": self.status.code, "message": self.status.message, "details": details}

    def openai_body(self) -> bytes:
        """Return {"error": {message, type, param, code}}."""
        return orjson.dumps(error_catalog.openai_error(self.error))


def body_too_long(max_bytes: int) -> HttpRefusalError:
    """Return the refusal of a body beyond the limit."""
    return HttpRefusalError(413, FixRequestError(Reason.INVALID_FIELD, f"the body is longer than {max_bytes} bytes"))


def failure_of(exc: Exception) -> Failure:
    """Return what `exc` means to the client; what nobody foresaw is logged with its trace and told as INTERNAL."""
    match exc:
        case RpcAbortedError(status=status):
            code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
            error = error_catalog.from_status(status)
            return Failure(error_catalog.HTTP_STATUS[code], status, error, _headers(code, error))
        case HttpRefusalError(http_status=http_status, error=error, headers=headers):
            return Failure(http_status, error_catalog.to_status(error), error, headers)
        case HTTPException():
            return failure_of(_routing_refusal(exc))
        case _:
            error = _mesh_error(exc)
            code = error_catalog.CATALOG[error.reason].code
            return Failure(
                error_catalog.http_status(error), error_catalog.to_status(error), error, _headers(code, error)
            )


def _routing_refusal(exc: HTTPException) -> Exception:
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "")
        error: MeshError = NotServedError(Reason.UNIMPLEMENTED, f"Allowed on this path: {allowed}.")
        return HttpRefusalError(405, error, headers=[(b"allow", allowed.encode("ascii"))])
    if exc.status_code == 404:
        return HttpRefusalError(404, NotKnownError(Reason.NOT_FOUND, "No such path."))
    return MeshError(Reason.INTERNAL, exc.detail)


def _headers(code: grpc.StatusCode, error: MeshError) -> Headers:
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return [(b"www-authenticate", b"Bearer")]
    retry_after_s = error.retry_after_s
    if retry_after_s is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        retry_after_s = _DEFAULT_RETRY_AFTER_S
    if retry_after_s is None:
        return []
    milliseconds = max(math.ceil(retry_after_s * 1000), 1)
    return [
        (b"retry-after", str(math.ceil(milliseconds / 1000)).encode("ascii")),
        (b"retry-after-ms", str(milliseconds).encode("ascii")),
    ]


def _mesh_error(exc: Exception) -> MeshError:
    error = error_catalog.foreseen_error(exc)
    if error is None:
        _log.error("http.failed", exc_info=exc)
        return MeshError(Reason.INTERNAL, "")
    _log.info("http.refused", reason=error.reason.value, detail=error.message)
    return error


def _detail(detail: Any) -> dict[str, Any]:
    try:
        return to_dict(detail)
    except TypeError:  # a type that this process has no descriptor of
        return {"@type": detail.type_url, "value": base64.b64encode(detail.value).decode("ascii")}
