"""What became of one replayed request, kept as its stream arrives.

finished                                        a good stream, whole
error      a typed one, or no connection        told, and the client knows what to do
lost       anything else                        neither of the two: the mesh left its client without an answer
"""

from array import array
from dataclasses import dataclass, field

from kvmesh.v1 import frontend_pb2


@dataclass(slots=True)
class Outcome:
    """One request: when it was sent and what came back. Times are seconds of one clock."""

    max_tokens: int
    """Tokens asked for."""
    scheduled_at: float = 0.0
    sent_at: float = 0.0
    """When its bytes were handed to the connection."""
    first_token_at: float | None = None
    last_output_at: float | None = None
    finished_at: float | None = None
    finished_count: int = 0
    tokens: int = 0
    """Output tokens received."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_cached_tokens: int = 0
    error: str | None = None
    """The reason of a typed error."""
    lost: str | None = None
    """How a stream ended that told nothing."""
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    """Per chunk but the first: the time since the one before, divided over its tokens."""
    gap_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    """Tokens of each of those chunks."""

    @property
    def is_duplicated(self) -> bool:
        """Whether it ended twice, or brought more than was asked for."""
        return self.finished_count > 1 or self.tokens > self.max_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it ended well."""
        return self.finished_count > 0 and self.error is None and self.lost is None

    def receive(self, response: frontend_pb2.GenerateResponse, *, now: float) -> None:
        """Take one message of the stream."""
        match response.WhichOneof("event"):
            case "chunk":
                self._receive_tokens(len(response.chunk.token_ids), now)
            case "started":
                self.predicted_cached_tokens = response.started.predicted_cached_tokens
            case "finished":
                usage = response.finished.usage
                self.prompt_tokens, self.cached_tokens = usage.prompt_tokens, usage.cached_tokens
                self.finished_count += 1
                self.finished_at = now

    def end(self) -> None:
        """Take the end of a stream that had no error."""
        if not self.finished_count:
            self.lost = "NOT_FINISHED"

    def _receive_tokens(self, count: int, now: float) -> None:
        if not count:
            return  # text that was held back
        if self.last_output_at is None:
            self.first_token_at = now
        else:
            self.gaps_s.append((now - self.last_output_at) / count)
            self.gap_tokens.append(count)
        self.last_output_at = now
        self.tokens += count
