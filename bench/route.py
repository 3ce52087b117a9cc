"""What a routing decision costs, beside a peer: both through Python, in turn, on prompts that were never seen before.

    make bench-route                                 every size; the table on stderr, one JSON object on stdout
    python bench/route.py --quick                    256 workers, prompts of 512 and 8,192 tokens
    python bench/route.py --workers 8 1000 --tokens 512 --block-size 16

Figures, in us, medians of the rounds' medians:
    hash_match                 a prompt's tokens -> the cached prefix of every worker
    select                     the same, and the choice of a worker
    reserve_complete_release   the same, booked; then its prefill reported complete, then released
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from peers.route_work import REQUESTS_PER_WORKER, RouteCase, median_us
from reporting import print_report
from rich.console import Console
from rich.table import Table

from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, WorkerId
from kvmesh.core.policies.kv_aware import KvAware
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore
from kvmesh.v1 import generation_pb2

PEER_PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
FIGURES = ("hash_match", "select", "reserve_complete_release")
_EPOCH = Epoch(1)
_MODEL = "m"
_POOL_BLOCKS = 1_000_000

Figures = dict[str, float]


class Ours:
    """The router's core with workers, cached prefixes and a standing load."""

    def __init__(self, case: RouteCase) -> None:
        """Set a case up."""
        self._case = case
        self._index = PrefixIndex()
        self._core = RoutingCore(RouterId("bench"), policy=KvAware(), rng=random.Random(1), index=self._index)
        for number in range(case.workers):
            record = WorkerRecord(
                worker_id=WorkerId(f"bench/decode/{number}"),
                epoch=_EPOCH,
                models=(_MODEL,),
                block_size=case.block_size,
                total_blocks=_POOL_BLOCKS,
            )
            self._core.put_worker(record, now=0)
            for group in case.prefixes_of(number):
                blocks = self._blocks(_wire(case.prefix(group)))
                self._core.apply_kv_stored(
                    record.worker_ranks[0],
                    _EPOCH,
                    parent=None,
                    block_hashes=blocks,
                    local_hashes=blocks.local,
                    now=0,
                )
        standing = [_wire(prompt) for prompt in case.standing_prompts()]
        for number in range(case.workers * REQUESTS_PER_WORKER):
            self._core.reserve(_key(f"standing {number}"), self._query(standing[number % len(standing)]), now=0)

    def measure(self, round_name: str, calls: int) -> Figures:
        """Return the medians of one round."""
        matched, selected, booked = (
            [_wire(prompt) for prompt in self._case.fresh_prompts(f"{round_name} {what}", calls)]
            for what in ("match", "select", "book")
        )
        keys = [_key(f"{round_name} {number}") for number in range(calls)]

        def book(number: int) -> None:
            self._core.reserve(keys[number], self._query(booked[number]), now=0)
            self._core.report_progress(keys[number], prefill_complete=True, now=0)
            self._core.release(keys[number], now=0)

        return {
            "hash_match": median_us(lambda number: self._index.match_masks(self._blocks(matched[number])), calls),
            "select": median_us(lambda number: self._core.select(self._query(selected[number]), now=0), calls),
            "reserve_complete_release": median_us(book, calls),
        }

    def _query(self, tokens: generation_pb2.TokenIds) -> RoutingQuery:
        blocks = self._blocks(tokens)
        return RoutingQuery(
            model=_MODEL, prompt_tokens=len(tokens.token_ids), block_hashes={self._case.block_size: blocks}
        )

    def _blocks(self, tokens: generation_pb2.TokenIds) -> PromptBlocks:
        return PromptBlocks.of_tokens(np.array(tokens.token_ids, dtype=np.uint32), self._case.block_size)


