"""A trace runs while parts of the mesh are killed: every request gets an answer, and most do not notice."""

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.etcd_server import EtcdServer
from kvmesh.testing.mesh_process import PROGRAM, WAIT_S, MeshProcess, clean_environment

pytestmark = [
    pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH"),
    pytest.mark.timeout(240),
]

ROWS = 120
EVERY_MS = 100
OUTPUT_TOKENS = 24
SIMULATED = ("--processes", "--engine", "simulated", "--speedup", "20", "--decode", "2", "--prefill", "1")
SERVED_BEFORE = 5
"""Prefills of a replay that are done before anything is killed: it runs."""
TTL_S = 2
TRACES = itertools.count()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twelve seconds of requests; each shares its first 512 tokens with seven others, and with no other trace."""
    first = next(TRACES) * 2 * ROWS
    rows = [
        {
            "timestamp": number * EVERY_MS,
            "input_length": 1_000,
            "output_length": OUTPUT_TOKENS,
            "hash_ids": [first + number // 8, first + ROWS + number],
        }
        for number in range(ROWS)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Replay:
    """A replay that runs; `result` once it has ended."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def result(self) -> dict[str, Any]:
        out, err = self._process.communicate(timeout=WAIT_S)
        assert out, err
        found: dict[str, Any] = json.loads(out)
        return found


@contextmanager
def replaying(mesh: MeshProcess, trace: Path) -> Iterator[Replay]:
    """Replay a trace, well begun when the block does; nobody replays any more after it."""
    served = len(mesh.logged("prefill.completed"))
    process = subprocess.Popen(
        [PROGRAM, "replay", str(trace), "--json", "--target", mesh.grpc_address],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        mesh.wait_logged("prefill.completed", times=served + SERVED_BEFORE)
        yield Replay(process)
    finally:
        process.kill()
        process.communicate()


def kill(mesh: MeshProcess, role: str) -> None:
    """Kill a role and wait until it is started again."""
    starts = mesh.logged("process.started", process=role)
    os.kill(int(starts[-1]["pid"]), signal.SIGKILL)
    mesh.wait_logged("process.started", process=role, times=len(starts) + 1)


@pytest.fixture(scope="module")
def store() -> Iterator[EtcdServer]:
    with EtcdServer() as etcd:
        yield etcd


@pytest.fixture(scope="module")
def mesh(store: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcess]:
    config = tmp_path_factory.mktemp("mesh") / "mesh.toml"
    config.write_text(f"[discovery]\nttl_s = {TTL_S}\n")
    with MeshProcess(*SIMULATED, "--discovery", f"etcd://{store.endpoint}", "--config", str(config)) as mesh:
        yield mesh


def test_killed_workers_queue_and_router_lose_nobody(trace: Path) -> None:
    with MeshProcess(*SIMULATED, "--router", "separate") as mesh, replaying(mesh, trace) as replay:
        for role in ("queue", "NODE3/prefill/0", "router", "NODE1/decode/0"):
            kill(mesh, role)
        was_running = replay.is_running
        result = replay.result()

    assert was_running, "the kills came too late to disturb anybody"
    assert (result["requests"], result["lost"], result["duplicated"]) == (ROWS, 0, 0)
    # Only those whose output came from the killed worker already cannot begin anew elsewhere.
    assert set(result["error_reasons"]) <= {"WORKER_LOST"}
    assert result["errors"] <= 10


def test_a_store_that_is_away_for_longer_than_its_leases_fails_no_request(
    store: EtcdServer, mesh: MeshProcess, trace: Path
) -> None:
    started = mesh.logged("process.started")
    with replaying(mesh, trace) as replay:
        store.kill()
        time.sleep(3 * TTL_S)  # every lease would have run out: this is the outage, and not a wait for something
        is_away_under_load = replay.is_running
        store.start()
        result = replay.result()

    assert is_away_under_load
    assert (result["requests"], result["lost"], result["errors"], result["duplicated"]) == (ROWS, 0, 0, 0)
    assert mesh.logged("process.started") == started


def test_a_killed_gateway_breaks_what_it_held_and_serves_again(mesh: MeshProcess, trace: Path) -> None:
    with replaying(mesh, trace) as replay:
        kill(mesh, "gateway")
        was_running = replay.is_running
        result = replay.result()

    assert was_running
    assert (result["requests"], result["lost"], result["duplicated"]) == (ROWS, 0, 0)
    assert set(result["error_reasons"]) <= {"UNAVAILABLE", "NO_WORKERS"}
    assert result["requests"] - result["errors"] > ROWS // 4
