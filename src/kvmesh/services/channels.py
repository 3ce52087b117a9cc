"""Outbound gRPC: one channel per address, and the errors that come back on it."""

import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import grpc

from kvmesh.core.errors import MeshError
from kvmesh.wire import error_catalog

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Longest message that a server or a channel of the mesh sends or takes."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a FIN is noticed within 20 s, also while no call runs. Servers of ours allow one
    # ping in 10 s; a shorter period would earn GOAWAY too_many_pings.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the one that newer cores go by
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A worker that comes back on its old address is found within 2 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # the bound of one connection attempt, in spite of its name
    # Connections belong to this cache alone: closing one never touches another component of the process.
    ("grpc.use_local_subchannel_pool", 1),
    # Workers are reached directly: a proxy variable in the environment must not divert the data plane.
    ("grpc.enable_http_proxy", 0),
)


class PortTakenError(OSError):
    """Another process listens where this one should; the text says what to do."""

    def __init__(self, host: str, port: int, *, flag: str) -> None:
        """`flag` is the command-line option that chooses this port."""
        super().__init__(
            errno.EADDRINUSE,
            f"port {port} on {host} is taken: stop the process that listens there, "
            f"or choose another port with {flag} (0 = any free one)",
        )
        self.host = host
        self.port = port

    def __str__(self) -> str:
        return str(self.strerror)


class Channels:
    """The channels of one component, made on first use, one per address; all closed by `aclose`."""

    def __init__(self) -> None:
        self._by_address: dict[str, grpc.aio.Channel] = {}
        self._unlisted: set[str] = set()
        """Those that `drop_unlisted` saw the last time."""
        self._closed = False

    @property
    def addresses(self) -> Collection[str]:
        """Where there is a channel to, connected or not."""
        return self._by_address.keys()

    def get(self, address: str) -> grpc.aio.Channel:
        """Return the channel to `host:port`; it connects when first used. Raises: RuntimeError after `aclose`."""
        if self._closed:
            raise RuntimeError(f"no channel to {address}: the channels are closed")
        channel = self._by_address.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            self._by_address[address] = channel
        return channel

    async def drop(self, address: str, *, grace_s: float | None = None) -> None:
        """Forget and close the channel to an address; calls still open after `grace_s` are cancelled. Idempotent.

        The awaiter of a call cancelled this way sees `asyncio.CancelledError`: end the calls first where that matters.
        """
        channel = self._by_address.pop(address, None)
        if channel is not None:
            await channel.close(grace_s)

    async def drop_unlisted(self, listed: Collection[str]) -> None:
        """Drop the channels to addresses that are not listed, now and the last time, unless they are connected.

        Who has gone may still end what runs, and whoever tries to reach it has until the next time to give up.
        """
        before = self._unlisted
        self._unlisted = {
            address
            for address, channel in self._by_address.items()
            if address not in listed and channel.get_state() is not grpc.ChannelConnectivity.READY
        }
        for address in before & self._unlisted:
            await self.drop(address)

    async def aclose(self) -> None:
        """Close every channel for good and cancel what still runs on them. Idempotent."""
        self._closed = True
        while self._by_address:
            _, channel = self._by_address.popitem()
            await channel.close(None)


def host_port(host: str, port: int) -> str:
    """Return an address as gRPC reads it; an IPv6 host goes into brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def mesh_error(error: grpc.aio.AioRpcError) -> MeshError:
    """Return the error of ours behind a failed call."""
    return error_catalog.from_rpc_error(error)


@contextmanager
def mesh_errors() -> Iterator[None]:
    """Make calls within the block fail with the MeshError that the peer meant. Raises: MeshError."""
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        raise mesh_error(exc) from exc
