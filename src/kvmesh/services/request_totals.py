"""Totals over the requests of one processor, for the topology and the metrics."""

from dataclasses import dataclass, field

from kvmesh import telemetry
from kvmesh.core.latencies import RecentTimes
from kvmesh.v1 import frontend_pb2, generation_pb2, processor_pb2


@dataclass(slots=True)
class RequestTotals:
    """Counts since the start; token counts are those of finished requests."""

    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    finished: int = 0
    remote_prefills: int = 0
    local_prefills: int = 0
    kv_bytes_moved: int = 0
    cached_tokens: int = 0
    predicted_cached_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    times_to_first_token: RecentTimes = field(default_factory=RecentTimes)
    inter_token_times: RecentTimes = field(default_factory=RecentTimes)

    def begin_output(self, *, after_s: float, now: float) -> None:
        """Note that a request has its first token, so long after its arrival."""
        self.times_to_first_token.add(after_s, now=now)
        telemetry.TIME_TO_FIRST_TOKEN.observe(after_s)

    def finish(self, usage: generation_pb2.Usage, *, is_remote: bool, predicted_cached_tokens: int) -> None:
        """Add what a finished request consumed."""
        if is_remote:
            self.remote_prefills += 1
        else:
            self.local_prefills += 1
        self.kv_bytes_moved += usage.kv_bytes_moved
        self.cached_tokens += usage.cached_tokens
        self.predicted_cached_tokens += predicted_cached_tokens
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        telemetry.CACHED_TOKENS.inc(usage.cached_tokens)
        telemetry.PREDICTED_CACHED_TOKENS.inc(predicted_cached_tokens)
        telemetry.PROMPT_TOKENS.inc(usage.prompt_tokens)
        telemetry.COMPLETION_TOKENS.inc(usage.completion_tokens)

    def end_output(self, *, output_s: float, tokens: int, now: float) -> None:
        """Note how long the tokens of a finished request took from the first to the last."""
        if tokens > 1:
            self.inter_token_times.add(output_s / (tokens - 1), now=now)
            telemetry.INTER_TOKEN_TIME.observe(output_s / (tokens - 1))

    def end(self, outcome: str) -> None:
        """Count how a request ended: finished, failed or cancelled."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        telemetry.REQUESTS.labels(outcome=outcome).inc()

    def latencies(self, *, now: float) -> processor_pb2.LatencySamples:
        """Return what requests waited for tokens lately."""
        return processor_pb2.LatencySamples(
            times_to_first_token_s=self.times_to_first_token.at(now),
            inter_token_times_s=self.inter_token_times.at(now),
        )

    def to_proto(self) -> frontend_pb2.TopologyCounters:
        """Return the counters as the topology shows them; bookings are the router's to count."""
        return frontend_pb2.TopologyCounters(
            requests=self.requests,
            remote_prefills=self.remote_prefills,
            local_prefills=self.local_prefills,
            kv_bytes_moved=self.kv_bytes_moved,
            cached_tokens=self.cached_tokens,
            predicted_cached_tokens=self.predicted_cached_tokens,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            failed=self.failed,
            cancelled=self.cancelled,
            running=self.requests - self.finished - self.failed - self.cancelled,
        )
