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
INTER_TOKEN_TIME = Histogram(
    "kvmesh_inter_token_time_seconds",
    "Time between two tokens of a finished request, its mean.",
    buckets=_LATENCY_BUCKETS,
)
PROMPT_TOKENS = Counter("kvmesh_prompt_tokens", "Prompt tokens of finished requests.")
COMPLETION_TOKENS = Counter("kvmesh_completion_tokens", "Tokens produced by finished requests.")
CACHED_TOKENS = Counter("kvmesh_cached_tokens", "Prompt tokens that decode workers held already.")
PREDICTED_CACHED_TOKENS = Counter("kvmesh_predicted_cached_tokens", "Prompt tokens the router expected them to hold.")

WAIT_ENDED = Counter("kvmesh_wait_ended", "Bounded waits that ran out, by setting (waits.*).", ("wait",))
UNBOOKED_PICKS = Counter("kvmesh_unbooked_picks", "Workers chosen round robin because the router did not answer.")

ROUTING_DECISIONS = Counter("kvmesh_routing_decisions", "Workers chosen.", ("policy",))
ROUTING_OUTCOMES = Counter(
    "kvmesh_routing_outcomes", "Decisions: booked, selected, or the reason why nobody was chosen.", ("outcome",)
)
ROUTING_STAGE = Histogram(
    "kvmesh_routing_stage_seconds",
    "Time a decision spends in hash, match, load and select; total is all but hash.",
    ("stage",),
    buckets=(5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.02, 0.1),
)
ROUTED_PROMPT_TOKENS = Counter("kvmesh_routed_prompt_tokens", "Prompt tokens of booked requests.")
ROUTED_CACHED_TOKENS = Counter(
    "kvmesh_routed_cached_tokens", "Those of them that the chosen worker was believed to hold: the predicted hits."
)
ROUTING_FALLBACKS = Counter("kvmesh_routing_fallbacks", "Choices in which the policy failed.", ("policy",))
ROUTING_STALENESS_IGNORED = Counter(
    "kvmesh_routing_staleness_ignored", "Choices made while over half of the workers' loads were stale."
)
DECISIONS_LOGGED = Counter("kvmesh_decisions_logged", "Decisions written to the decision log.")
DECISIONS_DROPPED = Counter(
    "kvmesh_decisions_dropped", "Decisions that the decision log had no room for, or failed at."
)
ADMISSION_WAITING = Gauge("kvmesh_admission_waiting", "Requests that wait in the router for a worker with room.")
ADMISSION_WAITS = Counter(
    "kvmesh_admission_waits", "Waits for room: admitted, shed, timed_out, cancelled or failed.", ("outcome",)
)
ADMISSION_WAIT = Histogram("kvmesh_admission_wait_seconds", "How long they lasted.", buckets=_LATENCY_BUCKETS)
RESERVATIONS = Gauge("kvmesh_reservations", "Bookings the router holds now.")
RESERVATIONS_EXPIRED = Counter("kvmesh_reservations_expired", "Bookings that no load report showed in time.")
KV_EVENTS = Counter("kvmesh_kv_events", "Messages on KV event streams taken in by the router.")
KV_EVENTS_REFUSED = Counter("kvmesh_kv_events_refused", "Cache changes that did not fit the index.", ("reason",))
KV_SNAPSHOTS = Counter("kvmesh_kv_snapshots", "Snapshots that replaced a worker's part of the index.")
INDEX_MODE = Gauge("kvmesh_index_mode", "What a worker's cache is known by: 1 for the mode in force.", ("mode",))
INDEX_PAIRS = Gauge("kvmesh_index_pairs", "Pairs of worker rank and block in the index.")
INDEX_BLOCKS = Gauge("kvmesh_index_blocks", "Distinct blocks in the index.")
INDEX_ASIDE = Gauge("kvmesh_index_aside_pairs", "Pairs kept aside below a block that their rank lost.")
KV_EVENT_LAG = Histogram(
    "kvmesh_kv_event_lag_seconds", "Time the oldest event of a message waited at its worker.", buckets=_LATENCY_BUCKETS
)
INDEX_GAPS = Counter("kvmesh_index_gaps", "Times a worker's part of the index could not be vouched for.", ("cause",))
INDEX_DEGRADED = Gauge("kvmesh_index_degraded", "Worker ranks routed by load alone until their caches are read anew.")
INDEX_PREDICTED_BLOCKS = Counter("kvmesh_index_predicted_blocks", "Blocks that finished requests were told are cached.")
INDEX_OVERPREDICTED_BLOCKS = Counter(
    "kvmesh_index_overpredicted_blocks", "Those that were not there, though no removal of them had arrived."
)
INDEX_DRIFT_ALARMS = Counter(
    "kvmesh_index_drift_alarms", "Times the share of such blocks of a worker passed its bound."
)

ENGINE_EVENT_BATCHES = Counter("kvmesh_engine_event_batches", "Messages of engines' own KV event publishers taken in.")
ENGINE_EVENTS_IGNORED = Counter(
    "kvmesh_engine_events_ignored", "What in them said nothing to the index, by reason.", ("reason",)
)
ENGINE_EVENT_REPLAYS = Counter(
    "kvmesh_engine_event_replays", "Times a publisher was asked for past messages, by what came of it.", ("outcome",)
)

PREFILL_DECISIONS = Counter("kvmesh_prefill_decisions", "Where prefills ran, and why.", ("remote", "reason"))
WORKERS_LACKING = Gauge(
    "kvmesh_workers_lacking", "Workers of this process that lack a part of what they need now.", ("part",)
)
KV_PULLS_FAILED = Counter(
    "kvmesh_kv_pulls_failed", "Pulls that failed; another transport may have done.", ("transport",)
)
KV_WARM_UPS = Counter("kvmesh_kv_warm_ups", "First connections made before a pull needs them.", ("outcome",))
KV_BYTES_MOVED = Counter("kvmesh_kv_bytes_moved", "Bytes of KV pulled from other workers.", ("transport",))
KV_BLOCKS_ALTERED = Counter("kvmesh_kv_blocks_altered", "Pulled blocks dropped because their checksum is another.")
QUEUE_TASKS = Counter("kvmesh_queue_tasks", "Prefill tasks, by what became of them.", ("outcome",))
QUEUE_LEASES_LOST = Counter(
    "kvmesh_queue_leases_lost", "Leases that ended unanswered: expired, the holder gone, the task's time over."
)
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
