"""The HTTP server: uvicorn on the running loop, as one part of a process that handles its own signals."""

import asyncio
import errno
import math
import socket
from collections.abc import MutableMapping
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.lifespan.off import LifespanOff
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvmesh.gateway.body_writer import BODY_WRITER_KEY, BodyWriter
from kvmesh.gateway.corked_transport import CorkedTransport
from kvmesh.gateway.request_guard import BOUND_HOST_KEY
from kvmesh.services.channels import PortTakenError
from kvmesh.services.owned_tasks import OwnedTasks

PORT_FLAG = "--http-port"
MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers together: no parser of them has a bound of its own."""
HEAD_WAIT_S = 30.0
"""Longest time from a connection's beginning, or a request's first byte, to the end of the head."""
_BACKLOG = 2048
_REFUSAL = (
    b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b'content-length: %d\r\n\r\n{"code":%d,"message":"%b","details":[]}'
)
_FRAME_BYTES = len(b'{"code":0,"message":"","details":[]}')


def _refusal(status: bytes, code: int, message: bytes) -> bytes:
    """Return a whole answer to a request that never became one."""
    return _REFUSAL % (status, _FRAME_BYTES + len(message), code, message)


_HEAD_TOO_LONG = _refusal(b"431 Request Header Fields Too Large", 3, b"The request line and the headers are too long.")
_HEAD_TOO_LATE = _refusal(b"408 Request Timeout", 4, b"The request line and the headers did not arrive in time.")


class _Protocol(HttpToolsProtocol):
    """Uvicorn's, which also lets an app write to the connection without waiting, and bounds a request's head."""

    head_wait_s = HEAD_WAIT_S
    _corked: CorkedTransport
    _awaits_head = False
    _head_bytes = 0
    """Of a head that has not ended yet: one that ends within a read is bounded by the read."""
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Serve a connection."""
        self._corked = CorkedTransport(transport, loop=self.loop)
        super().connection_made(self._corked)  # type: ignore[arg-type]  # stands for it
        self._head_timer = self.loop.call_later(self.head_wait_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head of a request is longer than any need be."""
        super().data_received(data)
        if self._awaits_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_HEAD_TOO_LONG)
                self.transport.close()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._awaits_head, self._head_bytes = True, 0
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_wait_s, self._give_up)
        scope: MutableMapping[str, Any] = self.scope  # type: ignore[assignment]  # ASGI lets servers add keys
        scope[BODY_WRITER_KEY] = BodyWriter(self._corked, self.flow)

    def on_headers_complete(self) -> None:
        """Begin its body."""
        self._awaits_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        """Close a connection that has not sent a whole head in time; one that has begun to is told."""
        self._head_timer = None
        if not self.transport.is_closing():
            if self._awaits_head:
                self.transport.write(_HEAD_TOO_LATE)
            self.transport.close()


class HttpServer:
    """Serves one ASGI app on one port, from `start` to `stop`."""

    def __init__(self, app: Any, *, host: str, port: int, head_wait_s: float = HEAD_WAIT_S) -> None:
        """Nothing is bound yet; port 0 = any free one. A request's head must arrive within `head_wait_s`."""
        self._host = host
        self._port = port

        async def on_this_host(scope: Scope, receive: Receive, send: Send) -> None:
            scope[BOUND_HOST_KEY] = host
            await app(scope, receive, send)

        config = uvicorn.Config(
            on_this_host,
            http=type("_ProtocolOfServer", (_Protocol,), {"head_wait_s": head_wait_s}),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # what it would log, our own frame does
            access_log=False,
            server_header=False,
            proxy_headers=False,
            # Longer than clients and balancers keep idle connections: no request meets a connection being closed.
            timeout_keep_alive=75,
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = LifespanOff(config)
        self._tasks = OwnedTasks()
        self._socket: socket.socket | None = None

    @property
    def address(self) -> str:
        """host:port as bound. Raises: RuntimeError before `start`."""
        return f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"

    @property
    def port(self) -> int:
        """The port as bound. Raises: RuntimeError before `start`."""
        if self._socket is None:
            raise RuntimeError("the HTTP server has not been started")
        return self._port

    async def start(self) -> None:
        """Bind, then serve. Raises: PortTakenError, OSError."""
        self._socket = self._bind()
        self._port = self._socket.getsockname()[1]
        # Not `serve()`: that would take over the process's signal handlers.
        await self._server.startup(sockets=[self._socket])
        self._tasks.start(self._server.main_loop(), name="http.server")

    async def stop(self, grace_s: float) -> None:
        """Take no more connections, let requests end for `grace_s`, cancel the rest and wait for it. Idempotent."""
        if self._server.should_exit or not self._server.started:
            return
        self._server.should_exit = True
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        running = self._server.server_state.tasks
        await self._server.shutdown()
        await asyncio.gather(*running, return_exceptions=True)
        await self._tasks.aclose()

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            return socket.create_server((self._host, self._port), family=family, backlog=_BACKLOG)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise PortTakenError(self._host, self._port, flag=PORT_FLAG) from exc
            raise
