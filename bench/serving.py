"""What serving costs, beside a peer: HTTP streaming through /v1/chat/completions, CPU of every process of each side.

    make bench                                       ours, and Dynamo where `make bench-peers-install` installed it
    python bench/serving.py --runs 1 --load paced    a part of it, quickly
    python bench/serving.py --profile FILE           ours alone under cProfile, saturated at 64 (slower, of course)
    python bench/serving.py --doors                  our OpenAI API beside our own REST (`peer`), one mesh for both

Both sides serve the same tokenizer with 4 simulated workers and stream one event per token to the same client, in turn:
ours, peer, ours, peer; the figures are medians. See README.md beside this file.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from peers.load import LoadClient, Shape
from peers.model_folder import write_model_folder
from peers.sides import OURS, Pace, Side, dynamo_side, our_side
from reporting import print_report
from rich.console import Console
from rich.table import Table

PEER_PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
FIGURES = ("req_s", "tokens_s", "ttft_ms_p50", "ttft_ms_p99", "cpu_ms_per_request", "events_per_request")
_SATURATED, _PACED = "saturated", "paced"
_MODEL_NAME = "bench"
_REST = "rest"
_MATCHES = 4
_MATCHED_WITHIN = 0.05
"""Attempts at matching the request rates of the sides, and the difference that is good enough."""

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """One load."""

    load: str
    concurrency: int
    requests: int
    pace: Pace = Pace()

    def params(self, shape: Shape, *, workers: int, acknowledges_at_once: bool) -> dict[str, object]:
        """Return what the report says of it."""
        return {
            "load": self.load,
            "concurrency": self.concurrency,
            "requests": self.requests,
            "prompt_tokens": shape.prompt_tokens,
            "output_tokens": shape.output_tokens,
            "workers": workers,
            "our_step_ms": None if self.pace.step_s is None else self.pace.step_s * 1e3,
            "peer_speedup": None if self.pace.step_s is None else round(self.pace.peer_speedup, 3),
            "client_acknowledges_at_once": acknowledges_at_once,
        }

    def with_peer_speedup(self, speedup: float) -> "Case":
        """Return the same case with the peer's steps at another speed."""
        return replace(self, pace=replace(self.pace, peer_speedup=speedup))


# Our steps take this long whatever is in them; the peer's grow with its batches, and are scaled until both sides serve
# as many requests per second.
CASES = (
    Case(_SATURATED, 1, 200),
    Case(_SATURATED, 16, 1000),
    Case(_SATURATED, 64, 1500),
    Case(_PACED, 64, 640, Pace(0.011)),
    Case(_PACED, 256, 1536, Pace(0.019)),
)


