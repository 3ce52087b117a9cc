"""Draws what simulations measured; needs matplotlib (the `plot` extra)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvmesh.simulate.result import Numbers, PolicyResult

_WINDOW_SHARE = 50
"""Hit rates are taken over one request in so many of the trace."""
_TAIL = 0.999


def draw(results: Sequence[PolicyResult], path: Path) -> None:
    """Write one figure, its format by the suffix: TTFT and ITL distributions, load and hit rate over time."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # an extra; and slow to import

    figure = Figure(figsize=(12, 8), layout="constrained")
    (ttft, itl), (load, hits) = figure.subplots(2, 2)
    for result in results:
        timeline = result.timeline
        _draw_distribution(ttft, result.policy, timeline.ttft_ms, np.ones(len(timeline.ttft_ms)))
        _draw_distribution(itl, result.policy, timeline.gap_ms, timeline.gap_count)
        busiest, mean = timeline.load.max(axis=1), timeline.load.mean(axis=1)
        (line,) = load.plot(timeline.sampled_s, mean, label=result.policy)
        load.fill_between(timeline.sampled_s, mean, busiest, color=line.get_color(), alpha=0.2)
        hits.plot(*_hit_rate(timeline.arrival_s, timeline.cached, timeline.prompt), label=result.policy)
    _label(ttft, "time to first token", "ms", "share of requests")
    _label(itl, "time between tokens", "ms", "share of tokens")
    _label(load, "load per worker: mean, and up to the busiest", "s", "requests")
    _label(hits, "cached share of prompts", "s", "")
    for axes in (ttft, itl):
        axes.set_xscale("log")  # a tail is tens of times what most get
    figure.savefig(path)


def _draw_distribution(axes: Any, name: str, values: Numbers, counts: Numbers) -> None:
    order = np.argsort(values)
    share = np.cumsum(counts[order])
    if not len(share):
        return
    shown = share <= _TAIL * share[-1]
    axes.plot(values[order][shown], share[shown] / share[-1], label=name)


def _hit_rate(arrival_s: Numbers, cached: Numbers, prompt: Numbers) -> tuple[Numbers, Numbers]:
    starts = np.arange(0, len(prompt), max(len(prompt) // _WINDOW_SHARE, 1))
    return arrival_s[starts], np.add.reduceat(cached, starts) / np.add.reduceat(prompt, starts)


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()
