"""One gRPC server of a process: its services, their health, reflection, and an end that is bounded whatever clients do.

The stop, in order: health says NOT_SERVING; open calls get their grace, and calls that help them to end (a release, a
completion) are still taken, because refusing new requests is each role's own drain; then what is left is cancelled and
told DRAINING; then the connections close.
"""

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from kvmesh import telemetry
from kvmesh.core.waits import Waits
from kvmesh.runtime import health
from kvmesh.runtime.health import Health
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.runtime.reflection import Reflection
from kvmesh.services.channels import MAX_MESSAGE_BYTES, PortTakenError, host_port
from kvmesh.services.local_calls import StreamHandler

CLEANUP_S = 2.0
"""How long cancelled calls may take to clean up."""
FLUSH_S = 1.0
"""How long ended calls may take to reach their clients."""

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on one port must fail, not take half of the calls
    # Clients of ours ping through a long silent prefill, and while no call runs; by default that earns too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that vanished without a FIN is noticed within 20 s: its streams hold leases and requests.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the one that newer cores go by
)

_log = telemetry.logger(__name__)
_Servicer = TypeVar("_Servicer")


class GrpcServer:
    """The gRPC server of one process. Add the services, start it once, then drain and stop it."""

    def __init__(
        self, *, client_write_s: float = Waits().client_write_s, max_request_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        """`client_write_s` bounds each write of a stream to a client that does not read.

        gRPC itself refuses messages of more than `max_request_bytes`: RESOURCE_EXHAUSTED.
        """
        self._options = (*_OPTIONS, ("grpc.max_receive_message_length", max_request_bytes))
        self.health = Health()
        """What grpc.health.v1 says; the services of `add` come up with `start`, others may be set by name."""
        self.reflection = Reflection()
        """What reflection lists; the services of `add` are in it, others may be added."""
        for name in (health.SERVICE_NAME, reflection.SERVICE_NAME):
            self.reflection.add(name)
        self._calls = CallInterceptor(
            endless=(health.SERVICE_NAME, reflection.SERVICE_NAME), client_write_s=client_write_s
        )
        self._services: dict[str, Callable[[Any], None]] = {}
        self._stream_handlers: dict[str, StreamHandler] = {}
        """Of `stream_handler`, by path."""
        self._more: list[grpc.GenericRpcHandler] = []
        self._ready_at_start: list[str] = [""]
        self._server: grpc.aio.Server | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """`host:port` as it was bound. Raises: RuntimeError before `start`."""
        if not self._address:
            raise RuntimeError("the server was not started: it has no address")
        return self._address

    @property
    def open_calls(self) -> int:
        """Calls that run now, but for those of health and reflection."""
        return self._calls.open_calls

    def add(
        self,
        servicer: _Servicer,
        service: ServiceDescriptor | str,
        add_to_server: Callable[[_Servicer, Any], None],
        *,
        serving: bool = True,
    ) -> None:
        """Serve `servicer` as `service` (descriptor or full name); `add_to_server` is the generated function.

        With `serving` False health says NOT_SERVING until told otherwise. Raises: RuntimeError after `start`,
        ValueError for a service that was added already.
        """
        name = service if isinstance(service, str) else service.full_name
        if self._server is not None:
            raise RuntimeError(f"{name} came too late: the server is running")
        if name in self._services:
            raise ValueError(f"{name} was added already")
        self._services[name] = lambda server: add_to_server(servicer, server)
        self.reflection.add(name, None if isinstance(service, str) else service.file.pool)
        self.health.set_serving(name, False)
        if serving:
            self._ready_at_start.append(name)

    def add_handlers(self, handlers: grpc.GenericRpcHandler) -> None:
        """Have calls that no service takes go to `handlers`, asked call by call. Raises: RuntimeError after `start`."""
        if self._server is not None:
            raise RuntimeError("the handlers came too late: the server is running")
        self._more.append(handlers)

    def stream_handler(self, path: str) -> StreamHandler:
        """Return what serves the streaming method `path` ("/package.Service/Method"), for callers in this process.

        It is framed as calls of gRPC are, and `drain_and_stop` ends it like them. Raises: LookupError for a method that
        no service of `add` has.
        """
        known = self._stream_handlers.get(path)
        if known is None:
            handlers = _HandlerTable()
            self._services[path.split("/")[1]](handlers)
            handler = self._calls.wrap(handlers.by_path[path], path)
            known = self._stream_handlers[path] = handler.stream_stream or handler.unary_stream
        return known

    async def start(self, host: str, port: int, *, flag: str = "--grpc-port") -> int:
        """Listen on `host` (port 0 = any free one) and return the port; `flag` is the option that chooses it.

        Raises: PortTakenError when somebody listens there, and the server may then be started on another port; OSError
        when `host` is none of this machine's; RuntimeError if it was started already.
        """
        if self._server is not None:
            raise RuntimeError(f"the server was started already, on {self._address}")
        await check_free(host, port, flag=flag)
        server = grpc.aio.server(interceptors=(self._calls,), options=self._options)
        for add_to in self._services.values():
            add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        server.add_generic_rpc_handlers(tuple(self._more))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(self.reflection, server)
        try:
            bound = server.add_insecure_port(host_port(host, port))
        except RuntimeError as exc:  # the check above passed: the port went in between
            raise PortTakenError(host, port, flag=flag) from exc
        await server.start()
        self._server, self._address = server, host_port(host, bound)
        for name in self._ready_at_start:
            self.health.set_serving(name, True)
        _log.info("server.started", address=self._address, services=sorted(self._services))
        return bound

    async def drain_and_stop(self, grace_s: float) -> None:
        """Stop, within `grace_s` + `CLEANUP_S` + `FLUSH_S`. Idempotent; the most impatient of several callers wins.

        Not for handlers of this server: the stop would wait for its own caller.
        """
        self.health.drain()
        if self._server is None:
            return
        try:
            async with asyncio.timeout(grace_s):
                await self._calls.wait_idle()
        except TimeoutError:
            _log.warning("server.grace_ended", address=self._address, cancelled=self._calls.open_calls)
        self.health.close()
        stuck = await self._calls.end_calls(spared=health.SERVICE_NAME, within_s=CLEANUP_S)
        # Handlers are done, but their last bytes may not be: only a stuck one is worth breaking connections for.
        await self._server.stop(None if stuck else FLUSH_S)
        _log.info("server.stopped", address=self._address, stuck=stuck)


class _HandlerTable:
    """Takes in what a generated function adds to a server."""

    def __init__(self) -> None:
        self.by_path: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Leave aside: the same handlers come registered."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.by_path.update({f"/{service}/{method}": handler for method, handler in handlers.items()})


async def check_free(host: str, port: int, *, flag: str) -> None:
    """Find out whether a port can be listened on; port 0 can. Raises: PortTakenError, OSError.

    Binds and lets go: gRPC itself tells neither why it could not bind nor that only one address of a name was free.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as exc:
        raise OSError(exc.errno, f"cannot listen on {host}: {exc.strerror}") from exc
    for family, kind, protocol, _, address in found:
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(address)
            except OSError as exc:
                if exc.errno == errno.EADDRINUSE:
                    raise PortTakenError(host, port, flag=flag) from exc
                raise OSError(exc.errno, f"cannot listen on {host}: {exc.strerror}") from exc
