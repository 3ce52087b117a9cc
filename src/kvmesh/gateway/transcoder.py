"""The mesh's REST routes: one Starlette route per rule, JSON in and out, the servicer's method called in process.

A streaming method answers one line of JSON per message, `{"result": {...}}`; `Accept: text/event-stream` makes each an
event. An error before the first message is an HTTP status; a later one is the last line, `{"error": {...}}`. A unary
method answers plain JSON whatever is accepted.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import orjson
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from kvmesh.gateway import sse
from kvmesh.gateway.failures import Failure
from kvmesh.gateway.json_messages import to_json
from kvmesh.gateway.request_binding import bind_request
from kvmesh.gateway.request_frame import REQUEST_ID_KEY, request_id_of
from kvmesh.gateway.request_io import (
    StreamedReply,
    deadline,
    header,
    read_body,
    send_bytes,
    stream,
    timeout_of,
    until_disconnect,
)
from kvmesh.gateway.rest_context import RestContext
from kvmesh.gateway.routes import HttpRule, rules_of

Servicer = object
"""An instance of a generated servicer class: its methods are found by the descriptor's names."""

NDJSON = b"application/x-ndjson"


def rpc_routes(
    services: Sequence[tuple[ServiceDescriptor, Servicer]],
    *,
    max_body_bytes: int,
    request_timeout_s: float,
    client_write_s: float,
) -> list["RpcRoute"]:
    """Return the routes of all annotated methods; `request_timeout_s` bounds a unary call whose client sets no time.

    Raises: ValueError for an annotation that cannot be served.
    """
    servicers = {descriptor.full_name: servicer for descriptor, servicer in services}
    return [
        RpcRoute(
            rule,
            getattr(servicers[rule.method.containing_service.full_name], rule.method.name),
            max_body_bytes=max_body_bytes,
            request_timeout_s=request_timeout_s,
            client_write_s=client_write_s,
        )
        for rule in rules_of(descriptor for descriptor, _ in services)
    ]


class RpcRoute(BaseRoute):
    """One rule served by one method of a servicer."""

    def __init__(
        self, rule: HttpRule, method: Any, *, max_body_bytes: int, request_timeout_s: float, client_write_s: float
    ) -> None:
        """`method` takes (request, context): a coroutine function, or an async generator function if it streams."""
        self.path = rule.template
        """The template, as metrics name the route."""
        self._rule = rule
        self._method = method
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s
        self._client_write_s = client_write_s

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return PARTIAL where only the verb differs."""
        if scope["type"] != "http":
            return Match.NONE, {}
        path_values = self._rule.match(scope["raw_path"].decode("latin-1"))
        if path_values is None:
            return Match.NONE, {}
        match = Match.FULL if _verb(scope) == self._rule.verb else Match.PARTIAL
        return match, {"path_params": path_values, "endpoint": self._method}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the method and answer. Raises: what the method raises, until the reply has begun."""
        if _verb(scope) != self._rule.verb:
            raise HTTPException(405, headers={"Allow": "GET, HEAD" if self._rule.verb == "GET" else self._rule.verb})
        timeout_s = timeout_of(scope)
        body = await read_body(scope, receive, max_bytes=self._max_body_bytes) if self._rule.body else b""
        request = await bind_request(
            self._rule, path_values=scope["path_params"], query=scope["query_string"], body=body
        )
        if self._rule.method.server_streaming and scope["method"] == "HEAD":
            await send_bytes(send, b"", content_type=sse.CONTENT_TYPE if _wants_events(scope) else NDJSON)
        elif self._rule.method.server_streaming:
            await self._stream(request, scope, receive, send, timeout_s)
        else:
            timeout_s = self._request_timeout_s if timeout_s is None else timeout_s
            async with until_disconnect(receive):
                async with deadline(timeout_s):
                    response = await self._method(request, _context(scope, timeout_s))
                await send_bytes(send, to_json(response))

    async def _stream(
        self, request: Message, scope: Scope, receive: Receive, send: Send, timeout_s: float | None
    ) -> None:
        wants_events = _wants_events(scope)
        frame = sse.event if wants_events else _line
        await stream(
            StreamedReply(send, content_type=sse.CONTENT_TYPE if wants_events else NDJSON),
            self._results(request, _context(scope, timeout_s), frame),
            receive=receive,
            timeout_s=timeout_s,
            client_write_s=self._client_write_s,
            tell=lambda failure: frame(_error(failure)),
        )

    async def _results(self, request: Message, context: RestContext, frame: Any) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._method(request, context)) as messages:
            async for message in messages:
                yield frame(b'{"result":' + to_json(message) + b"}")


def _context(scope: Scope, timeout_s: float | None) -> RestContext:
    request_id, request_id_key = request_id_of(scope), REQUEST_ID_KEY.encode("ascii")
    metadata = [
        (key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"] if key != request_id_key
    ]
    host, port = scope.get("client") or ("", 0)
    family = "ipv6" if ":" in host else "ipv4"
    return RestContext(
        request_id=request_id,
        metadata=[*metadata, (REQUEST_ID_KEY, request_id)],
        peer=f"{family}:[{host}]:{port}" if family == "ipv6" else f"{family}:{host}:{port}",
        timeout_s=timeout_s,
    )


def _verb(scope: Scope) -> str:
    """Return the verb of the rule that is asked for: HEAD is a GET whose body the server keeps to itself."""
    return "GET" if scope["method"] == "HEAD" else str(scope["method"])


def _wants_events(scope: Scope) -> bool:
    return "text/event-stream" in (header(scope, b"accept") or "").lower()


def _line(data: bytes) -> bytes:
    return data + b"\n"


def _error(failure: Failure) -> bytes:
    return orjson.dumps({"error": failure.mesh_status()})
