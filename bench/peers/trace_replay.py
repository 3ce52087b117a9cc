"""A trace through the peer's own offline replay: its router and its simulated engines in virtual time.

    .venv-peers/bin/python bench/peers/trace_replay.py TRACE WORKERS SPEED MODE

MODE is round_robin or kv_router. Prints one JSON object. Engines as it has them by default: 16,384 blocks of 64 tokens,
8,192 tokens in a step.
"""

import json
import os
import sys

os.environ.setdefault("DYN_LOG", "off")

import dynamo._core as core

_FIGURES = {
    "reuse": "prefix_cache_reused_ratio",
    "ttft_ms_mean": "mean_ttft_ms",
    "ttft_ms_p99": "p99_ttft_ms",
    "itl_ms_mean": "mean_itl_ms",
}


def main(trace: str, workers: str, speed: str, mode: str) -> None:
    """Replay once and print the figures."""
    summary = core.run_mocker_trace_replay(
        [trace],
        num_workers=int(workers),
        router_mode=mode,
        arrival_speedup_ratio=float(speed),
        trace_block_size=512,
    ).summary
    print(json.dumps({ours: round(summary[theirs], 4) for ours, theirs in _FIGURES.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
