"""Runs requests: template, tokenise, book a worker, stream from it, detokenise.

A request's life:
    checked -> tokenised -> [booked -> submitted -> first output]  once more elsewhere if the worker is lost before it
            -> output ... -> finished
Everything a request holds (its booking, its place on the exchange, its deadline timer) is given back in `_close`.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import uuid_utils

from kvmesh import telemetry
from kvmesh.core.candidates import RoutingHints, RoutingQuery, Selection
from kvmesh.core.errors import (
    MeshError,
    NotKnownError,
    OutOfTimeError,
    Reason,
    TryElsewhereError,
)
from kvmesh.core.ids import AttemptKey, RequestId, RouterId, WorkerId
from kvmesh.core.reservations import Reservation
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.services.exchange_client import ExchangePool, WorkerStream
from kvmesh.services.peers import Peers
from kvmesh.services.progress import PendingProgress, ProgressReports
from kvmesh.services.prompts import PreparedPrompt, accepted_forms, fill_input, prepare_prompt
from kvmesh.services.request_totals import RequestTotals
from kvmesh.tokenizing.stop_matcher import StopMatcher
from kvmesh.tokenizing.tokenizer import Detokenizer, Tokenizer
from kvmesh.v1 import decode_worker_pb2, frontend_pb2, generation_pb2
from kvmesh.wire.generation import Delta, Event
from kvmesh.wire.routing import Progress, block_hashes_by_size, hints_from_proto
from kvmesh.wire.routing_answers import explanation_to_proto
from kvmesh.wire.validation import check_generate_request, duration, invalid, resolve_sampling

log = telemetry.logger(__name__)

_MAX_ATTEMPTS = 4
"""Workers that are asked for one request when those before could not be reached or rejected it."""
_DETOKENIZER_CONTEXT = 8
"""Tokens at the end of the prompt that decide how the first output token is written."""
_MAX_LOST = 1
"""Retries of a request that a worker accepted and lost: a poison request must not kill the fleet."""


class RoutingPort(Protocol):
    """The router, in this process or behind its service."""

    @property
    def router_id(self) -> RouterId:
        """The name under which workers report this router's load."""

    async def reserve(self, key: AttemptKey, query: RoutingQuery, *, wait_s: float) -> Reservation:
        """Choose a worker and book it, waiting up to `wait_s` for one to be eligible."""

    def explain_booked(self, reservation: Reservation) -> Selection:
        """Return the selection behind a reservation, with every candidate."""

    def report_progress(self, progress: Sequence[Progress]) -> object:
        """Say how bookings go on."""

    def release(self, key: AttemptKey) -> bool:
        """End a booking; False if it had ended. Raises: NotKnownError if it was never seen."""


