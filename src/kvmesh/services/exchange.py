"""The worker's end of DecodeWorker.Exchange: many requests on one stream, at most one frame per engine step.

At most one frame is unsent: while a write is under way, what further steps produce merges into the next one. Where the
processor allows it, and many requests run, output of those that stream already waits a little for more, because a
frame, and the write to a client that follows it, cost the same for one token as for three.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import MeshError, OutOfTimeError, Reason
from kvmesh.core.ids import AttemptKey
from kvmesh.services.decode_requests import DecodeRequests
from kvmesh.services.pending_output import PendingOutput
from kvmesh.v1 import decode_worker_pb2, generation_pb2
from kvmesh.wire.error_catalog import to_status
from kvmesh.wire.validation import invalid

log = telemetry.logger(__name__)

_BEGUN_WITHIN_S = 0.005
"""How long the word that a request has begun waits for a frame to travel in: alone it would double the frames."""

_MERGE_FROM_REQUESTS = 8
"""Requests on an exchange from which on output may wait: below, nobody is short of CPU, and latency is what counts."""
_MERGE_IN_FULL_FROM_REQUESTS = 48
"""Requests from which on output may wait as long as the processor allows; with fewer, as much less."""
_LEAST_MERGE_SHARE = 1 / 3
"""Of that time, with eight requests or more: below it, frames of short steps would be many and nearly empty."""


class _StreamSink:
    """Puts the events of one request into the exchange's pending frame."""

    __slots__ = ("exchange", "is_streaming", "key", "output", "stream_id")

    def __init__(self, exchange: "Exchange", stream_id: int) -> None:
        self.exchange = exchange
        self.stream_id = stream_id
        self.output = exchange.output.of(stream_id)
        self.key: AttemptKey | None = None
        self.is_streaming = False
        """Its first output has been sent, or is due."""

    def accepted(self, load_sequence: int) -> None:
        self.exchange.frame.accepted.add(stream_id=self.stream_id, load_sequence=load_sequence)
        self.exchange.send_soon()

    def prefill(self, decision: generation_pb2.PrefillDecision) -> None:
        self.exchange.frame.prefills.add(stream_id=self.stream_id, decision=decision)
        self.exchange.send_soon()

    def computed(self, usage: generation_pb2.Usage) -> None:
        self.exchange.frame.prefills.add(stream_id=self.stream_id, usage=usage)
        self.exchange.ready.set()

    def likely(self, logprobs: list[generation_pb2.TokenLogprobs]) -> None:
        self.exchange.frame.logprobs.add(stream_id=self.stream_id, tokens=logprobs)
        self.is_streaming = False  # they travel with their tokens

    def produced(self, token_ids: tuple[int, ...], words: tuple[str, ...]) -> None:
        self.output.put(token_ids, words)
        if not self.is_streaming or self.exchange.merging is None:
            self.exchange.produced(self)

    def finished(self, finished: generation_pb2.Finished) -> None:
        self.exchange.frame.finished.add(stream_id=self.stream_id, finished=finished)
        self.exchange.ended(self)

    def failed(self, error: MeshError, *, rejected: bool) -> None:
        self.exchange.frame.failed.add(stream_id=self.stream_id, status=to_status(error), rejected=rejected)
        self.exchange.ended(self)


