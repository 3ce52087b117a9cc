"""`kvmesh replay`: a trace against a running mesh, and what came of it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.options import DEFAULT_TARGET, CommandFailed, Speed, Target, Timeout

if TYPE_CHECKING:
    from rich.table import Table

    from kvmesh.replay.outcome import Outcome
    from kvmesh.replay.result import ReplayResult
    from kvmesh.replay.trace import TraceRow


def replay(
    trace: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE",
            help="Mooncake format: a JSON object per line with timestamp (ms), input_length, output_length, hash_ids.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ],
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N requests.")] = None,
    speed: Speed = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    model: Annotated[str, typer.Option("--model", help="Model; may be left out while the mesh serves one.")] = "",
    target: Target = DEFAULT_TARGET,
    timeout: Timeout = 300.0,
) -> None:
    """Replay a trace against a running mesh, each request at its time, however many run still.

    Exit code 1 when a request is lost or doubled; typed errors are counted, not failures of the replay.
    """
    from kvmesh.core.errors import FixRequestError
    from kvmesh.replay.trace import read_trace

    try:
        rows = read_trace(trace, limit=limit)
    except FixRequestError as exc:
        raise CommandFailed(exc.message, exit_code=2) from exc
    result = _drive(rows, target=target, speed=speed, model=model, timeout_s=timeout)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
    else:
        from kvmesh.cli.console import output_console

        output_console().print(result_table(result))
    if result.lost or result.duplicated:
        raise CommandFailed(f"of {result.requests} requests, {result.lost} lost and {result.duplicated} doubled")


def _drive(rows: "list[TraceRow]", *, target: str, speed: float, model: str, timeout_s: float) -> "ReplayResult":
    import grpc
    import uvloop

    from kvmesh.cli.calls import failure_text
    from kvmesh.core.errors import MeshError
    from kvmesh.replay import driver
    from kvmesh.runtime.heap import keep_freed_memory, settle_heap

    # A full collection, or memory taken from the system again, lasts tens of milliseconds, and what is due would wait.
    keep_freed_memory()
    settle_heap()
    try:
        with _progress(len(rows)) as on_end:
            return uvloop.run(
                driver.replay(rows, target=target, speed=speed, model=model, timeout_s=timeout_s, on_end=on_end)
            )
    except grpc.aio.AioRpcError as exc:
        raise CommandFailed(failure_text(exc, target)) from exc
    except MeshError as exc:
        raise CommandFailed(f"{exc.reason.value}: {exc.message}") from exc


@contextmanager
def _progress(total: int) -> "Iterator[Callable[[Outcome], None]]":
    """Show on a terminal (stderr) how many requests have ended; elsewhere nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvmesh.cli.console import output_console

    console = output_console(stderr=True)
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn a few times a second by a thread of its own: more would show in the figures.
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda outcome: progress.advance(task)


def result_table(result: "ReplayResult") -> "Table":
    """Return the figures for people: counts and rates, then the distributions."""
    from rich.table import Table

    table = Table("", "mean", "p50", "p90", "p99", box=None, pad_edge=False, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("requests", "lost", "duplicated", "short", "errors"):
        table.add_row(name, str(getattr(result, name)))
    for label, reasons in (("error", result.error_reasons), ("lost", result.lost_reasons)):
        for reason, count in reasons.items():
            table.add_row(f"{label} {reason}", str(count))
    for name, rate in (("hit rate", result.hit_rate), ("predicted hit rate", result.predicted_hit_rate)):
        table.add_row(name, _figure(rate, digits=4))
    for name in ("schedule_lag_ms", "ttft_ms", "itl_ms", "e2e_ms"):
        one = getattr(result, name)
        table.add_row(
            name.removesuffix("_ms").replace("_", " ") + " (ms)", *(map(_figure, (one.mean, one.p50, one.p90, one.p99)))
        )
    return table


def _figure(value: float | None, *, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
