"""Every metric of the mesh, and how log lines are written. A leaf: it imports nothing of ours, core never imports it.

Log events are constants `noun.verb`, data goes as keys; never prompt text, never a secret. Metric labels are of low
cardinality: no request ids, no worker ids.
"""

import logging
import sys
from typing import Any, TextIO

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, generate_latest

__all__ = ["CONTENT_TYPE_LATEST", "configure_logging", "exposition", "logger"]

_TRACEBACKS = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

RPC_STARTED = Counter("kvmesh_rpc_started", "Calls that reached a handler.", ("service", "method"))
RPC_FINISHED = Counter("kvmesh_rpc_finished", "Calls that ended, by gRPC code.", ("service", "method", "code"))
RPC_DURATION = Histogram(
    "kvmesh_rpc_duration_seconds", "Time a handler ran.", ("service", "method"), buckets=_LATENCY_BUCKETS
)
HTTP_REQUESTS = Counter("kvmesh_http_requests", "HTTP requests that ended, by status.", ("route", "status"))

REQUESTS = Counter("kvmesh_requests", "Generation requests that ended: finished, failed or cancelled.", ("outcome",))
REQUESTS_RUNNING = Gauge("kvmesh_requests_running", "Generation requests running now.")
REQUEST_RETRIES = Counter("kvmesh_request_retries", "Requests sent to a second worker before their first token.")
TIME_TO_FIRST_TOKEN = Histogram(
    "kvmesh_time_to_first_token_seconds", "From the request's arrival to its first token.", buckets=_LATENCY_BUCKETS
)
PROMPT_TOKENS = Counter("kvmesh_prompt_tokens", "Prompt tokens of finished requests.")
COMPLETION_TOKENS = Counter("kvmesh_completion_tokens", "Tokens produced by finished requests.")
CACHED_TOKENS = Counter("kvmesh_cached_tokens", "Prompt tokens that decode workers held already.")
PREDICTED_CACHED_TOKENS = Counter("kvmesh_predicted_cached_tokens", "Prompt tokens the router expected them to hold.")

WAIT_ENDED = Counter("kvmesh_wait_ended", "Bounded waits that ran out, by setting (waits.*).", ("wait",))
UNBOOKED_PICKS = Counter("kvmesh_unbooked_picks", "Workers chosen round robin because the router did not answer.")

ROUTING_DECISIONS = Counter("kvmesh_routing_decisions", "Workers chosen.", ("policy",))
ROUTING_FALLBACKS = Counter("kvmesh_routing_fallbacks", "Choices in which the policy failed.", ("policy",))
ROUTING_STALENESS_IGNORED = Counter(
    "kvmesh_routing_staleness_ignored", "Choices made while over half of the workers' loads were stale."
)
RESERVATIONS = Gauge("kvmesh_reservations", "Bookings the router holds now.")
RESERVATIONS_EXPIRED = Counter("kvmesh_reservations_expired", "Bookings that no load report showed in time.")
KV_EVENTS = Counter("kvmesh_kv_events", "Messages on KV event streams taken in by the router.")
KV_EVENTS_REFUSED = Counter("kvmesh_kv_events_refused", "Cache changes that did not fit the index.", ("reason",))
KV_SNAPSHOTS = Counter("kvmesh_kv_snapshots", "Snapshots that replaced a worker's part of the index.")

PREFILL_DECISIONS = Counter("kvmesh_prefill_decisions", "Where prefills ran, and why.", ("remote", "reason"))
KV_BYTES_MOVED = Counter("kvmesh_kv_bytes_moved", "Bytes of KV pulled from other workers.", ("transport",))
QUEUE_TASKS = Counter("kvmesh_queue_tasks", "Prefill tasks, by what became of them.", ("outcome",))
QUEUE_DEPTH = Gauge("kvmesh_queue_depth", "Prefill tasks waiting for a lease.")
QUEUE_LEASED = Gauge("kvmesh_queue_leased", "Prefill tasks under a lease.")

DISCOVERY_FAILURES = Counter("kvmesh_discovery_failures", "Attempts that the discovery store did not answer.")
DISCOVERY_SNAPSHOTS = Counter("kvmesh_discovery_snapshots", "Listings of the discovery store that began a watch anew.")
DISCOVERY_LEASES_LOST = Counter("kvmesh_discovery_leases_lost", "Leases of ours that the discovery store let go.")

LOG_LINES_DROPPED = Counter("kvmesh_log_lines_dropped", "Log lines that the reader of stderr did not take.")

PROCESS_RESTARTS = Counter("kvmesh_process_restarts", "Child processes started again.", ("process",))

EXCHANGES_OPEN = Gauge("kvmesh_exchanges_open", "Exchange streams that decode workers serve now.")
EXCHANGE_FRAMES = Counter("kvmesh_exchange_frames", "Frames sent on Exchange streams.")


def exposition() -> bytes:
    """Return every metric of this process in Prometheus' text format."""
    return generate_latest(REGISTRY)


def logger(name: str) -> Any:
    """Return the logger of one module; it obeys `configure_logging`, called before or after."""
    return structlog.get_logger(module=name)


def configure_logging(*, level: str = "info", log_format: str = "auto", stream: TextIO | None = None) -> None:
    """Write events of `level` and above to `stream` (stderr); "auto" is console on a terminal, else JSON lines.

    Tracebacks name lines, never the values of variables: a prompt is one of them.
    """
    out = stream or sys.stderr
    is_console = log_format == "console" or (log_format == "auto" and out.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if is_console
        else [_TRACEBACKS, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=shared + renderer,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
