"""A small real OpenAI-compatible HTTP server that does what a test tells it: answers, errors, silence, a cut stream.

    with OpenAiUpstreamServer() as server:
        server.script = Script(hold_after=1)
        ... server.url ... server.wait_gone(1)

Without a script it repeats the prompt's words, one event each, until `max_tokens`.
"""

import json
import re
import select
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from types import TracebackType
from typing import Any, Self

__all__ = ["OpenAiUpstreamServer", "Script"]

_WORD = re.compile(r"\s*\S+\s*")
_LOOK_AGAIN_S = 0.02
_WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Script:
    """How every completion is answered from now on."""

    words: Sequence[str] | None = None
    """The answer, ended with `stop`, or with `length` where `max_tokens` cuts it; None: the prompt's, repeated."""
    status: int = 200
    """Anything else is answered with `body` and no stream."""
    body: bytes = b'{"error": {"message": "as the test wants it", "type": "server_error"}}'
    headers: Mapping[str, str] = field(default_factory=dict)
    hold_after: int | None = None
    """Stops after so many words until `release` or until the client is gone; 0 = before the response begins."""
    cut_after: int | None = None
    """Closes the connection after so many words."""
    end_after: int | None = None
    """Ends the response well after so many words, saying nothing of a finish."""
    error_after: int | None = None
    """Sends `body` as an event after so many words, and ends."""
    usage: Mapping[str, Any] | None = None
    """Sent after the finish where the request asks for it."""
    says_done: bool = True
    says_finish: bool = True


class OpenAiUpstreamServer:
    """Serves `/v1/models`, `/v1/completions` and `/v1/chat/completions` on a free port for the `with` block."""

    def __init__(self, models: Sequence[Mapping[str, Any]] = ({"id": "upstream-model"},), *, port: int = 0) -> None:
        """List `models`; any name is answered. `port` 0 = any free one."""
        self.models = list(models)
        self.script = Script()
        self.requests: list[dict[str, Any]] = []
        """Bodies of the completions asked for, oldest first."""
        self.request_headers: list[dict[str, str]] = []
        """Headers of every request, models too, names in lower case."""
        self.release = threading.Event()
        """Lets those held go on."""
        self._changed = threading.Condition()
        self._gone = 0
        self._most_open = self._open = 0
        self._server = _Server(("127.0.0.1", port), _handler_of(self))

    @property
    def url(self) -> str:
        """Base of the API."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    @property
    def most_open(self) -> int:
        """The most completions that were being answered at once."""
        return self._most_open

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_LOOK_AGAIN_S,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening, let go of what is held, and break every connection as a dying process does. Idempotent."""
        self.release.set()
        self._server.shutdown()
        self._server.break_connections()
        self._server.server_close()
        self._thread.join(_WAIT_S)

    def wait_requests(self, count: int) -> None:
        """Wait until so many completions were asked for. Raises: AssertionError."""
        self._wait(lambda: len(self.requests) >= count, f"{count} requests")

    def wait_gone(self, count: int) -> None:
        """Wait until so many clients have left while they were held. Raises: AssertionError."""
        self._wait(lambda: self._gone >= count, f"{count} clients that leave")

    def note(self, *, body: dict[str, Any] | None = None, opened: int = 0, gone: int = 0) -> None:
        """Take down what a handler saw."""
        with self._changed:
            if body is not None:
                self.requests.append(body)
            self._open += opened
            self._most_open = max(self._most_open, self._open)
            self._gone += gone
            self._changed.notify_all()

    def _wait(self, is_over: Any, what: str) -> None:
        with self._changed:
            assert self._changed.wait_for(is_over, _WAIT_S), f"no {what} within {_WAIT_S:g} s"


def _handler_of(server: OpenAiUpstreamServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        owner = server

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._connections: set[Any] = set()
        super().__init__(address, handler)

    def break_connections(self) -> None:
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that leave are what it is for
            super().handle_error(request, client_address)


class _ClientGoneError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    owner: OpenAiUpstreamServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an event and its frame in one segment

    def log_message(self, format: str, *args: Any) -> None:  # the base class names it so
        pass

    def do_GET(self) -> None:
        self._note_headers()
        if self.path == "/v1/models":
            self._answer(200, json.dumps({"object": "list", "data": self.owner.models}).encode())
        else:
            self._answer(404, b'{"detail": "Not Found"}')

    def do_POST(self) -> None:
        self._note_headers()
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        script = self.owner.script
        self.owner.note(body=body, opened=1)
        try:
            if script.hold_after == 0:
                self._hold()
            if script.status != 200:
                self._answer(script.status, script.body, **script.headers)
            else:
                self._stream(body, script)
        except (_ClientGoneError, ConnectionError):
            self.close_connection = True
        finally:
            self.owner.note(opened=-1)

    def _note_headers(self) -> None:
        self.owner.request_headers.append({name.lower(): value for name, value in self.headers.items()})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, body: dict[str, Any], script: Script) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        words, finish = _answer_of(body, script)
        self._event(": ready")
        for count, word in enumerate(words, 1):
            self._event("data: " + json.dumps(_chunk_of(body, word, None)))
            if count == script.hold_after:
                self._hold()
            if count == script.error_after:
                self._event("data: " + script.body.decode())
                return self._end()
            if count == script.end_after:
                return self._end()
            if count == script.cut_after:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return None
        if script.says_finish:
            self._event("data: " + json.dumps(_chunk_of(body, "", finish)))
        if script.usage is not None and body.get("stream_options", {}).get("include_usage"):
            self._event("data: " + json.dumps({"choices": [], "usage": dict(script.usage)}))
        if script.says_done:
            self._event("data: [DONE]")
        return self._end()

    def _event(self, text: str) -> None:
        data = f"{text}\r\n\r\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _hold(self) -> None:
        while not self.owner.release.wait(_LOOK_AGAIN_S):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                self.owner.note(gone=1)
                raise _ClientGoneError


def _answer_of(body: Mapping[str, Any], script: Script) -> tuple[list[str], str]:
    max_tokens = int(body["max_tokens"])
    if script.words is not None:
        return list(script.words[:max_tokens]), "stop" if len(script.words) <= max_tokens else "length"
    prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    words = _WORD.findall(prompt) if isinstance(prompt, str) else [f"{token} " for token in prompt]
    return list(islice(cycle(words), max_tokens)), "length"


def _chunk_of(body: Mapping[str, Any], text: str, finish: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"delta": {"content": text}} if "messages" in body else {"text": text}
    return {"model": body["model"], "choices": [{"index": 0, "finish_reason": finish, **said}]}