class Bench:
    """The sides and the client."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        """Make what both sides are given."""
        self.shape = Shape(_MODEL_NAME)
        self._given = given
        self._work = work
        self._model = write_model_folder(work / "model")
        self._client = LoadClient(work, acknowledges_at_once=not given.ordinary_client)
        self._seed = 0

    def measure_pace(self, cases: Sequence[Case]) -> list[dict[str, list[Figures]]]:
        """Return the figures of each run by side, of cases that have one pace; the sides are started once for all."""
        with ExitStack() as stack:
            sides = [self._start_ours(stack, cases[0].pace)]
            if self._given.doors:
                sides.append(copy.copy(sides[0]))
                sides[1].name = _REST
            elif (peer := self._start_peer(stack, cases[0].pace)) is not None:
                sides.append(peer)
            return [self._measure(case, sides) for case in cases]

    def match_rates(self, case: Case) -> Case:
        """Return the case with the peer's speed at which both sides serve as many requests per second."""
        if case.pace.step_s is None or self._given.doors or not self._given.peer_python.exists():
            return case
        if self._given.peer_speedup is not None:
            return case.with_peer_speedup(self._given.peer_speedup)
        our_rates: list[float] = []  # the pace of ours stays, so that every attempt says more of it
        for _ in range(_MATCHES):
            with ExitStack() as stack:
                side = self._start_peer(stack, case.pace)
                assert side is not None
                our_rates.append(self._rate(case, self._start_ours(stack, case.pace)))
                ours, peer = statistics.median(our_rates), self._rate(case, side)
            _say(f"{case.load} {case.concurrency:4d} matching", {"ours req_s": ours, "peer req_s": peer})
            if abs(peer / ours - 1) < _MATCHED_WITHIN:
                return case
            case = case.with_peer_speedup(case.pace.peer_speedup * ours / peer)
        return case

    def _rate(self, case: Case, side: Side) -> float:
        self._drive(case, side, requests=case.concurrency)  # warm up
        return self._drive(case, side)["req_s"]

    def profile(self, case: Case, file: Path) -> None:
        """Run one case once with ours under cProfile, which writes `file` when the mesh stops."""
        with ExitStack() as stack:
            side = self._start_ours(stack, case.pace, [sys.executable, "-m", "cProfile", "-o", str(file.absolute())])
            self._drive(case, side)

    def _start_ours(self, stack: ExitStack, pace: Pace, prefix: Sequence[str] = ()) -> Side:
        return stack.enter_context(
            our_side(
                self._given.ours, pace=pace, model=self._model, shape=self.shape, workers=self._given.workers,
                work=self._work, prefix=prefix,
            )
        )  # fmt: skip

    def _start_peer(self, stack: ExitStack, pace: Pace) -> Side | None:
        python = self._given.peer_python
        if not python.exists():
            return None
        return stack.enter_context(
            dynamo_side(
                python, pace=pace, model=self._model, shape=self.shape, workers=self._given.workers, work=self._work
            )
        )

    def _measure(self, case: Case, sides: Sequence[Side]) -> dict[str, list[Figures]]:
        for side in sides:  # warm up
            self._drive(case, side, requests=max(case.requests // 4, case.concurrency))
        runs: dict[str, list[Figures]] = {side.name: [] for side in sides}
        for _ in range(self._given.runs):
            for side in sides:
                runs[side.name].append(self._drive(case, side))
                _say(f"{case.load} {case.concurrency:4d} {side.name:8s}", runs[side.name][-1])
        return runs

    def _drive(self, case: Case, side: Side, *, requests: int | None = None) -> Figures:
        requests = requests or case.requests
        self._seed += 1
        cpu_before = side.cpu_s()
        counted = self._client.drive(
            side.port,
            self.shape,
            concurrency=case.concurrency,
            requests=requests,
            seed=self._seed,
            rest=side.name == _REST,
        )
        cpu_s = side.cpu_s() - cpu_before
        return {
            "req_s": requests / counted["wall_s"],
            "tokens_s": counted["token_events"] / counted["wall_s"],
            "ttft_ms_p50": counted["ttft_ms_p50"],
            "ttft_ms_p99": counted["ttft_ms_p99"],
            "cpu_ms_per_request": cpu_s / requests * 1e3,
            "events_per_request": counted["token_events"] / requests,
        }


def main() -> None:
    """Measure every case, ours and the peer's in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each side and case")
    parser.add_argument("--load", choices=[_SATURATED, _PACED], help="default: both")
    parser.add_argument("--concurrency", type=int, help="the cases of this concurrency only")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--ours", default=OURS, metavar="COMMAND", help="our side's command. default: %(default)s")
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="of the environment with ai-dynamo")
    parser.add_argument(
        "--peer-speedup", type=float, help="of its paced steps, 1 = its own. default: where both rates agree"
    )
    parser.add_argument("--ordinary-client", action="store_true", help="leave acknowledgements to the kernel")
    parser.add_argument("--doors", action="store_true", help="compare our OpenAI API with our REST, and no peer")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a profile of ours here and measure nothing")
    given = parser.parse_args()
    cases = [
        case for case in CASES
        if given.load in {None, case.load} and given.concurrency in {None, case.concurrency}
    ]  # fmt: skip
    if not cases:
        parser.error("no case is left")
    with tempfile.TemporaryDirectory(prefix="kvmesh-bench-") as work:
        bench = Bench(given, Path(work))
        if given.profile is not None:
            bench.profile(Case(_SATURATED, 64, 1500), given.profile)
            return
        if not given.doors and not given.peer_python.exists():
            print(f"no peer: {given.peer_python} is not there; `make bench-peers-install` makes it", file=sys.stderr)
        cases = [bench.match_rates(case) for case in cases]
        results = []
        for pace in dict.fromkeys(case.pace for case in cases):
            results += bench.measure_pace([case for case in cases if case.pace == pace])
    reports = [
        _report(case.params(bench.shape, workers=given.workers, acknowledges_at_once=not given.ordinary_client), runs)
        for case, runs in zip(cases, results, strict=True)
    ]
    show(reports)
    print_report("serving", reports)


def _report(params: dict[str, object], runs: dict[str, list[Figures]]) -> dict[str, object]:
    medians = {
        side: {name: round(statistics.median(run[name] for run in of_side), 3) for name in FIGURES}
        for side, of_side in runs.items()
    }
    ours, peer = medians.pop("ours"), next(iter(medians.values()), None)
    if peer is not None and ours["events_per_request"] != peer["events_per_request"]:
        print(f"unequal events per request: {ours} {peer}", file=sys.stderr)
    ratio = None if peer is None else {name: round(ours[name] / peer[name], 3) for name in FIGURES}
    return {"params": params, "ours": ours, "peer": peer, "ratio": ratio}


def _say(what: str, figures: Figures) -> None:
    print(what, " ".join(f"{name} {value:,.2f}" for name, value in figures.items()), file=sys.stderr)


def show(reports: Sequence[dict[str, object]]) -> None:
    """Print the table for people."""
    table = Table(title="ours / peer = ratio (medians)")
    table.add_column("load")
    for name in FIGURES:
        table.add_column(name, justify="right")
    for report in reports:
        params, ours, peer, ratio = report["params"], report["ours"], report["peer"], report["ratio"]
        assert isinstance(params, dict)
        assert isinstance(ours, dict)
        cells = [f"{ours[name]:,.2f}" for name in FIGURES]
        if isinstance(peer, dict) and isinstance(ratio, dict):
            cells = [f"{ours[name]:,.2f} / {peer[name]:,.2f} = {ratio[name]:.2f}" for name in FIGURES]
        table.add_row(f"{params['load']} {params['concurrency']}", *cells)
    Console(stderr=True, width=180).print(table)


if __name__ == "__main__":
    main()
