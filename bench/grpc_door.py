"""What serving costs through the gRPC door: CPU seconds of a whole mesh in one process, at a fixed concurrency.

    make bench-grpc                                     the table, and one JSON object on stdout
    python bench/grpc_door.py --profile grpc_door.prof  the same once, under cProfile (the figures are then slower)

The mesh runs `--engine simulated --speedup 0`: what is measured is the mesh and not a model. Load comes from this
process in a closed loop: each of `--concurrency` clients sends its next request when one has ended.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from reporting import print_report
from rich.console import Console
from rich.table import Table

from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2

_READY_S = 30.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent."""

    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int


class MeshProcess:
    """`kvmesh up` as a child, on free ports."""

    def __init__(self, *, profile: Path | None) -> None:
        """Start it and wait until it is ready."""
        program = [sys.executable, *(["-m", "cProfile", "-o", str(profile)] if profile else [])]
        self._child = subprocess.Popen(
            [
                *program, str(Path(sys.executable).with_name("kvmesh")), "up",
                "--engine", "simulated", "--speedup", "0", "--decode", "2", "--prefill", "0",
                "--http-port", "0", "--grpc-port", "0", "--log-format", "json",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.http, self.grpc = self._wait_ready()

    def _wait_ready(self) -> tuple[str, str]:
        assert self._child.stderr is not None
        until = time.monotonic() + _READY_S
        for line in self._child.stderr:
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "mesh.ready":
                return event["http"], event["grpc"]
            if time.monotonic() > until:
                break
        raise SystemExit("the mesh did not become ready")

    def cpu_s(self) -> float:
        """Return the CPU seconds of all of its threads so far."""
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS

    def stop(self) -> None:
        """End it."""
        self._child.terminate()
        self._child.communicate(timeout=60)


def prompts(load: Load, *, seed: int) -> list[str]:
    """Return prompts of `prompt_tokens` bytes (the simulated engine's default tokenizer has one token per byte)."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=load.prompt_tokens)) for _ in range(load.requests)]


async def drive(load: Load, send: Callable[[str], Awaitable[int]], texts: list[str]) -> int:
    """Send every prompt, `concurrency` at a time; return the tokens that came back."""
    left, tokens = iter(texts), 0

    async def client() -> None:
        nonlocal tokens
        for text in left:
            count = await send(text)  # apart from the sum, which others change meanwhile
            tokens += count

    async with asyncio.TaskGroup() as group:
        for _ in range(load.concurrency):
            group.create_task(client())
    return tokens


async def over_grpc(mesh: MeshProcess, load: Load, texts: list[str]) -> int:
    """Drive Frontend.Generate."""
    async with grpc.aio.insecure_channel(mesh.grpc) as channel:
        stub = frontend_pb2_grpc.FrontendStub(channel)

        async def send(text: str) -> int:
            request = frontend_pb2.GenerateRequest(
                prompt=generation_pb2.Prompt(text=text),
                sampling=generation_pb2.SamplingParams(max_tokens=load.output_tokens),
            )
            count = 0
            async for response in stub.Generate(request, timeout=60):
                if response.WhichOneof("event") == "chunk":
                    count += len(response.chunk.token_ids)
            return count

        return await drive(load, send, texts)


def measure(load: Load, *, profile: Path | None = None) -> dict[str, float]:
    """Run one load against a fresh mesh, after a warm-up of a tenth of it."""
    mesh = MeshProcess(profile=profile)
    try:
        texts = prompts(load, seed=1)
        asyncio.run(over_grpc(mesh, load, texts[: max(load.requests // 10, load.concurrency)]))
        cpu_before, began = mesh.cpu_s(), time.perf_counter()
        tokens = asyncio.run(over_grpc(mesh, load, prompts(load, seed=2)))
        wall_s, cpu_s = time.perf_counter() - began, mesh.cpu_s() - cpu_before
    finally:
        mesh.stop()
    if tokens != load.requests * load.output_tokens:
        raise SystemExit(f"{tokens} tokens came back of {load.requests * load.output_tokens}")
    return {
        "cpu_us_per_token": cpu_s / tokens * 1e6,
        "cpu_ms_per_request": cpu_s / load.requests * 1e3,
        "tokens_per_s": tokens / wall_s,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
    }


def main() -> None:
    """Measure it several times and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="run once under cProfile and write the profile here")
    given = parser.parse_args()
    load = Load(given.requests, given.concurrency, given.prompt_tokens, given.output_tokens)
    if given.profile is not None:
        measure(load, profile=given.profile)
        return
    runs = [measure(load) for _ in range(given.runs)]
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    show(medians)
    print_report("grpc_door", [{"params": asdict(load), "ours": medians, "peer": None, "ratio": None}])


def show(medians: dict[str, float]) -> None:
    """Print the table for people."""
    table = Table(title="one mesh in one process, gRPC, simulated engine at speedup 0 (medians)")
    for name in medians:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:,.1f}" for value in medians.values()))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
