"""Ten minutes of KV event churn, with random disconnections and restarts: in the end the index must be right, exactly.

    make soak
    python bench/soak.py --minutes 0.5 --workers 4

Workers without engines run made-up prompts through real block pools and publish what changes over real gRPC, to a
router that follows them. Once nothing changes any more the router's index is compared with each pool, and so is that of
a router started only then. Anything missing or extra ends the program with status 1.
"""

import argparse
import asyncio
import os
import resource
import sys
from dataclasses import asdict
from typing import Any

from reporting import print_report
from rich.console import Console
from rich.table import Table

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read at import: it would tell of every connection broken on purpose

from kvmesh.telemetry import configure_logging
from kvmesh.testing.event_soak import SoakPlan, SoakReport, soak


def main() -> int:
    """Run the soak the command line asks for, and print what came of it."""
    options = _parse()
    configure_logging(level=options.log_level)
    plan = SoakPlan(
        seconds=options.minutes * 60,
        workers=options.workers,
        blocks=options.blocks,
        ranks=options.ranks,
        ring=options.ring,
        steps_per_s=options.steps_per_s,
        seed=options.seed,
    )
    report = asyncio.run(soak(plan))
    ours = report.as_dict() | {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    _show(ours)
    case = {"params": asdict(plan), "ours": ours, "peer": None, "ratio": None}
    print_report("soak", [case])
    return _status(report)


def _status(report: SoakReport) -> int:
    return 0 if report.is_exact else 1


def _show(figures: dict[str, Any]) -> None:
    table = Table(title="a router's index after churn, against the workers' own blocks")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, str(value))
    Console(stderr=True).print(table)


def _parse() -> argparse.Namespace:
    default = SoakPlan(seconds=600)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=default.seconds / 60, help="of churn (default %(default)g)")
    parser.add_argument("--workers", type=int, default=default.workers, help="default %(default)s")
    parser.add_argument("--ranks", type=int, default=default.ranks, help="of each worker (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=default.blocks, help="of each rank (default %(default)s)")
    parser.add_argument("--ring", type=int, default=default.ring, help="batches a worker keeps (default %(default)s)")
    parser.add_argument("--steps-per-s", type=float, default=default.steps_per_s, help="per worker; %(default)g")
    parser.add_argument("--seed", type=int, default=default.seed, help="default %(default)s")
    parser.add_argument("--log-level", default="error", help="default %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
