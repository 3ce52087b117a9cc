"""What an orchestrator's probe sees of a worker whose queue is killed, and of one that lives through it."""

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.etcd_server import EtcdServer
from kvmesh.testing.mesh_process import WAIT_S, RoleProcess, run_kvmesh

pytestmark = [
    pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH"),
    pytest.mark.timeout(180),
]
DECODE, PREFILL = "kvmesh.v1.DecodeWorker", "kvmesh.v1.PrefillWorker"


class Cluster:
    """Roles over one store; all of them end with the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._store = f"etcd://{stack.enter_context(EtcdServer()).endpoint}"

    def serve(self, role: str, *flags: str) -> RoleProcess:
        return self._stack.enter_context(RoleProcess(role, "--discovery", self._store, *flags))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)


def probe(process: RoleProcess, service: str) -> int:
    return run_kvmesh("probe", process.grpc_address, "--service", service).returncode


def status(process: RoleProcess, service: str) -> str:
    """Ask as a probe does, without starting a program."""
    with grpc.insecure_channel(process.grpc_address) as channel:
        question = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(channel).Check(question, timeout=WAIT_S)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_workers_that_lose_their_queue_probe_as_4_and_go_on_answering(cluster: Cluster) -> None:
    queue = cluster.serve("queue")
    decode, prefill = cluster.serve("decode"), cluster.serve("prefill")
    frontend = cluster.serve("frontend", "--http-port", "0")
    frontend.wait_logged("role.ready")
    prefill.wait_logged("prefill.attached")
    before = [status(decode, DECODE), status(prefill, PREFILL)]

    queue.stop(signal.SIGKILL)
    for worker in (decode, prefill):
        worker.wait_logged("worker.lacks", part="queue")
    lost = [status(decode, DECODE), status(prefill, PREFILL)]
    alive = [status(worker, name) for worker in (decode, prefill) for name in ("", "liveness")]
    probed = [probe(decode, DECODE), probe(decode, "liveness")]
    answer = httpx.post(f"{frontend.http_url}/generate", json={"prompt": "Hi"}, trust_env=False, timeout=WAIT_S)
    metrics = httpx.get(str(decode.logged("role.started")[0]["metrics"]), trust_env=False, timeout=WAIT_S).text
    cluster.serve("queue")
    for worker in (decode, prefill):
        worker.wait_logged("worker.has", part="queue")
    back = [status(decode, DECODE), status(prefill, PREFILL)]

    assert (before, lost, back) == (["SERVING"] * 2, ["NOT_SERVING"] * 2, ["SERVING"] * 2)
    assert alive == ["SERVING"] * 4
    assert probed == [4, 0]
    assert answer.status_code == 200, json.dumps(answer.json())
    assert 'kvmesh_workers_lacking{part="queue"} 1.0' in metrics