class Peer:
    """The peer's side, in a process of its own environment."""

    def __init__(self, python: Path) -> None:
        """Start it."""
        self._child = subprocess.Popen(
            [str(python), str(Path(__file__).parent / "peers" / "route_peer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def set_up(self, case: RouteCase) -> None:
        """Leave the case before and prepare this one."""
        self._ask({"case": asdict(case)})

    def measure(self, round_name: str, calls: int) -> Figures:
        """Return the medians of one round."""
        return self._ask({"round": round_name, "calls": calls})

    def close(self) -> None:
        """End it."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(timeout=30)

    def _ask(self, question: dict[str, Any]) -> Figures:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(question) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise SystemExit("the peer's process ended; run bench/peers/route_peer.py to see why")
        figures: Figures = json.loads(answer)
        return figures


def measure(case: RouteCase, peer: Peer | None, *, rounds: int, calls: int) -> dict[str, Any]:
    """Measure both sides in turn and return the report of one case."""
    ours = Ours(case)
    if peer is not None:
        peer.set_up(case)
    of_ours, of_peer = [], []
    for number in range(rounds + 1):  # the first round only warms up
        count = calls if number else max(calls // 4, 1)
        of_ours.append(ours.measure(f"round {number}", count))
        if peer is not None:
            of_peer.append(peer.measure(f"round {number}", count))
    our_figures, peer_figures = _medians(of_ours[1:]), _medians(of_peer[1:]) if peer is not None else None
    ratio = None
    if peer_figures is not None:
        ratio = {name: round(our_figures[name] / peer_figures[name], 3) for name in FIGURES}
    return {"params": asdict(case), "ours": our_figures, "peer": peer_figures, "ratio": ratio}


def main() -> None:
    """Measure every case that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--block-size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256, 1000])
    parser.add_argument("--rounds", type=int, default=5, help="of each side and case. default: %(default)s")
    parser.add_argument("--calls", type=int, default=200, help="in a round. default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="256 workers, 512 and 8,192 tokens, 3 rounds")
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="of the environment with ai-dynamo")
    given = parser.parse_args()
    if given.quick:
        given.tokens, given.workers, given.rounds = [512, 8192], [256], 3
    peer = Peer(given.peer_python) if given.peer_python.exists() else None
    if peer is None:
        print(f"no peer: {given.peer_python} is not there; `make bench-peers-install` makes it", file=sys.stderr)
    reports = []
    for workers, tokens, size in product(given.workers, given.tokens, given.block_size):
        began = time.monotonic()
        reports.append(measure(RouteCase(tokens, size, workers), peer, rounds=given.rounds, calls=given.calls))
        print(f"{reports[-1]} in {time.monotonic() - began:.1f} s", file=sys.stderr)
    if peer is not None:
        peer.close()
    show(reports)
    print_report("route", reports)


def show(reports: Sequence[dict[str, Any]]) -> None:
    """Print the table for people."""
    table = Table(title="us: ours / peer = ratio (medians)")
    for name in ("workers", "tokens", "block size", *FIGURES):
        table.add_column(name, justify="right")
    for report in reports:
        params = report["params"]
        cells = [_cell(report, name) for name in FIGURES]
        table.add_row(str(params["workers"]), str(params["tokens"]), str(params["block_size"]), *cells)
    Console(stderr=True, width=120).print(table)


def _cell(report: dict[str, Any], name: str) -> str:
    ours = f"{report['ours'][name]:,.0f}"
    return ours if report["peer"] is None else f"{ours} / {report['peer'][name]:,.0f} = {report['ratio'][name]:.2f}"


def _medians(rounds: Sequence[Figures]) -> Figures:
    return {name: round(statistics.median(each[name] for each in rounds), 1) for name in FIGURES}


def _wire(tokens: Sequence[int]) -> generation_pb2.TokenIds:
    """Return tokens as a request brings them."""
    return generation_pb2.TokenIds(token_ids=tokens)


def _key(name: str) -> AttemptKey:
    return AttemptKey(RequestId(name), 1)


if __name__ == "__main__":
    main()
