"""What the router's index of prefixes costs, beside a peer: time of a match, memory per pair, speed of stores.

    python bench/prefix_index.py                            64 workers, 1e5, 1e6 and 1e7 (worker, block) pairs
    python bench/prefix_index.py --pairs 100000 --runs 1    a part of it, quickly
    python bench/prefix_index.py --churn-minutes 10         1e7 pairs of ours replaced for so long: does memory grow?

Every run is a process of its own (peers/prefix_index_side.py), ours and the peer's in turn; the figures are medians.
The peer is the RadixTree of ai-dynamo-runtime through its Python binding, which takes events as JSON; ours takes them
as Python objects. See README.md beside this file.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from reporting import print_report
from rich.console import Console
from rich.table import Table

PEER_PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
SIDE = Path(__file__).parent / "peers" / "prefix_index_side.py"
FIGURES = ("match_us", "match_shared_us", "match_cold_us", "bytes_per_pair", "blocks_per_s")
OURS_ALONE = ("search_us",)
_PAIRS = (100_000, 1_000_000, 10_000_000)
_CHURN_PAIRS = 10_000_000
_LARGE_PAIRS = 5_000_000
"""Indexes larger than this are made once per side: they take a minute and a gigabyte each."""

Figures = dict[str, float]


def main() -> None:
    """Measure every case and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", help=f"default: {' '.join(map(str, _PAIRS))}")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3, help=f"of each side and case up to {_LARGE_PAIRS:,} pairs")
    parser.add_argument("--lookups", type=int, default=2000, help="matches timed per run and figure")
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="of the environment with ai-dynamo")
    parser.add_argument("--churn-minutes", type=float, default=0.0, help="measure this instead")
    given = parser.parse_args()
    if given.churn_minutes:
        reports = [churn(given, pairs) for pairs in given.pairs or [_CHURN_PAIRS]]
    else:
        if not given.peer_python.exists():
            print(f"no peer: {given.peer_python} is not there; `make bench-peers-install` makes it", file=sys.stderr)
        reports = [measure(given, pairs) for pairs in given.pairs or _PAIRS]
        show(reports)
    print_report("prefix_index", reports)


def measure(given: argparse.Namespace, pairs: int) -> dict[str, object]:
    """Return the report of one size."""
    sides = {"ours": Path(sys.executable)}
    if given.peer_python.exists():
        sides["dynamo"] = given.peer_python
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    for number in range(given.runs if pairs <= _LARGE_PAIRS else 1):
        options = ["--pairs", str(pairs), "--lookups", str(given.lookups), "--seed", str(number)]
        answers = set()
        for side, python in sides.items():
            figures = run_side(python, side, given.workers, options)
            answers.add(figures.pop("answers"))
            runs[side].append(figures)
            print(f"{pairs:10,} {side:8s}", figures, file=sys.stderr)
        if len(answers) > 1:
            raise SystemExit(f"the sides answered differently at {pairs} pairs, seed {number}")
    ours = medians(runs["ours"], (*FIGURES, *OURS_ALONE))
    peer = medians(runs["dynamo"], FIGURES) if "dynamo" in runs else None
    ratio = None if peer is None else {name: round(ours[name] / peer[name], 3) for name in FIGURES}
    return {"params": {"pairs": pairs, "workers": given.workers}, "ours": ours, "peer": peer, "ratio": ratio}


def churn(given: argparse.Namespace, pairs: int) -> dict[str, object]:
    """Return the report of one index that is changed for some minutes."""
    options = ["--pairs", str(pairs), "--churn-minutes", str(given.churn_minutes)]
    figures = run_side(Path(sys.executable), "ours", given.workers, options)
    params = {"pairs": pairs, "workers": given.workers, "churn_minutes": given.churn_minutes}
    return {"params": params, "ours": {name: round(figures[name], 3) for name in figures}, "peer": None, "ratio": None}


def run_side(python: Path, side: str, workers: int, options: Sequence[str]) -> dict[str, float]:
    """Return what one run of one side printed."""
    command = [str(python), str(SIDE), side, "--workers", str(workers), *options]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(printed.splitlines()[-1])
    return figures


def medians(runs: Sequence[Figures], names: Sequence[str]) -> Figures:
    """Return the median of each figure."""
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in names}


def show(reports: Sequence[dict[str, object]]) -> None:
    """Print the table for people."""
    table = Table(title="ours / peer = ratio (medians)")
    table.add_column("pairs", justify="right")
    for name in (*FIGURES, *OURS_ALONE):
        table.add_column(name, justify="right")
    for report in reports:
        params, ours, peer, ratio = report["params"], report["ours"], report["peer"], report["ratio"]
        assert isinstance(params, dict)
        assert isinstance(ours, dict)
        cells = [f"{ours[name]:,.1f}" for name in (*FIGURES, *OURS_ALONE)]
        if isinstance(peer, dict) and isinstance(ratio, dict):
            both = [f"{ours[name]:,.1f} / {peer[name]:,.1f} = {ratio[name]:.2f}" for name in FIGURES]
            cells = [*both, *(f"{ours[name]:,.1f}" for name in OURS_ALONE)]
        table.add_row(f"{params['pairs']:,}", *cells)
    Console(stderr=True, width=180).print(table)


if __name__ == "__main__":
    main()
