"""The processor's end of Exchange: one stream to a worker, many requests on it.

Laws:
    - a request's events reach its `WorkerStream` in order and stop at its end: finished, or an error;
    - when the exchange breaks, every request on it fails with WORKER_LOST; nothing resumes, the next submit opens anew;
    - a receiver that does not take what arrives is bounded: beyond MAX_BUFFERED_TOKENS its request is cancelled.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from kvmesh import telemetry
from kvmesh.core.errors import BackOffError, MeshError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.waits import Waits
from kvmesh.services.duplex_call import DuplexCall
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.signal import Flag
from kvmesh.v1 import decode_worker_pb2, generation_pb2
from kvmesh.wire.error_catalog import from_status

log = telemetry.logger(__name__)

MAX_BUFFERED_TOKENS = 1024
_SWEEPS_PER_WAIT = 8
_LONGEST_SWEEP_S = 1.0


class WorkerStream:
    """One request on an exchange. Wait for `changed`, then read what is new; one task does."""

    __slots__ = (
        "_exchange",
        "_heard_at",
        "accepted_sequence",
        "changed",
        "decision",
        "error",
        "finished",
        "has_output",
        "is_rejected",
        "logprobs",
        "on_output",
        "prompt_usage",
        "stream_id",
        "token_ids",
        "words",
    )

    def __init__(self, exchange: "ExchangeClient", stream_id: int, *, now: float) -> None:
        self.stream_id = stream_id
        self.changed = Flag()
        self.accepted_sequence: int | None = None
        """The worker's load sequence when it took the request; None before."""
        self.decision: generation_pb2.PrefillDecision | None = None
        """The latest word on where the prefill runs."""
        self.prompt_usage: generation_pb2.Usage | None = None
        """Set once the prompt is computed."""
        self.token_ids: list[int] = []
        """Output that nobody has taken yet; `words` for workers that produce text."""
        self.words: list[str] = []
        self.logprobs: list[generation_pb2.TokenLogprobs] = []
        """One for each of `token_ids`, where they were asked for."""
        self.has_output = False
        """True from the first output on."""
        self.finished: generation_pb2.Finished | None = None
        self.error: MeshError | None = None
        self.is_rejected = False
        """With `error`: the worker never owned the request."""
        self.on_output: Callable[[], None] | None = None
        """Called, instead of raising `changed`, for output that is not the last."""
        self._exchange = exchange
        self._heard_at = now

    @property
    def is_over(self) -> bool:
        """Tell whether nothing more will arrive."""
        return self.finished is not None or self.error is not None

    def take_output(self) -> tuple[list[int], list[str]]:
        """Return the tokens and the words that arrived since the last call."""
        taken = self.token_ids, self.words
        self.token_ids, self.words = [], []
        return taken

    def take_logprobs(self) -> list[generation_pb2.TokenLogprobs]:
        """Return what came with the tokens that arrived since the last call."""
        taken, self.logprobs = self.logprobs, []
        return taken

    def cancel(self) -> None:
        """Say that nobody wants the rest: the worker frees what the request holds. Idempotent."""
        self._exchange.cancel(self.stream_id)

    def fail(self, error: MeshError) -> None:
        """End the request from this side: the receiver sees `error`, the worker is told. Idempotent."""
        if not self.is_over:
            self.error = error
            self.changed.fire()
            self.cancel()

    def heard(self, now: float) -> None:
        """Note output, and bound what is not taken."""
        self.has_output = True
        self._heard_at = now
        if self.on_output is None or self.finished is not None:
            self.changed.fire()
        else:
            self.on_output()
        if (self.token_ids or self.words) and len(self.token_ids) + len(self.words) > MAX_BUFFERED_TOKENS:
            self.fail(BackOffError(Reason.SLOW_CONSUMER, f"{MAX_BUFFERED_TOKENS} tokens wait for the client"))

    def expire(self, waits: Waits, now: float) -> None:
        """Fail the request if its worker has been silent for too long."""
        wait, bound_s = (
            ("token_gap_s", waits.token_gap_s) if self.has_output else ("first_token_s", waits.first_token_s)
        )
        if now - self._heard_at > bound_s and not self.is_over:
            telemetry.WAIT_ENDED.labels(wait=wait).inc()
            self.fail(OutOfTimeError(Reason.WORKER_LOST, f"nothing from the worker for {bound_s:g} s ({wait})"))


