"""A mesh on the terminal. Pure: a topology in, a renderable out."""

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvmesh.cli.status import state_name
from kvmesh.v1 import frontend_pb2

_BAR_WIDTH = 16
_LABEL_WIDTH = 10
"""Of what stands before the addresses and the command."""
_WIDTH_WITH_BARS = 100
"""From here on the table has room for the bars beside its figures."""
_STATE_STYLES = {"ready": "green", "draining": "yellow", "suspect": "red", "unknown": "red"}
_UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class Doors:
    """Where a mesh is reached."""

    http_address: str
    grpc_address: str


class TokenRate:
    """Tokens per second between two looks at a counter."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def update(self, *, now_s: float, completion_tokens: int) -> float:
        """Return the rate since the last look; 0 at the first."""
        last, self._last = self._last, (now_s, completion_tokens)
        if last is None or now_s <= last[0]:
            return 0.0
        return max(completion_tokens - last[1], 0) / (now_s - last[0])


def mesh_view(
    topology: frontend_pb2.Topology,
    doors: Doors,
    *,
    tokens_per_s: float,
    max_workers: int | None = None,
    width: int = _WIDTH_WITH_BARS,
) -> RenderableType:
    """Return the view of a running mesh, `width` columns wide; workers beyond `max_workers` are only counted."""
    return Group(
        Text.assemble(("kvmesh    ", "bold"), f"http://{doors.http_address}", ("  gRPC ", "dim"), doors.grpc_address),
        Text.assemble(("dashboard ", "dim"), f"http://{doors.http_address}/"),
        Text.assemble(("try       ", "dim"), curl_line(doors.http_address, width=width - _LABEL_WIDTH)),
        Text(),
        topology_view(topology, tokens_per_s=tokens_per_s, max_workers=max_workers, width=width),
        Text("Ctrl-C stops the mesh", style="dim"),
    )


def topology_view(
    topology: frontend_pb2.Topology,
    *,
    tokens_per_s: float | None = None,
    max_workers: int | None = None,
    width: int = _WIDTH_WITH_BARS,
) -> RenderableType:
    """Return the workers' table and the lines on queue and requests; the rate is shown where it is known."""
    parts: list[RenderableType] = [workers_table(topology, max_workers=max_workers, has_bars=width >= _WIDTH_WITH_BARS)]
    if max_workers is not None and (hidden := len(topology.workers) - max_workers) > 0:
        parts.append(Text(f"and {hidden} more: kvmesh status", style="dim"))
    if topology.router_silent:
        parts.append(Text("router    not answering", style="red"))
    parts.append(queue_line(topology))
    parts.append(requests_line(topology.counters, tokens_per_s=tokens_per_s))
    parts.append(cache_line(topology))
    return Group(*parts)


def workers_table(
    topology: frontend_pb2.Topology, *, max_workers: int | None = None, has_bars: bool = True
) -> RenderableType:
    """Return the table of the workers, in the topology's order; the bars show how full each pool is."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("worker", no_wrap=True)
    table.add_column("role")
    table.add_column("state")
    table.add_column("active", justify="right")
    table.add_column("waiting", justify="right")
    table.add_column("blocks", justify="right", no_wrap=True)
    if has_bars:
        table.add_column("", width=_BAR_WIDTH)
    table.add_column("cache hits", justify="right")
    for worker in topology.workers[:max_workers]:
        state = state_name(worker.state)
        is_known = not worker.load_unknown
        used = str(worker.active_blocks) if is_known else _UNKNOWN
        table.add_row(
            Text(worker.id),
            Text(worker.role),
            Text(state, style=_STATE_STYLES.get(state, "")),
            str(worker.active_requests) if is_known else _UNKNOWN,
            str(worker.waiting_requests) if is_known else _UNKNOWN,
            f"{used}/{worker.total_blocks}" if worker.total_blocks else _UNKNOWN,
            *([_bar(worker)] if has_bars else []),
            f"{worker.prefix_hit_rate:.0%}" if is_known else _UNKNOWN,
        )
    return table if topology.workers else Text("no workers", style="red")


def _bar(worker: frontend_pb2.TopologyWorker) -> RenderableType:
    if not worker.total_blocks or worker.load_unknown:
        return ""
    return ProgressBar(total=worker.total_blocks, completed=worker.active_blocks, width=_BAR_WIDTH)


def queue_line(topology: frontend_pb2.Topology) -> Text:
    """Return the prefill queue in one line."""
    if not topology.HasField("queue"):
        return Text("queue     not answering", style="red") if topology.queue_silent else Text("queue     none known")
    queue = topology.queue
    return Text(f"queue     {queue.depth} waiting, {queue.leased} leased, {queue.dead} dead")


def requests_line(counters: frontend_pb2.TopologyCounters, *, tokens_per_s: float | None = None) -> Text:
    """Return requests, tokens and where prefills ran in one line."""
    parts = [f"{counters.requests} requests", f"{counters.running} running"]
    if counters.failed:
        parts.append(f"{counters.failed} failed")
    if counters.cancelled:
        parts.append(f"{counters.cancelled} cancelled")
    parts.append(f"{counters.completion_tokens} tokens")
    if tokens_per_s is not None:
        parts.append(f"{tokens_per_s:.0f} tokens/s")
    parts.append(f"prefills: {counters.remote_prefills} remote, {counters.local_prefills} local")
    if counters.kv_bytes_moved:
        parts.append(f"{_size(counters.kv_bytes_moved)} of KV moved")
    return Text(f"served    {', '.join(parts)}")


def cache_line(topology: frontend_pb2.Topology) -> Text:
    """Return how much of the prompts was cached, against what the router expected, in one line."""
    counters = topology.counters
    hits = _share(counters.cached_tokens, counters.prompt_tokens)
    predicted = _share(counters.predicted_cached_tokens, counters.prompt_tokens)
    policy = f" by {topology.policy}" if topology.policy else ""
    index = f", index {topology.index}" if topology.index not in ("", "events") else ""
    return Text(f"cache     {hits} of prompt tokens hit, {predicted} predicted{policy}{index}")


def curl_line(http_address: str, *, width: int = _WIDTH_WITH_BARS) -> str:
    """Return a command that sends the hello world; beyond `width` it goes on in a second line, for the shell too."""
    call, body = f"curl -s {http_address}/generate", """-d '{"prompt": "Tell me a joke"}'"""
    between = " " if len(call) + 1 + len(body) <= width else " \\\n" + " " * _LABEL_WIDTH
    return f"{call}{between}{body}"


def _size(count_bytes: int) -> str:
    """Return a number of bytes in the largest unit of which there is at least one."""
    size, units = float(count_bytes), iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else _UNKNOWN
