"""Prefill and decode apart, against together, at equal worker count: a trace in virtual time at several rates.

    make bench-disagg TRACE=conversation_trace.jsonl
    python bench/disagg.py TRACE --workers 8 --prefill 2 3 --speed 1 2 4

Both sides are `kvmesh simulate`: the router, the queue and the rules of the mesh itself over simulated engines of
16,384 blocks of 64 tokens. `--workers 8 --prefill 2` sets 8 workers that do both beside 6 that decode and 2 that
prefill; a handoff takes 0.4 ms per block. A rate is the trace's own times `speed`.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from reporting import print_report
from rich.console import Console
from rich.table import Table

from kvmesh.core.policies.policy import build_policy
from kvmesh.replay.trace import read_trace
from kvmesh.simulate.options import SimulationOptions
from kvmesh.simulate.prompts import TraceBlocks
from kvmesh.simulate.run import simulate_policy

_FIGURES = ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99")
_BLOCK_SIZE = 64
_BLOCKS = 16_384

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """One cluster at one rate."""

    workers: int
    prefill: int
    """Of the workers; 0 = aggregated."""
    speed: float


def simulate(trace: Path, limit: int, policy: str, case: Case) -> dict[str, float]:
    """Play the trace and return the figures."""
    began = time.perf_counter()
    options = SimulationOptions(
        workers=case.workers - case.prefill,
        prefill_workers=case.prefill,
        speed=case.speed,
        block_size=_BLOCK_SIZE,
        total_blocks=_BLOCKS,
    )
    blocks = TraceBlocks(read_trace(trace, limit=limit), block_size=_BLOCK_SIZE)
    result = simulate_policy(options, blocks, build_policy(policy))
    spreads = {"ttft_ms": result.ttft_ms, "itl_ms": result.itl_ms}
    return {
        **{f"{name}_p50": round(spread.p50 or 0.0, 2) for name, spread in spreads.items()},
        **{f"{name}_p99": round(spread.p99 or 0.0, 2) for name, spread in spreads.items()},
        "e2e_ms_p50": round(result.e2e_ms.p50 or 0.0, 1),
        "reuse": round(result.reuse, 4),
        "requests_per_s": round(result.requests / result.duration_s, 3),
        "wall_s": round(time.perf_counter() - began, 1),
    }


def crossover(together: Mapping[float, Figures], apart: Mapping[float, Figures]) -> dict[str, float | None]:
    """Return, figure by figure, from which speed on it is lower apart, at that speed and all above; None: at none."""
    found: dict[str, float | None] = {}
    for figure in _FIGURES:
        since = None
        for speed in sorted(together):
            is_lower = apart[speed][figure] < together[speed][figure]
            since = (speed if since is None else since) if is_lower else None
        found[figure] = since
    return found


def main() -> None:
    """Simulate every case, and print both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="in Mooncake's format")
    parser.add_argument("--workers", type=int, default=8, help="in all, on both sides")
    parser.add_argument("--prefill", type=int, nargs="+", default=[2, 3, 4], help="of them, where they are apart")
    parser.add_argument(
        "--speed", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 6.0], help="of the trace's times"
    )
    parser.add_argument("--policy", default="least_work")
    parser.add_argument("--limit", type=int, default=4_000, help="rows of the trace")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="simulations at once")
    given = parser.parse_args()
    if not given.trace.is_file():
        parser.error(f"{given.trace} is not there")
    if not 0 < min(given.prefill) <= max(given.prefill) < given.workers:
        parser.error(f"--prefill lies between 1 and {given.workers - 1}: some of --workers must decode")
    cases = [Case(given.workers, prefill, speed) for prefill, speed in product([0, *given.prefill], given.speed)]
    figures: dict[int, dict[float, Figures]] = {prefill: {} for prefill in (0, *given.prefill)}
    with ProcessPoolExecutor(given.jobs) as pool:
        running = [pool.submit(simulate, given.trace, given.limit, given.policy, case) for case in cases]
        for case, future in zip(cases, running, strict=True):
            figures[case.prefill][case.speed] = future.result()
            print(case, figures[case.prefill][case.speed], file=sys.stderr, flush=True)
    crossovers = {str(prefill): crossover(figures[0], figures[prefill]) for prefill in given.prefill}
    show(figures, crossovers, workers=given.workers)
    reports = [_report(case, figures) for case in cases if case.prefill]
    print_report("disagg", reports, crossover_speed=crossovers)


def _report(case: Case, figures: Mapping[int, Mapping[float, Figures]]) -> dict[str, Any]:
    """Return a case as the benches do; its peer is the same number of workers that do both."""
    apart, together = figures[case.prefill][case.speed], figures[0][case.speed]
    ratio = {name: round(apart[name] / together[name], 3) if together[name] else None for name in _FIGURES}
    return {"params": asdict(case), "ours": apart, "peer": together, "ratio": ratio}


def show(
    figures: Mapping[int, Mapping[float, Figures]],
    crossovers: Mapping[str, Mapping[str, float | None]],
    *,
    workers: int,
) -> None:
    """Print the table for people."""
    table = Table(title=f"{workers} workers, together or apart (decode + prefill); ms")
    for title in ("speed", "requests/s", "workers", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"):
        table.add_column(title, justify="right")
    speeds: Sequence[float] = sorted(figures[0])
    for speed in speeds:
        for prefill, by_speed in figures.items():
            found = by_speed[speed]
            shape = f"{workers - prefill} + {prefill}" if prefill else str(workers)
            cells = [f"{found[name]:,.1f}" for name in _FIGURES]
            table.add_row(f"{speed:g}", f"{found['requests_per_s']:.2f}", shape, *cells)
        table.add_section()
    console = Console(stderr=True, width=140)
    console.print(table)
    for name, since in crossovers.items():
        words = [f"{figure} {'never' if speed is None else f'from {speed:g}x on'}" for figure, speed in since.items()]
        console.print(f"{workers - int(name)} + {name} is better: {', '.join(words)}")


if __name__ == "__main__":
    main()
