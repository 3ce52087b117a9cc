"""A real etcd for tests: one member on free ports of 127.0.0.1, its store in a temporary folder.

The calls block; on an event loop that serves something else, run them in a thread (`asyncio.to_thread`).
"""

import base64
import contextlib
import json
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from kvmesh.discovery.embedded_etcd import etcd_command, find_etcd, free_ports

WAIT_S = 30.0
"""How long anything etcd should do may take on a busy machine."""
_LOOK_AGAIN_S = 0.02
_START_ATTEMPTS = 3
"""Another process may take a port between its choice and etcd's start."""


class EtcdServer:
    """Runs from `start`, or the beginning of a `with` block, until `close` or its end."""

    def __init__(self) -> None:
        """Choose nothing yet; ports are chosen once and kept over restarts."""
        self.client_port = 0
        self._peer_port = 0
        self._folder = tempfile.TemporaryDirectory(prefix="kvmesh-etcd-")
        self._store_number = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "EtcdServer":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """HOST:PORT of its clients."""
        return f"127.0.0.1:{self.client_port}"

    def start(self) -> None:
        """Start and return when it answers. Raises: RuntimeError if it does not."""
        if self.client_port:
            self._launch()
            return
        for attempt in range(_START_ATTEMPTS):
            self.client_port, self._peer_port = free_ports(2)
            try:
                self._launch()
                return
            except RuntimeError:
                if attempt == _START_ATTEMPTS - 1:
                    raise

    def stop(self) -> None:
        """End it in good order; the store stays. Idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it without a word; the store stays. Idempotent."""
        self._end(signal.SIGKILL)

    def restart(self, *, empty: bool = False) -> None:
        """Start it again on the same ports, with the store that it left or with an empty one."""
        self.kill()
        if empty:
            self._store_number += 1
        self.start()

    def pause(self) -> None:
        """Have it hang (SIGSTOP): connections stay open and nothing answers."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._running().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and delete its store. Idempotent."""
        self.kill()
        self._folder.cleanup()

    def call(self, path: str, **body: Any) -> dict[str, Any]:
        """Call etcd's own JSON gateway, e.g. `call("kv/compaction", revision=5)`, without any code of ours between."""
        request = urllib.request.Request(
            f"http://{self.endpoint}/v3/{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with _open(request) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def keys(self, prefix: str = "") -> dict[str, bytes]:
        """Return every key that begins with `prefix`, and its value."""
        start, end = (
            (prefix.encode(), prefix[:-1].encode() + bytes((ord(prefix[-1]) + 1,))) if prefix else (b"\0", b"\0")
        )
        answer = self.call("kv/range", key=_base64(start), range_end=_base64(end))
        return {
            base64.b64decode(kv["key"]).decode(): base64.b64decode(kv.get("value", "")) for kv in answer.get("kvs", ())
        }

    def revision(self) -> int:
        """Return the store's revision."""
        return int(self.call("kv/range", key=_base64(b"\0"), limit=1)["header"]["revision"])

    def put(self, key: str, value: bytes) -> None:
        """Put a key under no lease."""
        self.call("kv/put", key=_base64(key.encode()), value=_base64(value))

    def wipe(self) -> None:
        """Delete every key; leases and history stay."""
        self.call("kv/deleterange", key=_base64(b"\0"), range_end=_base64(b"\0"))

    def compact(self) -> None:
        """Forget all history before now."""
        self.call("kv/compaction", revision=self.revision(), physical=True)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("etcd is not running")
        return self._process

    def _launch(self) -> None:
        program = find_etcd()
        if program is None:
            raise RuntimeError("no etcd found: install kvmesh[etcd], or put etcd on the PATH")
        folder = Path(self._folder.name)
        command = etcd_command(
            program,
            folder=folder / f"store-{self._store_number}",
            client_port=self.client_port,
            peer_port=self._peer_port,
        )
        with (folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait_healthy()

    def _wait_healthy(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and self._running().poll() is None:
            with contextlib.suppress(OSError, ValueError), _open(f"http://{self.endpoint}/health") as response:
                if json.load(response).get("health") == "true":
                    return
            time.sleep(_LOOK_AGAIN_S)
        self.kill()
        raise RuntimeError(f"etcd did not start:\n{(Path(self._folder.name) / 'etcd.log').read_text()}")

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)  # it may be paused
        try:
            process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(WAIT_S)


def _open(request: urllib.request.Request | str) -> Any:
    """Open a URL of loopback, whatever proxy the environment names."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=WAIT_S)


def _base64(text: bytes) -> str:
    return base64.b64encode(text).decode()
