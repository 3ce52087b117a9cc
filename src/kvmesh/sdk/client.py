"""Client: calls one endpoint of a component, at the instance it is told or at one that it chooses.

An instance that is lost or drains before its first answer is replaced once by another, so a method runs at least once;
one that was not connected ran nothing and does not count. After the first answer, and of the method's own errors,
the caller is told.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor

from kvmesh.core.errors import FixRequestError, MeshError, NotKnownError, Reason, TryElsewhereError
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.suggestions import suggestion
from kvmesh.sdk.codec import Codec, PlainCodec, codec_of
from kvmesh.sdk.context import context
from kvmesh.sdk.contract import decode_contract
from kvmesh.sdk.records import contract_text
from kvmesh.services.channels import mesh_error
from kvmesh.wire.metadata import REQUEST_ID_KEY

if TYPE_CHECKING:
    from kvmesh.sdk.runtime import Runtime

Answers = AsyncGenerator[Any, None]
_Choose = Callable[[Sequence[WorkerRecord]], WorkerRecord]
_State = grpc.ChannelConnectivity
_ATTEMPTS = 2
_DETAILS = "grpc-status-details-bin"
"""Trailer with the ErrorInfo that every error of a server of ours has; gRPC's own errors have none."""
_LOOK_AGAIN_S = 0.2


class _UnreachedError(Exception):
    """An instance is not connected: the call was not sent, so nothing ran."""


