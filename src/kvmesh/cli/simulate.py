"""`kvmesh simulate`: a trace against simulated workers in virtual time, for one routing policy or several."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli import mesh_flags
from kvmesh.cli.given_settings import given_settings
from kvmesh.cli.options import CommandFailed
from kvmesh.cli.running import policy_options
from kvmesh.simulate.options import CostModel, Order

if TYPE_CHECKING:
    from rich.table import Table

    from kvmesh.core.policies.policy import Policy
    from kvmesh.runtime.settings import LoadedSettings, Settings
    from kvmesh.simulate.options import SimulationOptions
    from kvmesh.simulate.prompts import TraceBlocks
    from kvmesh.simulate.result import PolicyResult, Spread

_UNBOUNDED = "unbounded"
_DEFAULT_POLICIES = ("round_robin", "kv_aware", "least_work")


def simulate(
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
    workers: Annotated[int, typer.Option("--workers", metavar="N", min=1, help="Decode workers.")] = 4,
    prefill: Annotated[
        int, typer.Option("--prefill", metavar="N", min=0, help="Prefill workers, fed by the prefill queue.")
    ] = 0,
    blocks: Annotated[str, typer.Option("--blocks", metavar="N|unbounded", help="KV blocks of each worker.")] = "16384",
    block_size: Annotated[
        int, typer.Option("--block-size", metavar="TOKENS", min=1, help="Tokens in a block; it divides 512.")
    ] = 64,
    speed: Annotated[
        float, typer.Option("--speed", metavar="X", min=0.001, help="Divides the times between requests.")
    ] = 1.0,
    order: Annotated[
        Order, typer.Option("--order", help="time: at their times; file: each ends before the next, no queueing.")
    ] = Order.TIME,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of what the policies draw.")] = 0,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="P",
            help=f"A name, or MODULE:CLASS; may be repeated. default: {' '.join(_DEFAULT_POLICIES)}",
        ),
    ] = None,
    policy_option: Annotated[
        list[str] | None,
        typer.Option(
            "--policy-option", metavar="KEY=VALUE", help="One option, for the policies that have it; may be repeated."
        ),
    ] = None,
    config: mesh_flags.Config = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N requests.")] = None,
    cost: Annotated[
        CostModel, typer.Option("--cost", help="Step times: curved compares with other simulators; linear: our engine.")
    ] = CostModel.CURVED,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the distributions, load and hit rate (png, svg)."),
    ] = None,
) -> None:
    """Play a trace to simulated workers in virtual time: what each routing policy makes of it, and how long it takes.

    Router, index, queue and block pools are the mesh's own; the engines are modelled. The same seed gives the same
    figures. The router's weights are settings, as for `kvmesh up`, e.g. KVMESH_ROUTER__OVERLAP_CREDIT=0.
    """
    from kvmesh.core.errors import FixRequestError
    from kvmesh.replay.trace import read_trace
    from kvmesh.simulate.options import SimulationOptions
    from kvmesh.simulate.prompts import TraceBlocks

    if plot is not None:
        _require_plots(plot)
    try:
        options = SimulationOptions(
            workers=workers,
            prefill_workers=prefill,
            total_blocks=_total_blocks(blocks),
            block_size=block_size,
            speed=speed,
            order=order,
            seed=seed,
            cost_model=cost,
        )
        policies = _policies(policy, given_settings(config, policy_options(policy_option or [])))
        named = TraceBlocks(read_trace(trace, limit=limit), block_size=block_size)
        results = _run_all(options, named, policies)
    except FixRequestError as exc:
        raise CommandFailed(exc.message, exit_code=2) from exc
    _warn_of_fallbacks(results)
    if as_json:
        typer.echo(json.dumps([_figures(result) for result in results], indent=2))
    else:
        from kvmesh.cli.console import output_console

        output_console().print(result_table(results))
    if plot is not None:
        from kvmesh.simulate.plot import draw

        draw(results, plot)


def _policies(names: "Sequence[str] | None", loaded: "LoadedSettings[Settings]") -> "list[Policy]":
    """Return the policies asked for, by flag or setting, or the usual ones. Raises: FixRequestError, CommandFailed."""
    from kvmesh.core.policies.policy import name_of
    from kvmesh.runtime.policy_loading import load_policies, reads_prompts

    settings = loaded.settings.router
    if not names:
        names = _DEFAULT_POLICIES if loaded.origins["router.policy"] == "default" else [settings.policy]
    policies = load_policies(settings, names)
    for policy in policies:
        if reads_prompts(policy):
            raise CommandFailed(
                f"{name_of(policy)} compares what prompts say, which a trace does not have", exit_code=2
            )
    return policies


def _total_blocks(text: str) -> int | None:
    if text == _UNBOUNDED:
        return None
    if not text.isdecimal() or not int(text):
        raise typer.BadParameter(
            f"{text!r} is no number of blocks, 1 or more, nor {_UNBOUNDED!r}", param_hint="--blocks"
        )
    return int(text)


def _require_plots(plot: Path) -> None:
    """Fail before a long run, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise CommandFailed("--plot needs matplotlib: pip install 'kvmesh[plot]'", exit_code=2) from exc
    if plot.suffix not in (".png", ".svg", ".pdf"):
        raise CommandFailed(f"--plot writes .png, .svg or .pdf, not {plot.name!r}", exit_code=2)
    if not plot.absolute().parent.is_dir():
        raise CommandFailed(f"--plot: there is no folder {plot.parent}", exit_code=2)


