"""One request that a processor runs, and what it holds."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvmesh.core.candidates import RoutingHints, RoutingQuery
from kvmesh.core.ids import AttemptKey, RequestId, WorkerId
from kvmesh.core.roster import WorkerRecord
from kvmesh.services.exchange_client import WorkerStream
from kvmesh.services.logprobs import OutputLogprobs
from kvmesh.services.output_text import OutputText
from kvmesh.services.prompts import PreparedPrompt, fill_input
from kvmesh.services.router_metrics import observe_stage
from kvmesh.services.routing_port import Booking
from kvmesh.v1 import decode_worker_pb2, frontend_pb2, generation_pb2
from kvmesh.wire.routing import block_hashes_by_size, hints_from_proto
from kvmesh.wire.validation import duration


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """A request with its model, its tokens and every default."""

    model: str
    prompt: PreparedPrompt
    sampling: generation_pb2.SamplingParams


@dataclass(slots=True, eq=False)
class RunningRequest:
    """One request, from its arrival to its end. The processor alone changes it."""

    request: frontend_pb2.GenerateRequest
    request_id: RequestId
    arrived_at: float
    deadline_at: float
    resolved: Resolved | None = None
    """None until the prompt is prepared."""
    output: OutputText | None = None
    logprobs: OutputLogprobs | None = None
    """None where they were not asked for."""
    attempt: int = 0
    lost: int = 0
    """Workers that owned the request and failed it."""
    excluded: list[WorkerId] = field(default_factory=list)
    """Workers that failed an attempt."""
    booking: Booking | None = None
    worker: WorkerRecord | None = None
    stream: WorkerStream | None = None
    deadline: asyncio.TimerHandle | None = None
    first_output_at: float | None = None
    produced: int = 0
    """Tokens or words so far."""
    finished: generation_pb2.Finished | None = None

    @property
    def key(self) -> AttemptKey:
        """What the current attempt's booking is keyed by."""
        return AttemptKey(self.request_id, self.attempt)

    @property
    def predicted_cached_tokens(self) -> int:
        """Prompt tokens that the router expects the worker to hold."""
        if self.booking is None or self.worker is None:
            return 0
        return self.booking.overlap_blocks * self.worker.block_size

    def query(self, workers: Sequence[WorkerRecord]) -> RoutingQuery:
        """Return what the router is asked; `workers` are those that serve the model."""
        assert self.resolved is not None
        prompt, hints = self.resolved.prompt, self.request.routing
        began_at = time.perf_counter()
        block_hashes = block_hashes_by_size(prompt.identity, {record.block_size for record in workers}, hints)
        observe_stage("hash", time.perf_counter() - began_at)
        return RoutingQuery(
            model=self.resolved.model,
            prompt_tokens=prompt.prompt_tokens,
            block_hashes=block_hashes,
            prompt_text=prompt.text,
            lora=hints.lora or None,
            cache_namespace=hints.cache_namespace or None,
            hints=_without(hints_from_proto(hints), self.excluded),
            expected_output_tokens=self.resolved.sampling.max_tokens,
        )

    def decode_request(self, *, now: float) -> decode_worker_pb2.DecodeRequest:
        """Return what the booked worker is sent. Raises: FixRequestError if it reads no form of the prompt."""
        assert self.resolved is not None
        assert self.worker is not None
        assert self.booking is not None
        hints = self.request.routing
        request = decode_worker_pb2.DecodeRequest(
            request_id=self.request_id,
            attempt=self.attempt,
            model=self.resolved.model,
            sampling=self.resolved.sampling,
            timeout=duration(max(self.deadline_at - now, 0.001)),
            router_id=self.booking.router_id,
            reservation_id=self.booking.reservation_id,
            lora=hints.lora,
            cache_namespace=hints.cache_namespace,
            rank=self.booking.rank,
        )
        fill_input(request, self.resolved.prompt, self.worker.accepts)
        if hints.HasField("priority"):
            request.priority = hints.priority
        return request

    def started(self) -> frontend_pb2.Started:
        """Return who serves it."""
        assert self.resolved is not None
        assert self.booking is not None
        started = frontend_pb2.Started(
            request_id=self.request_id,
            client_request_id=self.request.client_request_id,
            model=self.resolved.model,
            worker_id=self.booking.worker_id,
            explanation=self.booking.explanation,
            attempt=self.attempt,
            predicted_cached_tokens=self.predicted_cached_tokens,
        )
        if self.stream is not None and self.stream.decision is not None:
            started.prefill.CopyFrom(self.stream.decision)
        return started

    def log_fields(self) -> dict[str, object]:
        """Return what the log says of it at its end; the counts of one that did not finish are those known so far."""
        usage = self.finished.usage if self.finished is not None else None
        return {
            "request_id": self.request_id,
            "client_request_id": self.request.client_request_id,
            "worker_id": self.worker.worker_id if self.worker is not None else None,
            "attempt": self.attempt,
            "prompt_tokens": self.resolved.prompt.prompt_tokens if self.resolved is not None else None,
            "cached_tokens": usage.cached_tokens if usage is not None else None,
            "completion_tokens": self.produced,
        }

    def add_output(self, count: int) -> int:
        """Count output; return how many blocks it filled."""
        assert self.resolved is not None
        assert self.worker is not None
        before = self.resolved.prompt.prompt_tokens + self.produced
        self.produced += count
        block_size = self.worker.block_size
        return (before + count) // block_size - before // block_size

    def stopped(self) -> generation_pb2.Finished:
        """Return the end that a stop string makes: the worker does not know of it."""
        usage = generation_pb2.Usage()
        if self.stream is not None and self.stream.prompt_usage is not None:
            usage.CopyFrom(self.stream.prompt_usage)
        usage.completion_tokens = self.produced
        return generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_STOP, usage=usage)


def _without(hints: RoutingHints, workers: Sequence[WorkerId]) -> RoutingHints:
    """Return the hints with the workers excluded that failed earlier attempts."""
    return replace(hints, excluded_workers=hints.excluded_workers.union(workers)) if workers else hints
