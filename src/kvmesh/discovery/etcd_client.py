"""A client of etcd's public gRPC API (v3): the calls that discovery needs, over a list of endpoints.

Laws:
    - every call has a deadline, a watch too: whoever follows one resumes it at its end;
    - a call that one endpoint does not answer is tried at the next, each once; all of them are harmless when they run
      twice (a lease granted twice runs out by itself);
    - what callers act on has a class of its own (LeaseEndedError, RevisionGoneError), all else is EtcdUnavailableError:
      the store cannot do it now, ask again later.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc

from kvmesh.etcd.v1 import etcd_pb2

_T = TypeVar("_T")

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # A member that hangs, or vanished without a FIN, is noticed by the watch within 15 s. etcd allows one ping in 5 s,
    # and none while no call runs.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the one that newer cores go by
    ("grpc.http2.max_pings_without_data", 0),
    # A store that comes back is found within half a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # the bound of one connection attempt, in spite of its name
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
_WATCH_LIFE_S = 3600.0
_WITH_LEADER = (("hasleader", "true"),)
"""Have a member that lost its quorum end the watch, rather than stay silent on it."""


class EtcdUnavailableError(OSError):
    """No endpoint could do it now."""


class LeaseEndedError(LookupError):
    """The lease named does not exist, or no longer."""


class RevisionGoneError(LookupError):
    """The revision asked for was compacted away, or is yet to come, as in a store that was emptied."""


class EtcdClient:
    """One connection per endpoint, one endpoint in use at a time: the last that answered."""

    def __init__(self, endpoints: Sequence[str], *, rpc_timeout_s: float = 2.0) -> None:
        """Connect to `endpoints` (HOST:PORT) when first used; `rpc_timeout_s` bounds a call at one of them."""
        if not endpoints:
            raise ValueError("etcd needs at least one endpoint")
        self.endpoints = tuple(endpoints)
        self._rpc_timeout_s = rpc_timeout_s
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._current = 0
        self._is_closed = False

    async def list(self, prefix: bytes) -> etcd_pb2.RangeResponse:
        """Return every key that begins with `prefix`. Raises: EtcdUnavailableError."""
        return await self._range(etcd_pb2.RangeRequest(key=prefix, range_end=prefix_end(prefix)))

    async def get(self, key: bytes, *, revision: int = 0) -> etcd_pb2.RangeResponse:
        """Return one key as it stood at `revision` (0 = now). Raises: RevisionGoneError, EtcdUnavailableError."""
        return await self._range(etcd_pb2.RangeRequest(key=key, revision=revision))

    async def transact(self, request: etcd_pb2.TxnRequest) -> etcd_pb2.TxnResponse:
        """Run a transaction. Raises: LeaseEndedError if it puts under a lease that ended; EtcdUnavailableError."""
        return await self._unary("/etcdserverpb.KV/Txn", request, etcd_pb2.TxnResponse)

    async def grant_lease(self, ttl_s: int) -> etcd_pb2.LeaseGrantResponse:
        """Make a lease; its life is what the answer says. Raises: EtcdUnavailableError."""
        request = etcd_pb2.LeaseGrantRequest(ttl_s=ttl_s)
        return await self._unary("/etcdserverpb.Lease/LeaseGrant", request, etcd_pb2.LeaseGrantResponse)

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease and delete its keys. Raises: LeaseEndedError, EtcdUnavailableError."""
        request = etcd_pb2.LeaseRevokeRequest(lease_id=lease_id)
        await self._unary("/etcdserverpb.Lease/LeaseRevoke", request, etcd_pb2.LeaseRevokeResponse)

    async def renew_lease(self, lease_id: int) -> None:
        """Let a lease live for its whole life again. Raises: LeaseEndedError, EtcdUnavailableError."""
        request = etcd_pb2.LeaseKeepAliveRequest(lease_id=lease_id)

        async def renew(channel: grpc.aio.Channel) -> int:
            method: Any = channel.stream_stream(
                "/etcdserverpb.Lease/LeaseKeepAlive",
                request_serializer=etcd_pb2.LeaseKeepAliveRequest.SerializeToString,
                response_deserializer=etcd_pb2.LeaseKeepAliveResponse.FromString,
            )
            # One request and its answer: a stream held open would need a liveness rule of its own.
            answers = method(iter((request,)), timeout=self._rpc_timeout_s, metadata=_WITH_LEADER)
            async for answer in answers:
                return int(answer.ttl_s)
            raise EtcdUnavailableError("renewal: ended by etcd without an answer")

        if await self._at_any_endpoint(renew) <= 0:
            raise LeaseEndedError(f"lease {lease_id:x} has ended")

    async def watch(self, prefix: bytes, *, start_revision: int) -> "EtcdWatchStream":
        """Watch the keys that begin with `prefix` from `start_revision` on; whoever calls closes it.

        Raises: RevisionGoneError if that is compacted away; EtcdUnavailableError.
        """
        create = etcd_pb2.WatchCreateRequest(
            key=prefix, range_end=prefix_end(prefix), start_revision=start_revision, progress_notify=True
        )

        async def begin(channel: grpc.aio.Channel) -> EtcdWatchStream:
            method: Any = channel.stream_stream(
                "/etcdserverpb.Watch/Watch",
                request_serializer=etcd_pb2.WatchRequest.SerializeToString,
                response_deserializer=etcd_pb2.WatchResponse.FromString,
            )
            stream = EtcdWatchStream(method(timeout=_WATCH_LIFE_S, metadata=_WITH_LEADER))
            try:
                async with asyncio.timeout(self._rpc_timeout_s):
                    await stream.begin(create)
            except BaseException:
                stream.close()
                raise
            return stream

        return await self._at_any_endpoint(begin)

    async def aclose(self) -> None:
        """Close the connections; end the calls first, for their awaiters would see a cancellation. Idempotent."""
        self._is_closed = True
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close(None)

    async def _range(self, request: etcd_pb2.RangeRequest) -> etcd_pb2.RangeResponse:
        return await self._unary("/etcdserverpb.KV/Range", request, etcd_pb2.RangeResponse)

    async def _unary(self, path: str, request: Any, response: type[_T]) -> _T:
        async def call(channel: grpc.aio.Channel) -> _T:
            method: Any = channel.unary_unary(
                path,
                request_serializer=type(request).SerializeToString,
                response_deserializer=response.FromString,  # type: ignore[attr-defined]  # every message has it
            )
            answer: _T = await method(request, timeout=self._rpc_timeout_s)
            return answer

        return await self._at_any_endpoint(call)

    async def _at_any_endpoint(self, call: Callable[[grpc.aio.Channel], Awaitable[_T]]) -> _T:
        """Make the call at the endpoint in use, or else at the next ones, each once."""
        failures = []
        for _ in self.endpoints:
            if self._is_closed:
                raise EtcdUnavailableError("the client of etcd is closed")
            current = self._current
            endpoint = self.endpoints[current]
            try:
                return await call(self._channel(endpoint))
            except grpc.aio.AioRpcError as exc:
                failures.append(f"{endpoint}: {exc.code().name} {_meant(exc)}")
            except EtcdUnavailableError as exc:
                failures.append(f"{endpoint}: {exc}")
            except TimeoutError:
                failures.append(f"{endpoint}: no answer within {self._rpc_timeout_s:g} s")
            if self._current == current:  # else another call has moved on already
                self._current = (current + 1) % len(self.endpoints)
        raise EtcdUnavailableError("; ".join(failures))

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        if endpoint not in self._channels:
            self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        return self._channels[endpoint]


