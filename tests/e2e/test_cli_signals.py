"""How a mesh process ends: what signals do to it and to what runs on it, and what it leaves on stderr."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest

from kvmesh.cli.calls import failure_text
from kvmesh.testing.mesh_process import PROGRAM, WAIT_S, MeshProcess, clean_environment
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2

SLOW_ENGINE = ("--engine", "simulated", "--engine-option", "step_base_s=0.05")
ENDLESS = 100_000
"""Tokens that take the slow engine longer than any test waits."""


@contextmanager
def running_stream(mesh: MeshProcess, *, max_tokens: int) -> Iterator[Iterator[frontend_pb2.GenerateResponse]]:
    """A generation of which the first token has arrived; yields what follows."""
    request = frontend_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(text="hello"), sampling=generation_pb2.SamplingParams(max_tokens=max_tokens)
    )
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        stream = iter(frontend_pb2_grpc.FrontendStub(channel).Generate(request, timeout=WAIT_S))
        while next(stream).WhichOneof("event") != "chunk":
            pass
        yield stream


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_mesh_with_0_and_nothing_but_log_lines(number: signal.Signals) -> None:
    with MeshProcess("--engine", "echo") as mesh:
        answer = httpx.post(f"{mesh.http_url}/generate", json={"prompt": "hello"}, timeout=WAIT_S, trust_env=False)

        assert answer.status_code == 200
        assert mesh.stop(number) == 0
        assert len(mesh.logged("mesh.stopping")) == 1
        assert [line for line in mesh.log if line["level"] != "info"] == []
        assert mesh.stray_lines == []


def test_a_stream_that_runs_at_sigterm_is_finished_before_the_process_ends() -> None:
    with MeshProcess(*SLOW_ENGINE) as mesh, running_stream(mesh, max_tokens=40) as stream:
        mesh.send_signal(signal.SIGTERM)
        mesh.wait_logged("mesh.stopping")
        *_, last = stream

        assert last.WhichOneof("event") == "finished"
        assert last.finished.usage.completion_tokens == 40
        assert mesh.wait() == 0
        assert mesh.stray_lines == []


def test_a_stream_longer_than_the_drain_is_ended_as_draining(tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text("waits.drain_s = 0.5\n")
    with (
        MeshProcess(*SLOW_ENGINE, "--config", str(config)) as mesh,
        running_stream(mesh, max_tokens=ENDLESS) as stream,
    ):
        mesh.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as failure:
            list(stream)

        assert failure_text(failure.value, mesh.grpc_address).startswith("DRAINING: ")
        assert mesh.wait() == 0
        assert mesh.stray_lines == []


def test_a_second_signal_ends_the_process_at_once() -> None:
    with MeshProcess(*SLOW_ENGINE) as mesh, running_stream(mesh, max_tokens=ENDLESS):
        mesh.send_signal(signal.SIGTERM)
        mesh.wait_logged("mesh.stopping")

        assert mesh.stop(signal.SIGINT) == 130
        assert mesh.stray_lines == []


def test_ctrl_c_in_generate_cancels_the_request_everywhere() -> None:
    with MeshProcess(*SLOW_ENGINE) as mesh:
        client = subprocess.Popen(
            [PROGRAM, "generate", "hello", "--max-tokens", f"{ENDLESS}", "--target", mesh.grpc_address],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert client.stdout is not None
            client.stdout.read(1)
            client.send_signal(signal.SIGINT)
            _, err = client.communicate(timeout=WAIT_S)
        finally:
            client.kill()

        topology = _wait_until_idle(mesh)
        assert (client.returncode, err) == (130, "")
        assert (topology.counters.requests, topology.counters.cancelled) == (1, 1)
        assert [worker.active_blocks for worker in topology.workers] == [0, 0, 0]
        assert mesh.stop() == 0
        assert mesh.stray_lines == []


def _wait_until_idle(mesh: MeshProcess) -> frontend_pb2.Topology:
    """Watch the mesh until nothing runs on it. Raises: grpc.RpcError at the deadline."""
    request = frontend_pb2.WatchTopologyRequest()
    request.interval.FromMilliseconds(100)
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        for response in frontend_pb2_grpc.FrontendStub(channel).WatchTopology(request, timeout=WAIT_S):
            topology = response.topology
            if not topology.counters.running and not any(worker.active_requests for worker in topology.workers):
                return topology
    raise AssertionError("the watch ended by itself")
