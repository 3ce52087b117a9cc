"""What moving KV costs, by transport, between two processes of one host, beside memcpy in the same run.

    make bench-transfer                                          every transport that this machine can run
    python bench/transfer.py --transport nixl --mib 16           a part of it

A source process serves a pool, which lies where the transport wants it; this one pulls scattered blocks of it into its
own. memcpy copies the same blocks of an array of this process into the same places, in turn with the pulls. Figures are
medians; `cpu_ms` is this process's, and says more than `ms` on a machine that has other things to do.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop
from reporting import print_report
from rich.console import Console
from rich.table import Table

from kvmesh.runtime.transport_registry import KINDS, open_transports
from kvmesh.transports.transport import Transport

SIZES_MIB = (1, 16, 64, 256)
_AGENT = "bench/prefill/0@1"
_WARM_UP = 2

Figures = dict[str, float]
Pool = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is moved at a time."""

    mib: int
    blocks: int
    block_bytes: int

    def figures(self, runs: Sequence[tuple[float, float]]) -> Figures:
        """Return what the report says of runs, each of (seconds, seconds of this process's CPU)."""
        median_s, cpu_s = (statistics.median(values) for values in zip(*runs, strict=True))
        return {
            "ms": round(median_s * 1e3, 3),
            "gib_s": round(self.mib / 1024 / median_s, 3),
            "cpu_ms": round(cpu_s * 1e3, 3),
        }


class Stopwatch:
    """Time and this process's CPU time, by lap."""

    def __init__(self) -> None:
        """Start."""
        self._began = self._now()

    def lap(self) -> tuple[float, float]:
        """Return what went by since the last lap."""
        now, began = self._now(), self._began
        self._began = now
        return now[0] - began[0], now[1] - began[1]

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


@dataclass(frozen=True, slots=True)
class Puller:
    """This process's side, of one transport."""

    transport: Transport
    public_name: str
    target: Pool
    copied: Pool
    """What memcpy copies from."""

    async def measure(self, size: Size, *, runs: int) -> tuple[Figures, Figures]:
        """Return the figures of the transport and of memcpy, run in turn."""
        rng = np.random.default_rng(size.mib)
        source_ids: list[int] = rng.permutation(self.target.shape[0])[: size.blocks].tolist()
        target_ids: list[int] = rng.permutation(self.target.shape[0])[: size.blocks].tolist()
        pulled: list[tuple[float, float]] = []
        copied: list[tuple[float, float]] = []
        for _ in range(_WARM_UP + runs):
            watch = Stopwatch()
            for source_id, target_id in zip(source_ids, target_ids, strict=True):
                np.copyto(self.target[target_id], self.copied[source_id])
            copied.append(watch.lap())
            await self.transport.pull(
                self.public_name, source_block_ids=source_ids, target=self.target, target_block_ids=target_ids
            )
            pulled.append(watch.lap())
        return size.figures(pulled[_WARM_UP:]), size.figures(copied[_WARM_UP:])


def open_pool(kind: str, blocks: int, block_bytes: int) -> tuple[Transport | None, Pool]:
    """Open a transport as a worker does, if it can be had, and a pool where it wants it; its pages are taken."""
    memory = open_transports(network=None, host="127.0.0.1", kinds=[kind])
    pool = memory.allocate(blocks, block_bytes)
    pool[:] = 1
    return next(iter(memory.transports), None), pool


async def serve(kind: str, blocks: int, block_bytes: int) -> None:
    """Be the source until stdin ends; prints the public name."""
    transport, pool = open_pool(kind, blocks, block_bytes)
    assert transport is not None
    pool[:] = np.random.default_rng(7).integers(256, size=pool.shape, dtype=np.uint8)
    print(await transport.serve(_AGENT, pool), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await transport.aclose()


@asynccontextmanager
async def puller(kind: str, blocks: int, block_bytes: int) -> AsyncIterator[Puller | None]:
    """Open this side and start a source; None where the transport cannot be had."""
    transport, target = open_pool(kind, blocks, block_bytes)
    if transport is None:
        yield None
        return
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", kind, str(blocks), str(block_bytes),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield Puller(transport, (await child.stdout.readline()).decode().strip(), target, np.ones_like(target))
    finally:
        await transport.aclose()
        child.stdin.close()
        await child.wait()


async def bench(given: argparse.Namespace) -> list[dict[str, object]]:
    """Measure what was asked for."""
    block_bytes = given.block_kib << 10
    per_mib = (1 << 20) // block_bytes
    reports: list[dict[str, object]] = []
    for kind in given.transport:
        async with puller(kind, max(given.mib) * per_mib, block_bytes) as side:
            if side is None:
                print(f"{kind} cannot be had here", file=sys.stderr)
                continue
            for mib in given.mib:
                size = Size(mib, mib * per_mib, block_bytes)
                reports.append(_report(kind, size, *await side.measure(size, runs=given.runs)))
    return reports


def _report(name: str, size: Size, ours: Figures, memcpy: Figures) -> dict[str, object]:
    return {
        "params": {"transport": name, "mib": size.mib, "block_kib": size.block_bytes >> 10},
        "ours": ours,
        "peer": memcpy,
        "ratio": {figure: round(ours[figure] / memcpy[figure], 3) for figure in ours},
    }


def show(reports: Sequence[dict[str, Any]]) -> None:
    """Print the table for people."""
    table = Table(title="KV between two processes of one host (medians)")
    columns = ("transport", "MiB", "ms", "MiB/s", "memcpy ms", "memcpy MiB/s", "rate / memcpy", "CPU ms", "memcpy CPU")
    for column in columns:
        table.add_column(column, justify="left" if column == "transport" else "right")
    for report in reports:
        params, ours, memcpy = report["params"], report["ours"], report["peer"]
        table.add_row(
            params["transport"],
            str(params["mib"]),
            f"{ours['ms']:.2f}",
            f"{ours['gib_s'] * 1024:,.0f}",
            f"{memcpy['ms']:.2f}",
            f"{memcpy['gib_s'] * 1024:,.0f}",
            f"{report['ratio']['gib_s']:.2f}",
            f"{ours['cpu_ms']:.2f}",
            f"{memcpy['cpu_ms']:.2f}",
        )
    Console(stderr=True, width=120).print(table)


def main() -> None:
    """Measure, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21, help="of each transport and size. default: %(default)s")
    parser.add_argument("--transport", nargs="+", choices=KINDS, default=KINDS, help="default: %(default)s")
    parser.add_argument("--mib", type=int, nargs="+", default=SIZES_MIB, help="moved at a time. default: %(default)s")
    parser.add_argument(
        "--block-kib", type=int, default=256, choices=[4, 16, 64, 256, 1024], help="default: %(default)s"
    )
    parser.add_argument("--serve", nargs=3, metavar=("KIND", "BLOCKS", "BYTES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        kind, blocks, block_bytes = given.serve
        uvloop.run(serve(kind, int(blocks), int(block_bytes)))
        return
    reports = uvloop.run(bench(given))
    if not reports:
        parser.error("no case is left")
    show(reports)
    print_report("transfer", reports)


if __name__ == "__main__":
    main()
