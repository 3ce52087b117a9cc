"""What surrounds every HTTP request: its id, its log context, its metric, and its error if it fails unanswered."""

import asyncio
import re
from collections.abc import Awaitable
from contextlib import suppress

import structlog
import uuid_utils
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvmesh import telemetry
from kvmesh.gateway.failures import Failure, failure_of
from kvmesh.gateway.request_guard import check_request
from kvmesh.gateway.request_io import ClientGoneError, draining, header, send_bytes
from kvmesh.wire.metadata import REQUEST_ID_KEY

CLIENT_REQUEST_ID_KEY = "x-client-request-id"
"""Header of the client's own id on the reply to a request that brought one as its `x-request-id`."""
OPENAI_PREFIX = "/v1/"
"""Paths whose errors have the OpenAI API's form."""

_SCOPE_KEY = "kvmesh.request_id"
_CLIENT_CLOSED = 499
_SANE_CLIENT_ID = re.compile(r"[\x21-\x7e]{1,128}")
_FAREWELL_S = 1.0
_log = telemetry.logger(__name__)


def request_id_of(scope: Scope) -> str:
    """Return the mesh's id of this request (UUIDv7)."""
    request_id: str = scope[_SCOPE_KEY]
    return request_id


def client_request_id_of(scope: Scope) -> str:
    """Return the client's own id, its `x-request-id`: logged, never a key; "" for none or one that is no plain word."""
    sent = header(scope, REQUEST_ID_KEY.encode("ascii")) or ""
    return sent if _SANE_CLIENT_ID.fullmatch(sent) else ""


class RequestFrame:
    """The app as the server calls it."""

    def __init__(self, app: ASGIApp) -> None:
        """Surround `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app  # the router then raises what it refuses, instead of answering in its own words
        request_id = scope[_SCOPE_KEY] = str(uuid_utils.uuid7())
        own_headers = [(REQUEST_ID_KEY.encode("ascii"), request_id.encode("ascii"))]
        if client_request_id := client_request_id_of(scope):
            own_headers.append((CLIENT_REQUEST_ID_KEY.encode("ascii"), client_request_id.encode("ascii")))
            structlog.contextvars.bind_contextvars(client_request_id=client_request_id)
        status = 0

        def send_with_id(message: Message) -> Awaitable[None]:  # no coroutine of its own: every token passes here
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *own_headers]
            return send(message)

        structlog.contextvars.bind_contextvars(request_id=request_id, method=scope["method"], path=scope["path"])
        try:
            check_request(scope)
            await self._app(scope, receive, send_with_id)
        except ClientGoneError:
            _log.debug("http.client_gone")
        except asyncio.CancelledError:
            if not status:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_FAREWELL_S):
                        await _send_failure(scope, send_with_id, failure_of(draining()))
            raise
        except Exception as exc:
            failure = failure_of(exc)
            if status:
                raise  # too late to say it: the connection is closed instead
            await _send_failure(scope, send_with_id, failure)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            telemetry.HTTP_REQUESTS.labels(route, str(status or _CLIENT_CLOSED)).inc()
            structlog.contextvars.clear_contextvars()


async def _send_failure(scope: Scope, send: Send, failure: Failure) -> None:
    body = failure.openai_body() if scope["path"].startswith(OPENAI_PREFIX) else failure.mesh_body()
    await send_bytes(send, body, status=failure.http_status, headers=failure.headers)