class EtcdWatchStream:
    """One watch on one endpoint; made by `EtcdClient.watch`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def begin(self, create: etcd_pb2.WatchCreateRequest) -> None:
        """Have the watch created. Raises: RevisionGoneError, grpc.aio.AioRpcError."""
        await self._call.write(etcd_pb2.WatchRequest(create_request=create))
        await self._read()

    async def read(self) -> etcd_pb2.WatchResponse:
        """Return the next response. Raises: RevisionGoneError, EtcdUnavailableError: the watch has ended."""
        try:
            return await self._read()
        except grpc.aio.AioRpcError as exc:
            raise EtcdUnavailableError(f"watch: {exc.code().name} {_meant(exc)}") from exc

    def close(self) -> None:
        """End the watch; no `read` may be running. Idempotent."""
        self._call.cancel()

    async def _read(self) -> etcd_pb2.WatchResponse:
        response = await self._call.read()
        if response is grpc.aio.EOF:
            raise EtcdUnavailableError("watch: ended by etcd")
        assert isinstance(response, etcd_pb2.WatchResponse)
        if response.compact_revision:
            raise RevisionGoneError(f"watch: compacted up to {response.compact_revision}")
        if response.canceled:
            raise EtcdUnavailableError(f"watch: ended by etcd, {response.cancel_reason}")
        return response


def prefix_end(prefix: bytes) -> bytes:
    """Return the end, exclusive, of the range of all keys that begin with `prefix`, which ends with a character."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def _meant(error: grpc.aio.AioRpcError) -> str:
    """Return the text of a failure that another endpoint may spare us. Raises: what it means, where that is known."""
    text = error.details() or ""
    if error.code() is grpc.StatusCode.NOT_FOUND:
        raise LeaseEndedError(text) from error
    if error.code() is grpc.StatusCode.OUT_OF_RANGE:
        raise RevisionGoneError(text) from error
    return text
