"""What a running request yields inside a process, between the processor and every door."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmesh.v1 import frontend_pb2, generation_pb2


@dataclass(slots=True)
class Delta:
    """Some output: everything that arrived since the one before."""

    pieces: list[str]
    """The text of each token, in order; "" while the bytes of a character are incomplete."""
    token_ids: list[int]
    """The tokens; empty for workers that produce text."""
    logprobs: Sequence[generation_pb2.TokenLogprobs] = ()
    """Of the tokens whose text `pieces` is, in order, where they were asked for; a last piece may have none."""


Event = frontend_pb2.Started | Delta | generation_pb2.Finished
"""A request's events: Started, then Deltas, then Finished; anything else ends in a raised MeshError."""


class DeltaWriter(Protocol):
    """A door that takes output at once: no task has to be woken for every token."""

    @property
    def is_writable(self) -> bool:
        """Tell whether it takes more now; it does not while its client is behind."""

    def write(self, delta: Delta) -> None:
        """Send it to the client; called on the event loop, only while it is writable."""


class Generator(Protocol):
    """What the doors (gRPC, REST, OpenAI) call."""

    def generate(
        self,
        request: frontend_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        writer: DeltaWriter | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Run a request; closing the generator frees what it held everywhere.

        `timeout_s` is the client's deadline (None = the setting for clients that set none); `request_id` is minted when
        None. With a `writer` the Deltas after the first may go to it, in their order, instead of being yielded; the
        other events are always yielded. Raises: MeshError, before the first event or between any two.
        """

    def models(self) -> frontend_pb2.ListModelsResponse:
        """List the models of the live decode workers, sorted by name."""