class Exchange:
    """One open exchange. When it ends, for whatever reason, all of its requests are cancelled."""

    def __init__(self, requests: DecodeRequests, *, write_timeout_s: float, merge_within_s: float = 0.0) -> None:
        """Serve one processor with `requests`; output may wait for `merge_within_s`, 0 = it never does."""
        self.frame = decode_worker_pb2.ExchangeResponse()
        self.ready = asyncio.Event()
        self._requests = requests
        self._write_timeout_s = write_timeout_s
        self._merge_within_s = merge_within_s
        self.output = PendingOutput()
        self.merging: asyncio.TimerHandle | None = None
        """When output that waits for more goes; None while none does."""
        self._sinks: dict[int, _StreamSink] = {}
        self._superseded = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        """When the pending frame goes, whatever it has by then."""
        self._is_last = False
        """The next frame is the last one."""

    def produced(self, sink: _StreamSink) -> None:
        """Send the output of a stream now, or begin to let output wait."""
        if sink.is_streaming and self._merge_within_s > 0 and len(self._sinks) >= _MERGE_FROM_REQUESTS:
            share = min(max(len(self._sinks) / _MERGE_IN_FULL_FROM_REQUESTS, _LEAST_MERGE_SHARE), 1.0)
            wait_s = self._merge_within_s * share
            self.merging = asyncio.get_running_loop().call_later(wait_s, self._send_merged)
        else:
            sink.is_streaming = True
            self.output.mark_due(sink.output)
            self.ready.set()

    def send_soon(self) -> None:
        """Send the pending frame within `_BEGUN_WITHIN_S`."""
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(_BEGUN_WITHIN_S, self.ready.set)

    def ended(self, sink: _StreamSink) -> None:
        """Note that a request needs no cancelling any more."""
        self._sinks.pop(sink.stream_id, None)
        self.output.mark_due(sink.output)
        self.ready.set()

    def supersede(self) -> None:
        """End this exchange and its requests now: the same processor has opened another, and may send them there."""
        self._cancel_all()
        self._superseded.set()

    def finish(self) -> None:
        """End this exchange after the frame that is pending."""
        self._is_last = True
        self.ready.set()

    async def run(
        self,
        commands: AsyncIterator[decode_worker_pb2.ExchangeRequest],
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> None:
        """Serve until the processor half-closes, goes away, stalls, or is superseded."""
        telemetry.EXCHANGES_OPEN.inc()
        reader = asyncio.ensure_future(self._read(commands))
        writer = asyncio.ensure_future(self._write(context))
        superseded = asyncio.ensure_future(self._superseded.wait())
        parts: tuple[asyncio.Future[Any], ...] = (reader, writer, superseded)
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            telemetry.EXCHANGES_OPEN.dec()
            self._cancel_all()
            for timer in (self._soon, self.merging):
                if timer is not None:
                    timer.cancel()
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    def _cancel_all(self) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            if sink.key is not None:
                self._requests.cancel(sink.key)

    async def _read(self, commands: AsyncIterator[decode_worker_pb2.ExchangeRequest]) -> None:
        async for command in commands:
            match command.WhichOneof("command"):
                case "submit":
                    self._submit(command.submit)
                case "cancel":
                    sink = self._sinks.pop(command.cancel.stream_id, None)
                    if sink is not None and sink.key is not None:
                        self._requests.cancel(sink.key)
                case _:
                    raise invalid("command", "submit or cancel, after one open")

    def _submit(self, submit: decode_worker_pb2.ExchangeSubmit) -> None:
        if submit.stream_id in self._sinks:
            raise invalid("submit.stream_id", f"{submit.stream_id} is in use on this exchange")
        sink = _StreamSink(self, submit.stream_id)
        self._sinks[submit.stream_id] = sink
        sink.key = self._requests.submit(submit.request, sink)

    async def _write(self, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
        while True:
            await self.ready.wait()
            self.ready.clear()
            is_last = self._is_last
            frame = self._take_frame()
            if not is_last or frame.ListFields():
                await self._send(frame, context)
            if is_last:
                return

    async def _send(
        self,
        frame: decode_worker_pb2.ExchangeResponse,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(frame)
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="exchange_write_s").inc()
            log.warning("exchange.stalled", seconds=self._write_timeout_s)
            raise OutOfTimeError(
                Reason.DEADLINE, f"the processor took no frame for {self._write_timeout_s:g} s"
            ) from exc
        telemetry.EXCHANGE_FRAMES.inc()

    def _send_merged(self) -> None:
        self.merging = None
        self.ready.set()

    def _take_frame(self) -> decode_worker_pb2.ExchangeResponse:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        frame, self.frame = self.frame, decode_worker_pb2.ExchangeResponse()
        self.output.move_to(frame, only_due=self.merging is not None and not self._is_last)
        return frame