@dataclass(slots=True, eq=False)
class _Run:
    """One running request and what it holds."""

    request: frontend_pb2.GenerateRequest
    request_id: RequestId
    arrived_at: float
    deadline_at: float
    model: str = ""
    prompt: PreparedPrompt | None = None
    sampling: generation_pb2.SamplingParams | None = None
    detokenizer: Detokenizer | None = None
    stops: StopMatcher | None = None
    attempt: int = 0
    lost: int = 0
    excluded: list[WorkerId] = field(default_factory=list)
    booking: Reservation | None = None
    worker: WorkerRecord | None = None
    stream: WorkerStream | None = None
    deadline: asyncio.TimerHandle | None = None
    produced: int = 0
    finished: generation_pb2.Finished | None = None

    @property
    def predicted_cached_tokens(self) -> int:
        """Prompt tokens that the router expects the worker to hold."""
        if self.booking is None or self.worker is None:
            return 0
        return self.booking.overlap_blocks * self.worker.block_size


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
        self._router = router
        self._peers = peers
        self._exchanges = exchanges
        self._tokenizers = tokenizers
        self._waits = waits
        self._progress = ProgressReports(router.report_progress)
        self._idle = asyncio.Event()
        self._idle.set()
        self._running: set[_Run] = set()

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
        for run in self._running:
            if run.stream is not None:
                run.stream.fail(TryElsewhereError(Reason.DRAINING, "this frontend is shutting down"))

    async def aclose(self) -> None:
        """Stop; requests that still run lose their workers."""
        await self._progress.aclose()
        await self._exchanges.aclose()

    def models(self) -> frontend_pb2.ListModelsResponse:
        """List the models of the live decode workers, sorted by name."""
        found: dict[str, frontend_pb2.Model] = {}
        for record in self._peers.roster.records(WorkerRole.DECODE):
            context = int(record.metadata.get("max_context_tokens", 0))
            for name in record.models:
                model = found.setdefault(name, frontend_pb2.Model(name=name, max_context_tokens=context))
                model.workers += 1
                model.max_context_tokens = min(model.max_context_tokens, context)
        return frontend_pb2.ListModelsResponse(models=[found[name] for name in sorted(found)])

    async def generate(
        self, request: frontend_pb2.GenerateRequest, *, timeout_s: float | None = None, request_id: str | None = None
    ) -> AsyncGenerator[Event, None]:
        """See `Generator.generate`."""
        run = self._admit(request, timeout_s, request_id)
        outcome = "failed"
        try:
            stream = await self._start(run)
            yield self._started(run)
            while True:
                if delta := self._take_output(run, stream):
                    yield delta
                if run.finished is not None:
                    break
                if stream.error is not None:
                    raise stream.error
                await stream.changed.wait()
                stream.changed.clear()
            outcome = "finished"
            self._count_finished(run)
            yield run.finished
        except (asyncio.CancelledError, GeneratorExit):
            if outcome != "finished":
                outcome = "cancelled"
            raise
        finally:
            self._close(run, outcome)

    def _admit(self, request: frontend_pb2.GenerateRequest, timeout_s: float | None, request_id: str | None) -> _Run:
        if self.draining:
            raise TryElsewhereError(Reason.DRAINING, "this frontend takes no new requests")
        check_generate_request(request)
        now = asyncio.get_running_loop().time()
        longest_s = self._waits.request_s if timeout_s is None else timeout_s
        run = _Run(
            request=request,
            request_id=RequestId(request_id or str(uuid_utils.uuid7())),
            arrived_at=now,
            deadline_at=now + longest_s,
        )
        self.totals.requests += 1
        telemetry.REQUESTS_RUNNING.inc()
        self._running.add(run)
        self._idle.clear()
        return run

    async def _start(self, run: _Run) -> WorkerStream:
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
        telemetry.TIME_TO_FIRST_TOKEN.observe(loop.time() - run.arrived_at)
        run.deadline = loop.call_at(
            run.deadline_at, stream.fail, OutOfTimeError(Reason.DEADLINE, "the request's time is up")
        )
        return stream

    async def _prepare(self, run: _Run) -> None:
        request = run.request
        run.model = self._resolve_model(request.model)
        tokenizer = self._tokenizers.get(run.model)
        workers = self._peers.roster.of(WorkerRole.DECODE, run.model)
        accepts = accepted_forms(workers) or frozenset({"tokens" if tokenizer is not None else "text"})
        run.prompt = await prepare_prompt(request.prompt, tokenizer=tokenizer, accepts=accepts)
        contexts = [int(record.metadata.get("max_context_tokens", 0)) for record in workers]
        run.sampling = resolve_sampling(
            request.sampling,
            prompt_tokens=run.prompt.prompt_tokens,
            max_context_tokens=min(contexts, default=0),
        )
        if tokenizer is not None and run.prompt.token_ids is not None:
            run.detokenizer = tokenizer.detokenizer(after=run.prompt.token_ids[-_DETOKENIZER_CONTEXT:].tolist())
        run.stops = StopMatcher(request.sampling.stop) if request.sampling.stop else None

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

    async def _dispatch(self, run: _Run) -> WorkerStream:
        """Book a worker and send it the request."""
        assert run.prompt is not None
        run.attempt += 1
        key = AttemptKey(run.request_id, run.attempt)
        run.booking = await self._router.reserve(key, self._query(run), wait_s=self._waits.route_s)
        run.worker = await self._record(run.booking)
        exchange = await self._exchanges.get(run.worker.address)
        run.stream = exchange.submit(self._decode_request(run, run.booking, run.worker))
        return run.stream

    def _query(self, run: _Run) -> RoutingQuery:
        assert run.prompt is not None
        hints = run.request.routing
        workers = self._peers.roster.of(WorkerRole.DECODE, run.model)
        return RoutingQuery(
            model=run.model,
            prompt_tokens=run.prompt.prompt_tokens,
            block_hashes=block_hashes_by_size(run.prompt.identity, {record.block_size for record in workers}, hints),
            prompt_text=run.prompt.text,
            lora=hints.lora or None,
            cache_namespace=hints.cache_namespace or None,
            hints=_without(hints_from_proto(hints), run.excluded),
            expected_output_tokens=run.sampling.max_tokens if run.sampling is not None else None,
        )

    async def _record(self, booking: Reservation) -> WorkerRecord:
        """Return the record of the booked worker; the router may have heard of it a moment before this process."""
        try:
            async with asyncio.timeout(self._waits.connect_s):
                while True:
                    record = self._peers.roster.get(booking.worker.worker_id)
                    if record is not None and record.epoch == booking.epoch:
                        return record
                    await self._peers.changed()
        except TimeoutError as exc:
            raise TryElsewhereError(Reason.WORKER_LOST, f"{booking.worker.worker_id} is not in discovery") from exc

    def _decode_request(self, run: _Run, booking: Reservation, worker: WorkerRecord) -> decode_worker_pb2.DecodeRequest:
        assert run.prompt is not None
        hints = run.request.routing
        remaining_s = max(run.deadline_at - asyncio.get_running_loop().time(), 0.001)
        request = decode_worker_pb2.DecodeRequest(
            request_id=run.request_id,
            attempt=run.attempt,
            model=run.model,
            sampling=run.sampling,
            timeout=duration(remaining_s),
            router_id=self._router.router_id,
            reservation_id=booking.reservation_id,
            lora=hints.lora,
            cache_namespace=hints.cache_namespace,
            **fill_input(run.prompt, worker.accepts),  # type: ignore[arg-type]  # one of text and token_ids, by name
        )
        if hints.HasField("priority"):
            request.priority = hints.priority
        return request

    async def _first_output(self, run: _Run, stream: WorkerStream) -> None:
        """Wait until something can be handed on; tell the router how the booking goes until then."""
        accepted = remote = computed = False
        while True:
            await stream.changed.wait()
            stream.changed.clear()
            if not accepted and stream.accepted_sequence is not None:
                accepted = True
                self._progress_of(run).accepted_load_sequence = stream.accepted_sequence
            if not remote and stream.decision is not None and stream.decision.remote:
                remote = True  # that prefill is another worker's load from here on
                self._progress_of(run).prefill_complete = True
            if not computed and stream.prompt_usage is not None:
                computed = True
                self._progress_of(run).prefill_complete = True
            if stream.error is not None:
                raise stream.error
            if stream.has_output or stream.finished is not None:
                return

    def _try_elsewhere(self, run: _Run, error: MeshError) -> None:
        """Give the attempt up and make the next one possible. Raises: `error` if there is to be none."""
        stream, worker = run.stream, run.worker
        if worker is None or not isinstance(error, TryElsewhereError | OutOfTimeError) or run.attempt >= _MAX_ATTEMPTS:
            raise error
        was_owned = stream is not None and stream.accepted_sequence is not None and not stream.is_rejected
        if was_owned:
            run.lost += 1
        if run.lost > _MAX_LOST or error.reason in (Reason.DEADLINE, Reason.PREFILL_FAILED):
            raise error
        if not self._has_other_worker(run, worker.worker_id):
            raise error
        log.warning(
            "request.retried", request_id=run.request_id, attempt=run.attempt, worker_id=worker.worker_id,
            reason=error.reason.value, error=error.message,
        )  # fmt: skip
        telemetry.REQUEST_RETRIES.inc()
        self._give_up_attempt(run)
        run.excluded.append(worker.worker_id)

    def _has_other_worker(self, run: _Run, failed: WorkerId) -> bool:
        return any(
            record.worker_id != failed and record.worker_id not in run.excluded and not record.draining
            for record in self._peers.roster.of(WorkerRole.DECODE, run.model)
        )

    def _started(self, run: _Run) -> frontend_pb2.Started:
        assert run.booking is not None
        started = frontend_pb2.Started(
            request_id=run.request_id,
            client_request_id=run.request.client_request_id,
            model=run.model,
            worker_id=run.booking.worker.worker_id,
            attempt=run.attempt,
            predicted_cached_tokens=run.predicted_cached_tokens,
        )
        if run.stream is not None and run.stream.decision is not None:
            started.prefill.CopyFrom(run.stream.decision)
        if run.request.explain:
            started.explanation.CopyFrom(explanation_to_proto(self._router.explain_booked(run.booking)))
        return started

    def _take_output(self, run: _Run, stream: WorkerStream) -> Delta | None:
        """Return what arrived as text and tokens, cut at a stop string; set `run.finished` at the end."""
        token_ids = stream.take_token_ids()
        if token_ids:
            pieces = run.detokenizer.push(token_ids) if run.detokenizer is not None else [""] * len(token_ids)
        else:
            pieces = stream.take_words()
        is_last = stream.is_over and stream.error is None
        if is_last and run.detokenizer is not None and (rest := run.detokenizer.flush()):
            pieces = [*pieces, rest]
        self._count_output(run, len(token_ids) or len(pieces))
        if run.stops is not None:
            pieces, is_stopped = run.stops.push(pieces)
            if is_stopped:
                stream.cancel()
                run.finished = self._stopped(run, stream)
            elif is_last:
                pieces = [*pieces, *run.stops.flush()]
        if is_last and run.finished is None:
            run.finished = stream.finished
        return Delta(pieces=pieces, token_ids=token_ids) if pieces or token_ids else None

    def _count_output(self, run: _Run, count: int) -> None:
        assert run.prompt is not None
        assert run.worker is not None
        block_size = run.worker.block_size
        before = (run.prompt.prompt_tokens + run.produced) // block_size
        run.produced += count
        blocks = (run.prompt.prompt_tokens + run.produced) // block_size - before
        if blocks:
            self._progress_of(run).output_blocks += blocks

    def _stopped(self, run: _Run, stream: WorkerStream) -> generation_pb2.Finished:
        """Return the end that a stop string makes: the worker does not know of it."""
        usage = generation_pb2.Usage()
        if stream.prompt_usage is not None:
            usage.CopyFrom(stream.prompt_usage)
        usage.completion_tokens = run.produced
        return generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_STOP, usage=usage)

    def _progress_of(self, run: _Run) -> PendingProgress:
        return self._progress.of(AttemptKey(run.request_id, run.attempt))

    def _count_finished(self, run: _Run) -> None:
        assert run.finished is not None
        decision = run.stream.decision if run.stream is not None else None
        self.totals.finish(
            run.finished.usage,
            is_remote=decision is not None and decision.remote,
            predicted_cached_tokens=run.predicted_cached_tokens,
        )

    def _give_up_attempt(self, run: _Run) -> None:
        """Free what the current attempt holds here, at the worker and at the router."""
        if run.stream is not None:
            run.stream.cancel()
            run.stream = None
        run.worker = None
        if run.booking is not None:
            self._progress.drop(run.booking.key)
            with suppress(NotKnownError):  # it expired, or ended with its worker
                self._router.release(run.booking.key)
            run.booking = None

    def _close(self, run: _Run, outcome: str) -> None:
        if run.deadline is not None:
            run.deadline.cancel()
        self._give_up_attempt(run)
        self._running.discard(run)
        if not self._running:
            self._idle.set()
        telemetry.REQUESTS_RUNNING.dec()
        self.totals.end(outcome)


def _without(hints: RoutingHints, workers: Sequence[WorkerId]) -> RoutingHints:
    """Return the hints with the workers excluded that failed earlier attempts."""
    return replace(hints, excluded_workers=hints.excluded_workers.union(workers)) if workers else hints
