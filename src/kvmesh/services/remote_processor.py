"""The processors of other processes as one generator: how a frontend on its own serves requests."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

import grpc
import uuid_utils

from kvmesh import telemetry
from kvmesh.core.errors import MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.waits import Waits
from kvmesh.services.channels import Channels
from kvmesh.services.peers import Peers
from kvmesh.services.served_models import served_models
from kvmesh.v1 import frontend_pb2, generation_pb2, processor_pb2, processor_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.generation import Delta, DeltaWriter, Event

log = telemetry.logger(__name__)

_LOST = frozenset({Reason.WORKER_LOST, Reason.DRAINING})
"""What says that the processor and not the request is the trouble."""

_REACHED = frozenset({grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.IDLE})
"""Idle is a channel that nobody has used yet, or not for long."""

_MAX_ATTEMPTS = 4
"""At one request: a processor that is lost, found again and lost again must not be asked for ever."""


class _GoneError(TryElsewhereError):
    """The processor itself could not be reached: the request may go to it again once it is back."""


class RemoteProcessor:
    """A `Generator`: each request goes to the next processor, and on if that is lost before the first event.

    It goes to another one; where those it tried are gone, it waits `waits.route_s` for one to come, or to come back.
    """

    def __init__(self, *, peers: Peers, channels: Channels, waits: Waits) -> None:
        """Find processors by `peers`."""
        self.draining = False
        self._peers = peers
        self._channels = channels
        self._waits = waits
        self._turn = itertools.count()
        self._running: set[grpc.aio.UnaryStreamCall] = set()  # type: ignore[type-arg]
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        """Nothing to begin: processors are found when they are needed."""

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs finish, end the rest after `timeout_s`."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            telemetry.WAIT_ENDED.labels(wait="drain_s").inc()
        await self.aclose()

    async def aclose(self) -> None:
        """End what still runs."""
        for call in tuple(self._running):
            call.cancel()

    def reaches_any(self) -> bool:
        """Tell whether some processor is connected, as far as is known; begin to connect to those that are not."""
        states = [
            self._channels.get(address).get_state(try_to_connect=True) for address in self._peers.processor_addresses()
        ]
        return any(state in _REACHED for state in states)

    def models(self) -> frontend_pb2.ListModelsResponse:
        """List the models of the live decode workers, sorted by name."""
        return served_models(self._peers.roster)

    async def generate(
        self,
        request: frontend_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        writer: DeltaWriter | None = None,
    ) -> AsyncGenerator[Event, None]:
        """See `Generator.generate`; every Delta is yielded."""
        if self.draining:
            raise TryElsewhereError(Reason.DRAINING, "this frontend takes no new requests")
        wanted = processor_pb2.ProcessorGenerateRequest(
            request_id=request_id or str(uuid_utils.uuid7()), request=request
        )
        ends_at = asyncio.get_running_loop().time() + (self._waits.request_s if timeout_s is None else timeout_s)
        self._requests += 1
        self._idle.clear()
        try:
            async for response in self._responses(wanted, ends_at=ends_at):
                yield _event_of(response)
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def _responses(
        self, wanted: processor_pb2.ProcessorGenerateRequest, *, ends_at: float
    ) -> AsyncIterator[processor_pb2.ProcessorGenerateResponse]:
        tried: dict[str, MeshError] = {}
        for attempt in itertools.count(1):
            address = await self._next(tried, ends_at=ends_at)
            has_begun = False
            try:
                async for response in self._call(address, wanted, ends_at=ends_at):
                    has_begun = True
                    yield response
                return
            except MeshError as error:
                tried[address] = error
                others = set(self._peers.processor_addresses()) - set(tried)
                may_go_on = others or any(isinstance(one, _GoneError) for one in tried.values())
                if has_begun or self.draining or error.reason not in _LOST or attempt >= _MAX_ATTEMPTS or not may_go_on:
                    raise
                log.warning("processor.lost", request_id=wanted.request_id, address=address, error=error.message)
                telemetry.REQUEST_RETRIES.inc()

    async def _next(self, tried: dict[str, MeshError], *, ends_at: float) -> str:
        """Return the next processor, waiting for one to come, or to come back.

        Raises: OutOfTimeError(DEADLINE), TryElsewhereError(NO_WORKERS), or what the last of those `tried` said.
        """
        loop = asyncio.get_running_loop()
        route_until = loop.time() + self._waits.route_s
        try:
            async with asyncio.timeout_at(min(route_until, ends_at)):
                while True:
                    known = [address for address in self._peers.processor_addresses() if address not in tried]
                    if known:
                        return known[next(self._turn) % len(known)]
                    if (address := await self._news(tried)) is not None:
                        return address
        except TimeoutError as exc:
            if ends_at < route_until:
                raise OutOfTimeError(Reason.DEADLINE, "no processor before the deadline") from exc
            telemetry.WAIT_ENDED.labels(wait="route_s").inc()
            raise (next(reversed(tried.values()), None) or _no_processor()) from exc

    async def _news(self, tried: dict[str, MeshError]) -> str | None:
        """Wait until discovery has news, or one of those that were gone is connected again; return the latter."""
        lost = [address for address, error in tried.items() if isinstance(error, _GoneError)]
        waits = [asyncio.ensure_future(self._connected(address)) for address in lost]
        changed = asyncio.ensure_future(self._peers.changed())
        try:
            await asyncio.wait((changed, *waits), return_when=asyncio.FIRST_COMPLETED)
            # A wait that failed is one whose channel was closed meanwhile: its address is gone for good.
            ended = [address for address, wait in zip(lost, waits, strict=True) if wait.done() and not wait.exception()]
            return ended[0] if ended else None
        finally:
            for wait in (changed, *waits):
                wait.cancel()
            await asyncio.gather(changed, *waits, return_exceptions=True)

    async def _connected(self, address: str) -> None:
        channel = self._channels.get(address)
        while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(state)

    async def _call(
        self, address: str, wanted: processor_pb2.ProcessorGenerateRequest, *, ends_at: float
    ) -> AsyncIterator[processor_pb2.ProcessorGenerateResponse]:
        stub = processor_pb2_grpc.ProcessorStub(self._channels.get(address))
        call = stub.Generate(wanted, timeout=max(ends_at - asyncio.get_running_loop().time(), 0.0))
        self._running.add(call)
        is_finished = False
        try:
            async for response in call:
                is_finished = response.HasField("finished")
                yield response
            if not is_finished:  # a part must never pass for the whole
                raise TryElsewhereError(Reason.WORKER_LOST, "the processor's stream ended without finished")
        except grpc.aio.AioRpcError as exc:
            if _is_of_grpc_itself(exc):
                raise _GoneError(Reason.WORKER_LOST, f"the processor at {address} is gone or does not answer") from exc
            raise from_rpc_error(exc) from exc
        except asyncio.CancelledError:
            if self.draining and call.cancelled() and not _is_cancelling():
                raise TryElsewhereError(Reason.DRAINING, "this frontend is shutting down") from None
            raise
        finally:
            self._running.discard(call)
            with suppress(grpc.RpcError):
                call.cancel()


def _no_processor() -> TryElsewhereError:
    return TryElsewhereError(Reason.NO_WORKERS, "no processor is known")


def _is_of_grpc_itself(error: grpc.aio.AioRpcError) -> bool:
    """Tell whether nobody answered; a processor that says UNAVAILABLE of a worker sends details."""
    details = {key for key, _ in error.trailing_metadata() or ()}
    return error.code() is grpc.StatusCode.UNAVAILABLE and "grpc-status-details-bin" not in details


def _is_cancelling() -> bool:
    """Tell whether this task itself was cancelled, and not only the call that it reads."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _event_of(response: processor_pb2.ProcessorGenerateResponse) -> Event:
    match response.WhichOneof("event"):
        case "started":
            return response.started
        case "chunk":
            chunk: generation_pb2.Chunk = response.chunk
            return Delta(
                pieces=list(response.pieces) or [chunk.text],
                token_ids=list(chunk.token_ids),
                logprobs=list(chunk.logprobs),
            )
        case "finished":
            return response.finished
        case _:
            raise MeshError(Reason.INTERNAL, "the processor sent an event of no known kind")
