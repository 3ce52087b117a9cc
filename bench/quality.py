"""How well routing policies use the caches of a cluster: a trace in virtual time, beside the peer's own replay.

    make bench-quality TRACE=conversation_trace.jsonl
    python bench/quality.py TRACE --workers 8 --speed 1 --policy least_work

Every worker has 16,384 blocks of 64 tokens. Ours is `kvmesh simulate`; `peer` is what the peer's offline replay makes
of the same trace with its own router (for `round_robin` its round robin) and engines. `yardstick` is what no router can
be expected to pass: one LRU cache of all workers' blocks together, in the trace's blocks of 512 tokens, and nothing
ever waiting. `floor` is what no router can pass at all: a cache that forgets nothing, and nothing ever waiting.

    python bench/quality.py TRACE --bounds

prints these two alone, in a second.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from reporting import print_report
from rich.console import Console
from rich.table import Table

from kvmesh.core.policies.policy import build_policy
from kvmesh.core.step_cost import CurvedStepCost
from kvmesh.replay.trace import BLOCK_TOKENS, TraceRow, read_trace
from kvmesh.simulate.options import SimulationOptions
from kvmesh.simulate.prompts import TraceBlocks
from kvmesh.simulate.result import Spread
from kvmesh.simulate.run import simulate_policy

_POLICIES = ("round_robin", "kv_aware", "least_work")
_FIGURES = ("reuse", "ttft_ms_mean", "ttft_ms_p99", "itl_ms_mean")
_BLOCK_SIZE = 64
_BLOCKS = 16_384
_STEP_TOKENS = 8_192
_PEER_PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
_PEER_REPLAY = Path(__file__).with_name("peers") / "trace_replay.py"


@dataclass(frozen=True, slots=True)
class Case:
    """One cluster and one policy."""

    workers: int
    speed: float
    policy: str


def simulate(trace: Path, limit: int | None, case: Case) -> dict[str, float]:
    """Play the trace and return the figures of ours."""
    began = time.perf_counter()
    options = SimulationOptions(workers=case.workers, speed=case.speed, block_size=_BLOCK_SIZE, total_blocks=_BLOCKS)
    blocks = TraceBlocks(read_trace(trace, limit=limit), block_size=_BLOCK_SIZE)
    result = simulate_policy(options, blocks, build_policy(case.policy))
    assert result.ttft_ms.mean is not None
    assert result.ttft_ms.p99 is not None
    return {
        "reuse": round(result.reuse, 4),
        "ttft_ms_mean": round(result.ttft_ms.mean, 1),
        "ttft_ms_p99": round(result.ttft_ms.p99, 1),
        "itl_ms_mean": round(result.itl_ms.mean or 0.0, 3),
        "itl_ms_p99": round(result.itl_ms.p99 or 0.0, 3),
        "e2e_ms_mean": round(result.e2e_ms.mean or 0.0, 1),
        "balance": round(result.balance, 3),
        "wall_s": round(time.perf_counter() - began, 1),
    }


def yardstick(rows: Sequence[TraceRow], workers: int | None) -> dict[str, float]:
    """Return the reuse of one pooled LRU cache, and the times to a first token of prompts that never wait.

    `workers` None: a cache without bounds, which is the floor. Cached is a prompt's last block too as far as the
    workers' own blocks are full, and but for one token, so that no worker finds more than this.
    """
    capacity = sys.maxsize if workers is None else workers * _BLOCKS * _BLOCK_SIZE // BLOCK_TOKENS
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    ttft_ms = []
    for row in rows:
        depth = next((depth for depth, hash_id in enumerate(row.hash_ids) if hash_id not in cache), len(row.hash_ids))
        hits += depth
        for hash_id in reversed(row.hash_ids):
            cache[hash_id] = None
            cache.move_to_end(hash_id)
        while len(cache) > capacity:
            cache.popitem(last=False)
        cached = min(depth * BLOCK_TOKENS, (row.input_length - 1) // _BLOCK_SIZE * _BLOCK_SIZE)
        ttft_ms.append(_prefill_ms(row.input_length - cached))
    ttft = Spread.of(np.array(ttft_ms))
    assert ttft.mean is not None
    assert ttft.p99 is not None
    return {
        "reuse": round(hits / sum(len(row.hash_ids) for row in rows), 4),
        "ttft_ms_mean": round(ttft.mean, 1),
        "ttft_ms_p99": round(ttft.p99, 1),
    }


def _prefill_ms(tokens: int) -> float:
    full, rest = divmod(tokens, _STEP_TOKENS)
    cost = CurvedStepCost()
    return 1000 * sum(
        cost.step_s(decode_sequences=0, decode_blocks=0, prefill_tokens=chunk)
        for chunk in (*[_STEP_TOKENS] * full, rest)
    )


def peer_figures(python: Path, trace: Path, case: Case) -> dict[str, float]:
    """Return the figures of the peer's replay."""
    mode = "round_robin" if case.policy == "round_robin" else "kv_router"
    ran = subprocess.run(
        [str(python), str(_PEER_REPLAY), str(trace), str(case.workers), str(case.speed), mode],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    figures: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Simulate every case, and print them beside the peer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="in Mooncake's format")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--speed", type=float, nargs="+", default=[1.0, 2.0], help="of the trace's times")
    parser.add_argument("--policy", nargs="+", default=list(_POLICIES))
    parser.add_argument("--limit", type=int, help="rows of the trace; leaves the peer out, which takes all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="simulations at once")
    parser.add_argument("--peer-python", type=Path, default=_PEER_PYTHON, help="of the environment with ai-dynamo")
    parser.add_argument("--bounds", action="store_true", help="print yardstick and floor, and simulate nothing")
    given = parser.parse_args()
    if not given.trace.is_file():
        parser.error(f"{given.trace} is not there")
    rows = read_trace(given.trace, limit=given.limit)
    yardsticks = {workers: yardstick(rows, workers) for workers in given.workers}
    floor = yardstick(rows, None)
    if given.bounds:
        show_bounds(yardsticks, floor)
        print(json.dumps({"bench": "quality", "yardstick": yardsticks, "floor": floor}))
        return
    has_peer = given.limit is None and given.peer_python.exists()
    cases = [Case(*each) for each in product(given.workers, given.speed, given.policy)]
    reports = []
    with ProcessPoolExecutor(given.jobs) as pool:
        running = [pool.submit(simulate, given.trace, given.limit, case) for case in cases]
        for case, future in zip(cases, running, strict=True):
            ours = future.result()
            peer = peer_figures(given.peer_python, given.trace, case) if has_peer else None
            ratio = None if peer is None else {name: round(ours[name] / peer[name], 3) for name in _FIGURES}
            reports.append(
                {
                    "params": asdict(case),
                    "ours": ours,
                    "peer": peer,
                    "ratio": ratio,
                    "yardstick": yardsticks[case.workers],
                    "floor": floor,
                }
            )
            print(case, ours, file=sys.stderr, flush=True)
    show(reports)
    print_report("quality", reports)


def show(reports: Sequence[dict[str, Any]]) -> None:
    """Print the table for people."""
    table = Table(title="ours, and in brackets the peer's own replay (round robin, or its router)")
    titles = ("workers", "speed", "policy", "reuse", "of pooled LRU", "TTFT mean ms", "TTFT p99 ms", "ITL mean ms")
    for title in titles:
        table.add_column(title, justify="left" if title == "policy" else "right")
    for report in reports:
        params = report["params"]
        reuse, *times = _cells(report)
        share = report["ours"]["reuse"] / report["yardstick"]["reuse"]
        cells = (params["workers"], params["speed"], params["policy"], reuse, f"{share:.3f}", *times)
        table.add_row(*map(str, cells), end_section=params["policy"] == reports[-1]["params"]["policy"])
    Console(stderr=True, width=140).print(table)


def show_bounds(yardsticks: Mapping[int, Mapping[str, float]], floor: Mapping[str, float]) -> None:
    """Print what one pooled LRU cache would give where nothing waits, and what nothing can pass."""
    table = Table(title="one cache for all workers, and nothing ever waits")
    for title in ("workers", "cache", "reuse", "TTFT mean ms", "TTFT p99 ms"):
        table.add_column(title, justify="left" if title == "cache" else "right")
    lines = [(str(workers), "pooled LRU", figures) for workers, figures in yardsticks.items()]
    for workers, cache, figures in (*lines, ("any", "forgets nothing", floor)):
        times = (f"{figures[name]:,.1f}" for name in ("ttft_ms_mean", "ttft_ms_p99"))
        table.add_row(workers, cache, f"{figures['reuse']:.4f}", *times)
    Console(stderr=True, width=100).print(table)


def _cells(report: dict[str, Any]) -> Iterator[str]:
    for name, digits in zip(_FIGURES, (4, 1, 0, 2), strict=True):
        peer = "" if report["peer"] is None else f" ({report['peer'][name]:,.{digits}f})"
        yield f"{report['ours'][name]:,.{digits}f}{peer}"


if __name__ == "__main__":
    main()
