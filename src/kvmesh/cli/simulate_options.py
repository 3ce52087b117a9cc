"""What `kvmesh simulate` takes."""

from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cli.options import within
from kvmesh.simulate.options import CostModel, Order

UNBOUNDED = "unbounded"
DEFAULT_POLICIES = ("round_robin", "kv_aware", "least_work")
_MAX_WORKERS = 10_000

Trace = Annotated[
    Path,
    typer.Argument(
        metavar="TRACE",
        help="Mooncake format: a JSON object per line with timestamp (ms), input_length, output_length, hash_ids.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", metavar="N", help=f"Decode workers; 1 to {_MAX_WORKERS}.", callback=within(1, _MAX_WORKERS)
    ),
]
PrefillWorkers = Annotated[
    int,
    typer.Option(
        "--prefill",
        metavar="N",
        help=f"Prefill workers, fed by the prefill queue; up to {_MAX_WORKERS}.",
        callback=within(0, _MAX_WORKERS),
    ),
]
Blocks = Annotated[str, typer.Option("--blocks", metavar="N|unbounded", help="KV blocks of each worker.")]
BlockSize = Annotated[
    int, typer.Option("--block-size", metavar="TOKENS", min=1, help="Tokens in a block; it divides 512.")
]
RequestOrder = Annotated[
    Order, typer.Option("--order", help="time: at their times; file: each ends before the next, no queueing.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of what the policies draw.")]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="P",
        help=f"A name, or MODULE:CLASS; may be repeated. default: {' '.join(DEFAULT_POLICIES)}",
    ),
]
PolicyOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--policy-option", metavar="KEY=VALUE", help="One option, for the policies that have it; may be repeated."
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N requests.")]
Cost = Annotated[
    CostModel, typer.Option("--cost", help="Step times: curved compares with other simulators; linear: our engine.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw the distributions, load and hit rate (png, svg)."),
]
