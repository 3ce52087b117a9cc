"""Requests through a mesh of processes that are killed, stopped and cut off meanwhile: none wrong, hung or leaked.

    make chaos
    python bench/chaos.py --requests 200 --seed 7 --mode direct

Every answer is held against that of one process that nobody disturbs. Exit 1 if anything is not as it must be.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvmesh import telemetry
from kvmesh.testing.chaos import ChaosPlan, ChaosResult, run_chaos


def main() -> None:
    """Run one plan and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of what is done to the mesh")
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second, in bursts")
    parser.add_argument("--gap", type=float, default=1.5, help="seconds between two disturbances, on average")
    parser.add_argument("--mode", choices=("queue", "direct"), default="queue", help="how prefill workers are asked")
    parser.add_argument("--log-level", default="critical", help="of the processes and of this one, on stderr")
    given = parser.parse_args()
    telemetry.configure_logging(level=given.log_level, log_format="json", stream=sys.stderr)
    plan = ChaosPlan(
        requests=given.requests, seed=given.seed, rate=given.rate, mean_gap_s=given.gap, mode=given.mode,
        log_level=given.log_level,
    )  # fmt: skip
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvmesh-chaos-") as folder:
        result = asyncio.run(run_chaos(plan, folder=Path(folder)))
    show(result, wall_s=time.perf_counter() - began)
    print(
        json.dumps(
            {
                "requests": result.requests, "wrong": result.wrong, "hung": result.hung, "leaked": result.leaked,
                "outcomes": dict(sorted(result.outcomes.items())), "unexpected": result.unexpected,
                "asked_again": result.asked_again,
                "disturbances": sum(result.disturbances.values()), "seed": given.seed, "mode": given.mode,
            }
        )
    )  # fmt: skip
    if not result.is_good:
        raise SystemExit(1)


def show(result: ChaosResult, *, wall_s: float) -> None:
    """Print the counts, and what went wrong, for people."""
    console = Console(stderr=True, width=120)
    outcomes = Table("outcome", "requests", title=f"{result.requests} requests in {wall_s:.0f} s")
    for outcome, count in sorted(result.outcomes.items()):
        outcomes.add_row(outcome, str(count))
    console.print(outcomes)
    kinds: Counter[str] = Counter()
    for name, count in result.disturbances.items():
        kinds[name.split()[0]] += count
    console.print("disturbances: " + ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())))
    console.print(f"asked again after the connection to the gateway broke: {result.asked_again}")
    console.print(f"wrong {result.wrong}, hung {result.hung}, leaked {result.leaked}, unexpected {result.unexpected}")
    for line in result.details[:20]:
        console.print(line)


if __name__ == "__main__":
    main()
