"""A real trace through a mesh of processes: what each routing policy makes of it, and what the mesh costs.

    make bench-replay TRACE=conversation_trace.jsonl
    python bench/replay.py TRACE --limit 200 --policy kv_aware --prefill 2

For each policy a fresh `kvmesh up --processes` with an etcd of its own serves `kvmesh replay` with the same rows. The
mesh's CPU seconds are those of all its processes, etcd included and the replay's own client not, over the wall time
of the replay. TRACE is in Mooncake's format.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.sides import process_table
from reporting import print_report
from rich.console import Console
from rich.table import Table

_KVMESH = str(Path(sys.executable).with_name("kvmesh"))
_POLICIES = ("kv_aware", "round_robin")
_FIGURES = {
    "hit_rate": "hit rate",
    "predicted_hit_rate": "predicted",
    "ttft_ms_mean": "TTFT mean ms",
    "ttft_ms_p50": "TTFT p50 ms",
    "itl_ms_p50": "ITL p50 ms",
    "schedule_lag_ms_p99": "lag p99 ms",
    "cpu_per_wall": "CPU s / wall s",
    "errors": "errors",
    "lost": "lost",
    "duplicated": "doubled",
}
_READY_S = 60.0
_STOP_S = 60.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Case:
    """One mesh and one replay."""

    policy: str
    decode: int
    prefill: int
    limit: int
    speed: float


class Mesh:
    """`kvmesh up --processes`, ready."""

    def __init__(self, process: subprocess.Popen[str], grpc_address: str) -> None:
        """Look at a running mesh."""
        self.grpc_address = grpc_address
        self._process = process

    def cpu_s(self) -> float:
        """Return the CPU seconds of all its processes so far."""
        times, children = process_table()
        found = [self._process.pid]
        for pid in found:
            found += children[pid]
        return sum(times.get(pid, 0) for pid in found) / _CLOCK_TICKS


@contextmanager
def running_mesh(case: Case) -> Iterator[Mesh]:
    """Run a mesh for the block. Raises: SystemExit with what it wrote if it does not become ready."""
    process = subprocess.Popen(
        [
            _KVMESH, "up", "--processes", "--discovery", "etcd", "--engine", "simulated", "--speedup", str(case.speed),
            "--decode", str(case.decode), "--prefill", str(case.prefill), "--policy", case.policy,
            "--http-port", "0", "--grpc-port", "0", "--log-format", "json",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        yield Mesh(process, _wait_ready(process))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=_STOP_S)


def _wait_ready(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    until = time.monotonic() + _READY_S
    said = []
    for line in process.stderr:
        said.append(line)
        if '"mesh.ready"' in line:
            return str(json.loads(line)["grpc"])
        if time.monotonic() > until:
            break
    sys.exit("the mesh did not become ready:\n" + "".join(said[-20:]))


def measure(case: Case, trace: Path) -> dict[str, float]:
    """Replay once and return the figures."""
    with running_mesh(case) as mesh:
        before, began = mesh.cpu_s(), time.monotonic()
        ran = subprocess.run(
            [
                _KVMESH, "replay", str(trace), "--limit", str(case.limit), "--speed", str(case.speed), "--json",
                "--target", mesh.grpc_address,
            ],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )  # fmt: skip
        wall_s, cpu_s = time.monotonic() - began, mesh.cpu_s() - before
    result: dict[str, Any] = json.loads(ran.stdout)
    found = {"cpu_per_wall": cpu_s / wall_s, "cpu_s": cpu_s, "wall_s": wall_s}
    for name, value in result.items():
        if isinstance(value, dict):
            found |= {f"{name}_{part}": number for part, number in value.items() if isinstance(number, int | float)}
        elif isinstance(value, int | float):
            found[name] = value
    return found


def main() -> None:
    """Replay for every policy in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--limit", type=int, default=1000, help="rows of the trace")
    parser.add_argument("--speed", type=float, default=5.0, help="of the trace's times, and of the simulated engine")
    parser.add_argument("--decode", type=int, default=4)
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--policy", action="append", help=f"may be repeated. default: {' and '.join(_POLICIES)}")
    parser.add_argument("--runs", type=int, default=1, help="of each policy, in turn")
    given = parser.parse_args()
    if not given.trace.is_file():
        parser.error(f"{given.trace} is not there")
    cases = [
        Case(policy, given.decode, given.prefill, given.limit, given.speed) for policy in given.policy or _POLICIES
    ]
    runs: dict[Case, list[dict[str, float]]] = defaultdict(list)
    for _ in range(given.runs):
        for case in cases:
            runs[case].append(measure(case, given.trace))
            print(case, {name: round(runs[case][-1].get(name, 0.0), 3) for name in _FIGURES}, file=sys.stderr)
    reports = [_report(case, runs[case]) for case in cases]
    show(reports)
    print_report("replay", reports)


def _report(case: Case, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    params = {name: getattr(case, name) for name in ("policy", "decode", "prefill", "limit", "speed")}
    ours = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
    return {"params": params, "ours": ours, "peer": None, "ratio": None}


def show(reports: Sequence[dict[str, Any]]) -> None:
    """Print the table for people."""
    table = Table(title="a trace through a mesh of processes (medians)")
    table.add_column("policy")
    for title in _FIGURES.values():
        table.add_column(title, justify="right")
    for report in reports:
        ours = report["ours"]
        table.add_row(report["params"]["policy"], *(f"{ours.get(name, 0.0):,.3f}" for name in _FIGURES))
    Console(stderr=True, width=180).print(table)


if __name__ == "__main__":
    main()
