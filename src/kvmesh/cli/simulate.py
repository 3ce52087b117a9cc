"""`kvmesh simulate`: a trace against simulated workers in virtual time, for one routing policy or several."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvmesh.cli import mesh_flags, simulate_options
from kvmesh.cli.given_settings import given_settings
from kvmesh.cli.options import CommandFailed, Speed
from kvmesh.cli.running import policy_options
from kvmesh.cli.simulate_options import DEFAULT_POLICIES, UNBOUNDED
from kvmesh.simulate.options import CostModel, Order

if TYPE_CHECKING:
    from rich.table import Table

    from kvmesh.core.policies.policy import Policy
    from kvmesh.runtime.settings import LoadedSettings, Settings
    from kvmesh.simulate.options import SimulationOptions
    from kvmesh.simulate.prompts import TraceBlocks
    from kvmesh.simulate.result import PolicyResult, Spread


def simulate(
    trace: simulate_options.Trace,
    workers: simulate_options.Workers = 4,
    prefill: simulate_options.PrefillWorkers = 0,
    blocks: simulate_options.Blocks = "16384",
    block_size: simulate_options.BlockSize = 64,
    speed: Speed = 1.0,
    order: simulate_options.RequestOrder = Order.TIME,
    seed: simulate_options.Seed = 0,
    policy: simulate_options.Policies = None,
    policy_option: simulate_options.PolicyOptions = None,
    config: mesh_flags.Config = None,
    limit: simulate_options.Limit = None,
    cost: simulate_options.Cost = CostModel.CURVED,
    as_json: simulate_options.AsJson = False,
    plot: simulate_options.Plot = None,
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
    _print(results, as_json=as_json)
    if plot is not None:
        from kvmesh.simulate.plot import draw

        draw(results, plot)


def _print(results: "Sequence[PolicyResult]", *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([_figures(result) for result in results], indent=2))
    else:
        from kvmesh.cli.console import output_console

        output_console().print(result_table(results))


def _policies(names: "Sequence[str] | None", loaded: "LoadedSettings[Settings]") -> "list[Policy]":
    """Return the policies asked for, by flag or setting, or the usual ones. Raises: FixRequestError, CommandFailed."""
    from kvmesh.core.policies.policy import name_of
    from kvmesh.runtime.policy_loading import load_policies, reads_prompts

    settings = loaded.settings.router
    if not names:
        names = DEFAULT_POLICIES if loaded.origins["router.policy"] == "default" else [settings.policy]
    policies = load_policies(settings, names)
    for policy in policies:
        if reads_prompts(policy):
            raise CommandFailed(
                f"{name_of(policy)} compares what prompts say, which a trace does not have", exit_code=2
            )
    return policies


def _total_blocks(text: str) -> int | None:
    if text == UNBOUNDED:
        return None
    if not text.isdecimal() or not int(text):
        raise typer.BadParameter(
            f"{text!r} is no number of blocks, 1 or more, nor {UNBOUNDED!r}", param_hint="--blocks"
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
