"""One request that a decode worker owns: where it stands, what it has used, and who hears of it."""

import asyncio
from dataclasses import replace
from typing import Protocol

from kvmesh.core.errors import MeshError, Reason
from kvmesh.engines.engine import EngineRequest, FinishReason, Output
from kvmesh.services.logprobs import logprobs_to_proto
from kvmesh.services.remote_prefill import Prepared
from kvmesh.v1 import decode_worker_pb2, generation_pb2

_FINISH = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


class Sink(Protocol):
    """Where a request's events go; called on the event loop, in order, and never after its end."""

    def accepted(self, load_sequence: int) -> None:
        """The worker owns the request."""

    def prefill(self, decision: generation_pb2.PrefillDecision) -> None:
        """Where the prefill runs."""

    def computed(self, usage: generation_pb2.Usage) -> None:
        """The prompt's last token is computed; `usage` has the prompt's part."""

    def likely(self, logprobs: list[generation_pb2.TokenLogprobs]) -> None:
        """How likely the tokens of the output that comes next were; only where that was asked for."""

    def produced(self, token_ids: tuple[int, ...], words: tuple[str, ...]) -> None:
        """Some output."""

    def finished(self, finished: generation_pb2.Finished) -> None:
        """A good end."""

    def failed(self, error: MeshError, *, rejected: bool) -> None:
        """A bad end; `rejected`: the worker never owned it."""


class Owner(Protocol):
    """Who ends a request and gives back what it holds."""

    def prompt_computed(self, running: "OwnedRequest") -> None:
        """Its prompt's last token is computed."""

    def finish(self, running: "OwnedRequest", reason: generation_pb2.FinishReason.ValueType) -> None:
        """It ended well."""

    def fail(self, running: "OwnedRequest", error: MeshError) -> None:
        """It ended badly."""


class OwnedRequest:
    """One owned request; the engine driver's listener for it."""

    __slots__ = (
        "deadline",
        "deadline_at",
        "engine_request",
        "generated",
        "owner",
        "prefill_tokens",
        "prepared",
        "prompt_tokens",
        "request",
        "reservation_id",
        "router_id",
        "sink",
        "task",
        "usage",
    )

    def __init__(
        self,
        owner: Owner,
        request: decode_worker_pb2.DecodeRequest,
        engine_request: EngineRequest,
        prompt_tokens: int,
        sink: Sink,
    ) -> None:
        """Report what comes to `sink`, and every end to `owner`."""
        self.owner = owner
        self.request = request
        self.router_id = request.router_id
        """Kept here too, like `reservation_id`: every report of the load asks every request for them."""
        self.reservation_id = request.reservation_id
        self.engine_request = engine_request
        self.sink = sink
        self.prompt_tokens = prompt_tokens
        self.prefill_tokens = prompt_tokens
        """Still to be computed here."""
        self.generated = 0
        self.usage = generation_pb2.Usage(prompt_tokens=prompt_tokens)
        self.prepared: Prepared | None = None
        self.task: asyncio.Task[None] | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.deadline_at = 0.0

    def use(self, prepared: Prepared) -> None:
        """Take what a remote prefill has prepared: it is the request's to give back."""
        self.prepared = prepared
        self.usage.remote_prefill_tokens = prepared.remote_tokens
        self.usage.kv_bytes_moved = prepared.bytes_moved
        if prepared.pin_id is not None:
            self.prefill_tokens = self.prompt_tokens - prepared.cached_tokens - prepared.remote_tokens
            self.engine_request = replace(self.engine_request, imported_tokens=prepared.remote_tokens)
        if prepared.handoff is not None:
            self.prefill_tokens = 0
            self.engine_request = replace(self.engine_request, handoff=prepared.handoff)

    def output(self, output: Output) -> None:
        """Hear from the engine."""
        if output.error is not None:
            self.owner.fail(self, output.failure or MeshError(Reason.INTERNAL, output.error))
            return
        if output.prefill_done:
            self.prefill_tokens = 0
            self.usage.prompt_tokens = output.prompt_tokens
            self.usage.cached_tokens = output.cached_tokens
            self.owner.prompt_computed(self)
        count = len(output.token_ids) or len(output.words)
        if count:
            self.generated += count
            if output.logprobs:
                self.sink.likely(logprobs_to_proto(output.token_ids, output.logprobs))
            self.sink.produced(output.token_ids, output.words)
        if output.finish is not None:
            self.usage.completion_tokens = output.completion_tokens or self.generated
            if output.prompt_tokens:
                self.usage.prompt_tokens = output.prompt_tokens
                self.usage.cached_tokens = output.cached_tokens
            self.owner.finish(self, _FINISH[output.finish])

    def failed(self, error: MeshError) -> None:
        """Hear that the engine refused or lost it."""
        self.owner.fail(self, error)