class Client:
    """Calls one endpoint. Requests are models, dicts, the text of a JSON object, or protobuf messages."""

    def __init__(
        self, runtime: "Runtime", namespace: str, component: str, endpoint: str, *, answer: Any = None
    ) -> None:
        """Answers are of the type `answer`, a pydantic model or a protobuf message; None = dicts and plain values."""
        self._runtime = runtime
        self._namespace = namespace
        self._component = component
        self._endpoint = endpoint
        self._answer = answer
        self._last = ""
        self._codec: tuple[Descriptor, Codec] | None = None

    @property
    def address(self) -> str:
        """namespace/component/endpoint."""
        return f"{self._namespace}/{self._component}/{self._endpoint}"

    def worker_ids(self) -> list[str]:
        """Return the ids of the instances that take requests."""
        return [record.worker_id for record in self._runtime.workers(self._namespace, self._component)]

    async def wait_for_workers(self, count: int = 1, *, timeout_s: float = 30.0) -> list[str]:
        """Wait until so many instances take requests, and return their ids. Raises: TryElsewhereError(NO_WORKERS)."""
        return [record.worker_id for record in await self._live(count, timeout_s)]

    async def generate(self, request: Any, *, timeout_s: float | None = None) -> Answers:
        """Call the next instance in turn; see `round_robin`."""
        return await self.round_robin(request, timeout_s=timeout_s)

    async def round_robin(self, request: Any, *, timeout_s: float | None = None) -> Answers:
        """Call the next instance in turn and return its answers; of an endpoint that does not stream, one.

        `timeout_s` bounds the whole call. Raises: TryElsewhereError(NO_WORKERS) when nobody serves it for
        `waits.route_s`, or for as long as the call has; NotKnownError where they have no such endpoint. Iterating
        raises what the endpoint raised, and NO_WORKERS when nobody could be reached for so long.
        """
        return await self._call(request, self._next, timeout_s=timeout_s)

    async def random(self, request: Any, *, timeout_s: float | None = None) -> Answers:
        """Call any instance; otherwise as `round_robin`."""
        return await self._call(request, random.choice, timeout_s=timeout_s)

    async def direct(self, request: Any, worker_id: str, *, timeout_s: float | None = None) -> Answers:
        """Call this instance; otherwise as `round_robin`. Raises: TryElsewhereError(NO_WORKERS) if it is not there."""

        def choose(records: Sequence[WorkerRecord]) -> WorkerRecord:
            for record in records:
                if record.worker_id == worker_id:
                    return record
            known = ", ".join(record.worker_id for record in records)
            raise TryElsewhereError(Reason.NO_WORKERS, f"{self.address}: no worker {worker_id!r} is live: {known}")

        return await self._call(request, choose, timeout_s=timeout_s, attempts=1)

    def _next(self, records: Sequence[WorkerRecord]) -> WorkerRecord:
        """Take the first id after the last one taken: whoever comes or goes, the turn goes on."""
        chosen = next((record for record in records if record.worker_id > self._last), records[0])
        self._last = chosen.worker_id
        return chosen

    async def _call(
        self, request: Any, choose: _Choose, *, timeout_s: float | None, attempts: int = _ATTEMPTS
    ) -> Answers:
        bound_s = self._runtime.waits.request_s if timeout_s is None else timeout_s
        remaining_s = context.time_remaining()
        bound_s = bound_s if remaining_s is None else min(bound_s, remaining_s)
        deadline = asyncio.get_running_loop().time() + bound_s
        record = choose(await self._live(1, min(self._runtime.waits.route_s, bound_s)))
        method = self._method(record)
        data = PlainCodec(method.input_type).encode(request)
        return self._answers(record, method, data, choose, deadline=deadline, attempts=attempts)

    async def _answers(
        self,
        record: WorkerRecord,
        method: MethodDescriptor,
        data: bytes,
        choose: _Choose,
        *,
        deadline: float,
        attempts: int,
    ) -> Answers:
        failed: set[tuple[WorkerId, Epoch]] = set()
        attempts_sent = 0
        wait_until = min(asyncio.get_running_loop().time() + self._runtime.waits.route_s, deadline)
        codec = self._answers_codec(method.output_type)
        while True:
            has_answered = False
            try:
                async for answer in self._stream(record, method, data, deadline=deadline):
                    has_answered = True
                    yield codec.decode(answer)
                return
            except (_UnreachedError, grpc.aio.AioRpcError) as exc:
                if has_answered or attempts == 1 or not _is_gone(exc):
                    raise _error_of(exc) from exc
                attempts_sent += not isinstance(exc, _UnreachedError)
                failed.add((record.worker_id, record.epoch))
                others = tuple(one for one in self._records() if (one.worker_id, one.epoch) not in failed)
                if attempts_sent and (attempts_sent >= attempts or not others):
                    raise _error_of(exc) from exc
                if not others:
                    others = await self._look_again(wait_until, exc)
                    failed.clear()  # an instance whose machine was away comes back as the same one
                record = choose(others)

    async def _stream(
        self, record: WorkerRecord, method: MethodDescriptor, data: bytes, *, deadline: float
    ) -> AsyncGenerator[bytes, None]:
        assert method.containing_service is not None
        path = f"/{method.containing_service.full_name}/{method.name}"
        channel = self._runtime.channels.get(record.address)
        if not await _is_connected(channel, deadline):
            raise _UnreachedError(f"{record.worker_id} is not reached at {record.address}")
        timeout_s = max(deadline - asyncio.get_running_loop().time(), 0.0)
        metadata = ((REQUEST_ID_KEY, context.request_id),) if context.request_id else ()
        if not method.server_streaming:
            yield await channel.unary_unary(path, _as_is, _as_is)(data, timeout=timeout_s, metadata=metadata)
            return
        call = channel.unary_stream(path, _as_is, _as_is)(data, timeout=timeout_s, metadata=metadata)
        try:
            async for answer in call:
                yield answer
        finally:
            with suppress(grpc.RpcError):
                call.cancel()

    async def _look_again(self, until: float, error: Exception) -> tuple[WorkerRecord, ...]:
        """Return who is there after a moment, or at the next news. Raises: TryElsewhereError(NO_WORKERS) at `until`."""
        loop = asyncio.get_running_loop()
        while (now := loop.time()) < until:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(now + _LOOK_AGAIN_S, until)):
                    await self._runtime.changed()
            if records := self._records():
                return records
        raise TryElsewhereError(
            Reason.NO_WORKERS, f"no worker of {self._namespace}/{self._component} can be reached: {error}"
        ) from error

    def _answers_codec(self, descriptor: Descriptor) -> Codec:
        """Return the codec of the answers, made once per contract: each has types of its own."""
        if self._codec is None or self._codec[0] is not descriptor:
            codec = PlainCodec(descriptor) if self._answer is None else codec_of(descriptor, self._answer)
            self._codec = (descriptor, codec)
        return self._codec[1]

    def _records(self) -> tuple[WorkerRecord, ...]:
        return self._runtime.workers(self._namespace, self._component)

    async def _live(self, count: int, timeout_s: float) -> tuple[WorkerRecord, ...]:
        try:
            async with asyncio.timeout(timeout_s):
                while len(records := self._records()) < count:
                    await self._runtime.changed()
                return records
        except TimeoutError:
            # The wait that ended tells a reader nothing: the error is the whole story.
            if (unreached := self._runtime.unreached_door()) is not None:
                raise TryElsewhereError(
                    Reason.NO_WORKERS,
                    f"cannot reach {unreached}: start a mesh there (`kvmesh up`, or `kvmesh serve module:Class`), "
                    "or name the address of another",
                ) from None
            raise TryElsewhereError(Reason.NO_WORKERS, self._lack(count)) from None

    def _lack(self, count: int) -> str:
        """Say why there are fewer instances than so many: they drain, or what runs is something else."""
        of = f"{self._namespace}/{self._component}"
        if draining := self._runtime.draining(self._namespace, self._component):
            return (
                f"{len(self._records())} workers of {of} take requests, {count} are wanted; draining: {len(draining)}; "
                f"`kvmesh undrain {draining[0].worker_id}` takes one back into service, unless its process is stopping"
            )
        known = ", ".join("/".join(one) for one in self._runtime.components()) or "none"
        return f"{len(self._records())} workers of {of} run, {count} are wanted; components that run: {known}"

    def _method(self, record: WorkerRecord) -> MethodDescriptor:
        text = contract_text(record)
        if not text:
            raise FixRequestError(
                Reason.INVALID_FIELD, f"{self.address} is no component of the SDK: call it by the stubs of its contract"
            )
        try:
            service = _service(text)
        except ValueError as exc:
            raise FixRequestError(Reason.INVALID_FIELD, f"{self.address} of {record.worker_id}: {exc}") from exc
        method = service.methods_by_name.get(self._endpoint)
        if method is None:
            raise NotKnownError(
                Reason.NOT_FOUND,
                f"{self._namespace}/{self._component} has no endpoint {self._endpoint!r}; "
                f"{suggestion(self._endpoint, list(service.methods_by_name))}",
            )
        return method


@lru_cache(maxsize=256)
def _service(text: str) -> ServiceDescriptor:
    return decode_contract(text)[0]


def _is_gone(error: _UnreachedError | grpc.aio.AioRpcError) -> bool:
    """Tell whether the instance was not reached, or takes nothing new: an endpoint's own error is its answer."""
    if isinstance(error, _UnreachedError):
        return True
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    is_from_a_server = any(key == _DETAILS for key, _ in error.trailing_metadata() or ())
    return not is_from_a_server or mesh_error(error).reason is Reason.DRAINING


async def _is_connected(channel: grpc.aio.Channel, deadline: float) -> bool:
    """Wait until a channel has connected, or failed to; True at the deadline too, at which the call itself ends."""
    with suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            while (state := channel.get_state(try_to_connect=True)) is not _State.READY:
                if state in (_State.TRANSIENT_FAILURE, _State.SHUTDOWN):
                    return False
                await channel.wait_for_state_change(state)
    return True


def _error_of(error: _UnreachedError | grpc.aio.AioRpcError) -> MeshError:
    if isinstance(error, _UnreachedError):
        return TryElsewhereError(Reason.WORKER_LOST, str(error))
    return mesh_error(error)


def _as_is(data: bytes) -> bytes:
    return data
