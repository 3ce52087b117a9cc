"""/metrics of a process that has no HTTP door."""

import asyncio
from typing import Protocol

from prometheus_client import start_http_server

from kvmesh.runtime.role import Listen
from kvmesh.runtime.server import check_free


class _Server(Protocol):
    server_port: int

    def shutdown(self) -> None: ...

    def server_close(self) -> None: ...


class MetricsServer:
    """Serves what this process counts, from `start` to `stop`."""

    def __init__(self, host: str, port: int) -> None:
        """Nothing is bound yet; port 0 = any free one."""
        self._host = host
        self._port = port
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """Where it is reached, once started."""
        assert self._server is not None, "not started"
        return f"http://{Listen(self._host).address(self._server.server_port)}/metrics"

    async def start(self) -> None:
        """Listen. Raises: PortTakenError, OSError."""
        await check_free(self._host, self._port, flag="--metrics-port")
        self._server, _ = start_http_server(self._port, addr=self._host)

    async def stop(self) -> None:
        """Listen no longer. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.shutdown)
            server.server_close()
