"""One REST route: a rule and the servicer's method behind it, called in process, JSON in and out.

A streaming method answers one line of JSON per message, `{"result": {...}}`; `Accept: text/event-stream` makes each an
event. An error before the first message is an HTTP status; a later one is the last line, `{"error": {...}}`. A unary
method answers plain JSON whatever is accepted.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from google.protobuf.message import Message
from starlette.types import Receive, Scope, Send

from kvmesh.gateway import sse
from kvmesh.gateway.call_metadata import metadata_of
from kvmesh.gateway.failures import Failure
from kvmesh.gateway.json_messages import in_one_line, to_json
from kvmesh.gateway.request_binding import bind_request
from kvmesh.gateway.request_frame import request_id_of
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
from kvmesh.gateway.routes import HttpRule
from kvmesh.wire.metadata import REQUEST_ID_KEY

NDJSON = b"application/x-ndjson"


@dataclass(frozen=True, slots=True)
class CallBounds:
    """What no call may exceed."""

    max_body_bytes: int
    request_timeout_s: float
    """Of a unary call whose client sets no time."""
    client_write_s: float
    """Of each write of a stream whose client does not read."""


class RpcRoute:
    """One rule served by one method of a servicer."""

    def __init__(self, rule: HttpRule, method: Any, *, bounds: CallBounds) -> None:
        """`method` takes (request, context): a coroutine function, or an async generator function if it streams."""
        self.rule = rule
        self.path = rule.template
        """The template, as metrics name the route."""
        self._method = method
        self._bounds = bounds

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the method and answer. Raises: what the method raises, until the reply has begun."""
        timeout_s = timeout_of(scope)
        is_stream = self.rule.method.server_streaming
        if timeout_s is None and not is_stream:
            timeout_s = self._bounds.request_timeout_s
        context = _context(scope, timeout_s)
        body = await read_body(scope, receive, max_bytes=self._bounds.max_body_bytes) if self.rule.body else b""
        request = await bind_request(
            self.rule, path_values=scope["path_params"], query=scope["query_string"], body=body
        )
        if is_stream and scope["method"] == "HEAD":
            await send_bytes(send, b"", content_type=sse.CONTENT_TYPE if _wants_events(scope) else NDJSON)
        elif is_stream:
            await self._stream(request, context, receive, send, wants_events=_wants_events(scope))
        else:
            await self._answer(request, context, receive, send)

    async def _answer(self, request: Message, context: RestContext, receive: Receive, send: Send) -> None:
        async with until_disconnect(receive):
            async with deadline(context.time_remaining()):
                response = await self._method(request, context)
            context.check_code()
            await send_bytes(send, to_json(response), headers=context.reply_headers())

    async def _stream(
        self, request: Message, context: RestContext, receive: Receive, send: Send, *, wants_events: bool
    ) -> None:
        frame = sse.event if wants_events else _line
        await stream(
            StreamedReply(
                send, content_type=sse.CONTENT_TYPE if wants_events else NDJSON, headers=context.reply_headers
            ),
            self._results(request, context, frame),
            receive=receive,
            timeout_s=context.time_remaining(),
            client_write_s=self._bounds.client_write_s,
            tell=lambda failure: frame(_error(failure)),
        )

    async def _results(self, request: Message, context: RestContext, frame: Any) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._method(request, context)) as messages:
            async for message in messages:
                yield frame(b'{"result":' + in_one_line(to_json(message)) + b"}")
        context.check_code()


def _context(scope: Scope, timeout_s: float | None) -> RestContext:
    request_id = request_id_of(scope)
    host, port = scope.get("client") or ("", 0)
    family = "ipv6" if ":" in host else "ipv4"
    return RestContext(
        request_id=request_id,
        metadata=metadata_of(scope, request_id_key=REQUEST_ID_KEY, request_id=request_id),
        peer=f"{family}:[{host}]:{port}" if family == "ipv6" else f"{family}:{host}:{port}",
        timeout_s=timeout_s,
    )


def _wants_events(scope: Scope) -> bool:
    return "text/event-stream" in (header(scope, b"accept") or "").lower()


def _line(data: bytes) -> bytes:
    return data + b"\n"


def _error(failure: Failure) -> bytes:
    return orjson.dumps({"error": failure.mesh_status()})