class ExchangeClient:
    """One open exchange. Owned by its pool."""

    def __init__(
        self,
        call: Any,  # grpc.aio.StreamStreamCall: its class is generic in the stubs only
        *,
        opening: decode_worker_pb2.ExchangeOpen,
        waits: Waits,
        on_end: Callable[["ExchangeClient"], None],
    ) -> None:
        """Speak on `call`, `opening` first; `on_end` is told once, when the exchange is of no more use."""
        self._waits = waits
        self._on_end = on_end
        self._streams: dict[int, WorkerStream] = {}
        self._last_id = 0
        self._commands = [decode_worker_pb2.ExchangeRequest(open=opening)]
        self._sweeping = OwnedTasks()
        self._sweeping.start(self._sweep(), name="exchange-sweep")
        self._stream = DuplexCall(
            call,
            peer="worker",
            write_timeout_s=waits.exchange_write_s,
            to_send=self._to_send,
            receive=self._apply,
            on_end=self._ended,
        )
        self._stream.wake()

    def submit(self, request: decode_worker_pb2.DecodeRequest) -> WorkerStream:
        """Send a request. Raises: TryElsewhereError(WORKER_LOST) when the exchange has ended."""
        if self._stream.is_over:
            raise TryElsewhereError(Reason.WORKER_LOST, "the exchange with this worker has ended")
        self._last_id += 1
        stream = WorkerStream(self, self._last_id, now=asyncio.get_running_loop().time())
        self._streams[stream.stream_id] = stream
        submit = decode_worker_pb2.ExchangeSubmit(stream_id=stream.stream_id, request=request)
        self._post(decode_worker_pb2.ExchangeRequest(submit=submit))
        return stream

    def cancel(self, stream_id: int) -> None:
        """Drop a request. Idempotent; nothing is sent for one that has ended."""
        if self._streams.pop(stream_id, None) is not None and not self._stream.is_over:
            cancel = decode_worker_pb2.ExchangeCancel(stream_id=stream_id)
            self._post(decode_worker_pb2.ExchangeRequest(cancel=cancel))

    async def aclose(self) -> None:
        """End the exchange: the worker cancels what still runs on it."""
        await self._stream.aclose("the processor is closing")
        await self._sweeping.aclose()

    def _post(self, command: decode_worker_pb2.ExchangeRequest) -> None:
        self._commands.append(command)
        self._stream.wake()

    def _to_send(self) -> list[decode_worker_pb2.ExchangeRequest]:
        commands, self._commands = self._commands, []
        return commands

    def _apply(self, frame: decode_worker_pb2.ExchangeResponse) -> None:
        self._apply_beginnings(frame)
        streams = self._streams
        for finished in frame.finished:  # before the output, which is then known to be the last
            if (stream := streams.get(finished.stream_id)) is not None:
                stream.finished = finished.finished
        for likely in frame.logprobs:  # likewise
            if (stream := streams.get(likely.stream_id)) is not None:
                stream.logprobs += likely.tokens
        if frame.stream_ids:
            self._apply_output(frame, asyncio.get_running_loop().time())
        for finished in frame.finished:
            if (stream := streams.pop(finished.stream_id, None)) is not None:
                stream.changed.fire()
        for failed in frame.failed:
            if (stream := streams.pop(failed.stream_id, None)) is not None:
                stream.error = from_status(failed.status)
                stream.is_rejected = failed.rejected
                stream.changed.fire()

    def _apply_beginnings(self, frame: decode_worker_pb2.ExchangeResponse) -> None:
        for accepted in frame.accepted:
            if (stream := self._streams.get(accepted.stream_id)) is not None:
                stream.accepted_sequence = accepted.load_sequence
                stream.changed.fire()
        for prefill in frame.prefills:
            if (stream := self._streams.get(prefill.stream_id)) is not None:
                if prefill.HasField("decision"):
                    stream.decision = prefill.decision
                else:
                    stream.prompt_usage = prefill.usage
                stream.changed.fire()

    def _apply_output(self, frame: decode_worker_pb2.ExchangeResponse, now: float) -> None:
        """Hand the columns out: requests with tokens come first, then those with words."""
        token_ids, words = list(frame.token_ids), list(frame.words)
        token_at = word_at = 0
        for stream_id, count in zip(frame.stream_ids, frame.counts, strict=True):
            stream = self._streams.get(stream_id)
            if token_at < len(token_ids):
                if stream is not None:
                    stream.token_ids += token_ids[token_at : token_at + count]
                token_at += count
            else:
                if stream is not None:
                    stream.words += words[word_at : word_at + count]
                word_at += count
            if stream is not None:
                stream.heard(now)

    async def _sweep(self) -> None:
        shortest_s = min(self._waits.first_token_s, self._waits.token_gap_s)
        while True:
            await asyncio.sleep(min(shortest_s / _SWEEPS_PER_WAIT, _LONGEST_SWEEP_S))
            now = asyncio.get_running_loop().time()
            for stream in list(self._streams.values()):
                stream.expire(self._waits, now)

    def _ended(self, why: str) -> None:
        self._on_end(self)
        self._sweeping.cancel()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(TryElsewhereError(Reason.WORKER_LOST, why))
        if streams:
            log.warning("exchange.lost", requests=len(streams), error=why)
