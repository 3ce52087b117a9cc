"""Runs requests: template, tokenise, book a worker, stream from it, detokenise.

A request's life:
    checked -> tokenised -> [booked -> submitted -> first output]  once more elsewhere if the worker is lost before it
            -> output ... -> finished
Everything a request holds (its booking, its place on the exchange, its deadline timer) is given back in `_close`.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from functools import partial

import uuid_utils

from kvmesh import telemetry
from kvmesh.core.errors import MeshError, NotKnownError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.ids import RequestId, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.services.exchange_client import WorkerStream
from kvmesh.services.exchange_pool import ExchangePool
from kvmesh.services.logprobs import OutputLogprobs
from kvmesh.services.output_text import OutputText
from kvmesh.services.peers import Peers
from kvmesh.services.progress import ProgressReports
from kvmesh.services.prompts import TEXT, TOKENS, Tokenising, accepted_forms, prepare_prompt
from kvmesh.services.request_totals import RequestTotals
from kvmesh.services.routing_port import Booking, RoutingPort
from kvmesh.services.running_request import Resolved, RunningRequest
from kvmesh.services.served_models import context_tokens, served_models
from kvmesh.tokenizing.tokenizer import Tokenizer
from kvmesh.v1 import frontend_pb2
from kvmesh.wire.generation import Delta, DeltaWriter, Event
from kvmesh.wire.validation import check_generate_request, invalid, resolve_sampling

log = telemetry.logger(__name__)

_MAX_ATTEMPTS = 4
"""Workers that are asked for one request when those before could not be reached or rejected it."""
_MAX_LOST = 1
"""Retries of a request that a worker accepted and lost: a poison request must not kill the fleet."""
_DETOKENIZER_CONTEXT = 8
"""Tokens at the end of the prompt that decide how the first output token is written."""
_FINAL_REASONS = frozenset({Reason.DEADLINE, Reason.PREFILL_FAILED})
"""Another worker would end the same."""


class Processor:
    """The `Generator` that every door calls."""

    def __init__(
        self,
        *,
        router: RoutingPort,
        peers: Peers,
        exchanges: ExchangePool,
        tokenizers: Mapping[str, Tokenizer | None],
        waits: Waits,
    ) -> None:
        """Serve the models named by `tokenizers` (None: its workers read text) and those that live workers serve."""
        self.totals = RequestTotals()
        self.draining = False
        self._is_over = False
        """True once the drain's time is up: no request begins another attempt."""
        self._router = router
        self._peers = peers
        self._exchanges = exchanges
        self._tokenizers = tokenizers
        self._tokenising = Tokenising()
        self._waits = waits
        self._progress = ProgressReports(router.report_progress)
        self._running: set[RunningRequest] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        peers.on_lost(self._lose)

    def start(self) -> None:
        """Begin to report progress."""
        self._progress.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs finish, fail the rest after `timeout_s`."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            telemetry.WAIT_ENDED.labels(wait="drain_s").inc()
        self._is_over = True
        for run in self._running:
            if run.stream is not None:
                run.stream.fail(TryElsewhereError(Reason.DRAINING, "this frontend is shutting down"))

    async def aclose(self) -> None:
        """Stop; requests that still run lose their workers."""
        await self._progress.aclose()
        await self._exchanges.aclose()
        self._tokenising.close()

    def reaches(self, record: WorkerRecord) -> bool:
        """Tell whether a request could be sent to a worker now, as far as is known."""
        return self._exchanges.reaches(record.address)

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
        """See `Generator.generate`."""
        run = self._admit(request, timeout_s, request_id)
        outcome = "failed"
        try:
            stream = await self._start(run)
            yield run.started()
            while True:
                if run.finished is None and (delta := self._take_output(run, stream)):
                    yield delta
                if run.finished is not None:
                    break
                if stream.error is not None:
                    raise stream.error
                if writer is not None:
                    stream.on_output = partial(self._write_output, run, stream, writer)
                await stream.changed.wait()
                stream.on_output = None
            outcome = "finished"
            self._count_finished(run)
            yield run.finished
        except (asyncio.CancelledError, GeneratorExit):
            if outcome != "finished":
                outcome = "cancelled"
            raise
        finally:
            self._close(run, outcome)

    def _admit(
        self, request: frontend_pb2.GenerateRequest, timeout_s: float | None, request_id: str | None
    ) -> RunningRequest:
        if self.draining:
            raise TryElsewhereError(Reason.DRAINING, "this frontend takes no new requests")
        check_generate_request(request)
        now = asyncio.get_running_loop().time()
        run = RunningRequest(
            request=request,
            request_id=RequestId(request_id or str(uuid_utils.uuid7())),
            arrived_at=now,
            deadline_at=now + (self._waits.request_s if timeout_s is None else timeout_s),
        )
        self.totals.requests += 1
        telemetry.REQUESTS_RUNNING.inc()
        self._running.add(run)
        self._idle.clear()
        return run

    async def _start(self, run: RunningRequest) -> WorkerStream:
        """Bring the request to its first output, on a second worker if need be."""
        try:
            async with asyncio.timeout_at(run.deadline_at):
                await self._prepare(run)
                while True:
                    try:
                        stream = await self._dispatch(run)
                        await self._first_output(run, stream)
                        break
                    except MeshError as error:
                        self._try_elsewhere(run, error)
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="request_s").inc()
            raise OutOfTimeError(Reason.DEADLINE, "no output before the deadline") from exc
        loop = asyncio.get_running_loop()
        run.first_output_at = loop.time()
        self.totals.begin_output(after_s=run.first_output_at - run.arrived_at, now=run.first_output_at)
        run.deadline = loop.call_at(run.deadline_at, self._expire, stream)
        return stream

    def _expire(self, stream: WorkerStream) -> None:
        telemetry.WAIT_ENDED.labels(wait="request_s").inc()
        stream.fail(OutOfTimeError(Reason.DEADLINE, "the request's time is up"))

    async def _prepare(self, run: RunningRequest) -> None:
        """Resolve the model, render and tokenise the prompt, set every default."""
        model = self._resolve_model(run.request.model)
        tokenizer = self._tokenizers.get(model)
        workers = self._peers.roster.of(WorkerRole.DECODE, model)
        accepts = accepted_forms(workers) or frozenset({TEXT if tokenizer is None else TOKENS})
        max_context_tokens = min(map(context_tokens, workers), default=0)
        prompt = await prepare_prompt(
            run.request.prompt,
            tokenizer=tokenizer,
            tokenising=self._tokenising,
            accepts=accepts,
            max_context_tokens=max_context_tokens,
        )
        sampling = resolve_sampling(
            run.request.sampling, prompt_tokens=prompt.prompt_tokens, max_context_tokens=max_context_tokens
        )
        run.resolved = Resolved(model, prompt, sampling)
        detokenizer = None
        if tokenizer is not None and prompt.token_ids is not None:
            detokenizer = tokenizer.detokenizer(after=prompt.token_ids[-_DETOKENIZER_CONTEXT:].tolist())
        run.output = OutputText(detokenizer=detokenizer, stops=run.request.sampling.stop)
        if sampling.HasField("logprobs"):
            run.logprobs = OutputLogprobs(tokenizer)

    def _resolve_model(self, name: str) -> str:
        known = self._peers.roster.models() | self._tokenizers.keys()
        if name in known:
            return name
        if name:
            raise NotKnownError(
                Reason.UNKNOWN_MODEL, f"{name!r} is not served here; models: {', '.join(sorted(known))}", field="model"
            )
        if len(known) > 1:
            raise invalid("model", f"required while several are served: {', '.join(sorted(known))}")
        if not known:
            raise TryElsewhereError(Reason.NO_WORKERS, "no worker serves any model yet")
        return next(iter(known))

    async def _dispatch(self, run: RunningRequest) -> WorkerStream:
        """Book a worker and send it the request."""
        assert run.resolved is not None
        run.attempt += 1
        query = run.query(self._peers.roster.of(WorkerRole.DECODE, run.resolved.model))
        run.booking = await self._router.reserve(
            run.key, query, wait_s=self._waits.route_s, explain=run.request.explain
        )
        run.worker = await self._record(run.booking)
        exchange = await self._exchanges.get(run.worker.address)
        now = asyncio.get_running_loop().time()
        run.stream = exchange.submit(run.decode_request(now=now))
        return run.stream

    async def _record(self, booking: Booking) -> WorkerRecord:
        """Return the record of the booked worker; the router may have heard of it a moment before this process."""
        if (record := self._booked(booking)) is not None:
            return record
        try:
            async with asyncio.timeout(self._waits.connect_s):
                while True:
                    await self._peers.changed()
                    if (record := self._booked(booking)) is not None:
                        return record
        except TimeoutError as exc:
            raise TryElsewhereError(Reason.WORKER_LOST, f"{booking.worker_id} is not in discovery") from exc

    def _booked(self, booking: Booking) -> WorkerRecord | None:
        record = self._peers.roster.get(booking.worker_id)
        return record if record is not None and record.epoch == booking.epoch else None

    async def _first_output(self, run: RunningRequest, stream: WorkerStream) -> None:
        """Wait until something can be handed on; tell the router how the booking goes until then."""
        is_accepted = is_prefill_over = False
        while True:
            await stream.changed.wait()
            if not is_accepted and stream.accepted_sequence is not None:
                is_accepted = True
                self._progress.of(run.key).accepted_load_sequence = stream.accepted_sequence
            # A prefill that goes remote is another worker's load from here on.
            is_remote = stream.decision is not None and stream.decision.remote
            if not is_prefill_over and (is_remote or stream.prompt_usage is not None):
                is_prefill_over = True
                self._progress.of(run.key).prefill_complete = True
            if stream.error is not None:
                raise stream.error
            if stream.has_output or stream.finished is not None:
                return

    def _try_elsewhere(self, run: RunningRequest, error: MeshError) -> None:
        """Give the attempt up and make the next one possible. Raises: `error` if there is to be none."""
        stream, worker = run.stream, run.worker
        if stream is not None and stream.accepted_sequence is not None and not stream.is_rejected:
            run.lost += 1
        if (
            worker is None
            or self._is_over
            or not isinstance(error, TryElsewhereError | OutOfTimeError)
            or error.reason in _FINAL_REASONS
            or run.lost > _MAX_LOST
            or run.attempt >= _MAX_ATTEMPTS
            or not self._has_other_worker(run, worker.worker_id)
        ):
            raise error
        log.warning(
            "request.retried", request_id=run.request_id, attempt=run.attempt, worker_id=worker.worker_id,
            reason=error.reason.value, error=error.message,
        )  # fmt: skip
        telemetry.REQUEST_RETRIES.inc()
        self._give_up_attempt(run)
        run.excluded.append(worker.worker_id)

    def _lose(self, record: WorkerRecord) -> None:
        """Give up what runs on a worker that does not answer any more, before its own waits end."""
        lost = TryElsewhereError(Reason.WORKER_LOST, f"{record.worker_id} does not answer")
        for run in self._running:
            worker = run.worker
            if run.stream is None or worker is None:
                continue
            if (worker.worker_id, worker.epoch) == (record.worker_id, record.epoch):
                run.stream.fail(lost)

    def _has_other_worker(self, run: RunningRequest, failed: WorkerId) -> bool:
        assert run.resolved is not None
        return any(
            record.worker_id != failed and record.worker_id not in run.excluded and not record.draining
            for record in self._peers.roster.of(WorkerRole.DECODE, run.resolved.model)
        )

    def _take_output(self, run: RunningRequest, stream: WorkerStream) -> Delta | None:
        """Return what arrived as text and tokens, cut at a stop string; set `run.finished` at the end."""
        assert run.output is not None
        token_ids, words = stream.take_output()
        filled_blocks = run.add_output(len(token_ids) + len(words))
        if filled_blocks:
            self._progress.of(run.key).output_blocks += filled_blocks
        pieces = run.output.push(token_ids, words, is_last=stream.finished is not None)
        if run.output.is_stopped:
            stream.cancel()
            run.finished = run.stopped()
        else:
            run.finished = stream.finished
        if run.logprobs is None:
            return Delta(pieces=pieces, token_ids=token_ids) if pieces or token_ids else None
        run.logprobs.push(stream.take_logprobs())
        return Delta(pieces, token_ids, run.logprobs.take(len(pieces))) if pieces or token_ids else None

    def _write_output(self, run: RunningRequest, stream: WorkerStream, writer: DeltaWriter) -> None:
        """Hand output to the door where it arrives; wake the request's task only for what it must do itself."""
        try:
            if writer.is_writable and run.finished is None:
                if delta := self._take_output(run, stream):
                    writer.write(delta)
                if run.finished is None:
                    return
        except Exception as error:  # one request's fault must not end the exchange that all share
            log.exception("request.output_failed", request_id=run.request_id)
            stream.fail(MeshError(Reason.INTERNAL, repr(error)))
        stream.changed.fire()

    def _count_finished(self, run: RunningRequest) -> None:
        assert run.finished is not None
        decision = run.stream.decision if run.stream is not None else None
        self.totals.finish(
            run.finished.usage,
            is_remote=decision is not None and decision.remote,
            predicted_cached_tokens=run.predicted_cached_tokens,
        )
        if run.first_output_at is not None:
            now = asyncio.get_running_loop().time()
            self.totals.end_output(output_s=now - run.first_output_at, tokens=run.produced, now=now)

    def _give_up_attempt(self, run: RunningRequest) -> None:
        """Free what the current attempt holds here, at the worker and at the router."""
        usage = run.stream.prompt_usage if run.stream is not None else None
        if run.stream is not None:
            run.stream.cancel()
            run.stream = None
        run.worker = None
        if run.booking is not None:
            self._progress.drop(run.booking.key)
            self._router.release(run.booking, cached_tokens=usage.cached_tokens if usage is not None else None)
            run.booking = None

    def _close(self, run: RunningRequest, outcome: str) -> None:
        if run.deadline is not None:
            run.deadline.cancel()
        log.info("request.ended", outcome=outcome, **run.log_fields())
        self._give_up_attempt(run)
        self._running.discard(run)
        if not self._running:
            self._idle.set()
        telemetry.REQUESTS_RUNNING.dec()
        self.totals.end(outcome)