def _run_all(options: "SimulationOptions", blocks: "TraceBlocks", policies: "Sequence[Policy]") -> "list[PolicyResult]":
    from kvmesh.core.policies.policy import name_of
    from kvmesh.simulate.run import simulate_policy

    results = []
    for policy in policies:
        with _progress(name_of(policy), len(blocks.rows)) as on_end:
            results.append(simulate_policy(options, blocks, policy, on_end=on_end))
    return results


@contextmanager
def _progress(policy: str, total: int) -> "Iterator[Callable[[int], None]]":
    """Show on a terminal (stderr) how many requests have ended; elsewhere nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvmesh.cli.console import output_console

    console = output_console(stderr=True)
    columns = (TextColumn(policy), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda _: progress.advance(task)


def _warn_of_fallbacks(results: "Sequence[PolicyResult]") -> None:
    for result in results:
        if result.fallbacks:
            went = f"{result.fallbacks} of {result.requests} requests went by least cost, not by {result.policy}"
            typer.secho(f"warning: {went}: {result.fallback}", fg="yellow", err=True)


def _figures(result: "PolicyResult") -> dict[str, object]:
    return {
        "policy": result.policy,
        "requests": result.requests,
        "reuse": round(result.reuse, 6),
        "balance": round(result.balance, 4),
        **{name: asdict(getattr(result, name)) for name in ("ttft_ms", "itl_ms", "e2e_ms")},
        "duration_s": round(result.duration_s, 3),
        "preempted": result.preempted,
        "fallbacks": result.fallbacks,
        "uncached": list(result.uncached),
    }


def result_table(results: "Sequence[PolicyResult]") -> "Table":
    """Return the figures for people, a line per policy; the times are mean / p50 / p90 / p99."""
    from rich.table import Table

    table = Table("policy", box=None, pad_edge=False, header_style="dim")
    for title in ("reuse", "balance", "ttft ms: mean", "p50", "p90", "p99", "itl ms: mean", "p50", "p90", "p99"):
        table.add_column(title, justify="right")
    for title in ("e2e ms: mean", "p50", "p90", "p99"):
        table.add_column(title, justify="right")
    for result in results:
        spreads = (result.ttft_ms, result.itl_ms, result.e2e_ms)
        table.add_row(
            result.policy,
            f"{result.reuse:.5f}",
            f"{result.balance:.3f}",
            *(figure for spread in spreads for figure in _spread_cells(spread)),
        )
    return table


def _spread_cells(spread: "Spread") -> "Iterator[str]":
    for value in (spread.mean, spread.p50, spread.p90, spread.p99):
        yield "-" if value is None else f"{value:.1f}"
