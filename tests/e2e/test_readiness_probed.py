"""What an orchestrator's probe sees of a worker whose queue is killed, and of one that lives through it."""

import json
import signal

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.mesh_process import WAIT_S, RoleProcess, run_kvmesh
from kvmesh.testing.role_cluster import RoleCluster

pytestmark = [
    pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH"),
    pytest.mark.timeout(180),
]
DECODE, PREFILL = "kvmesh.v1.DecodeWorker", "kvmesh.v1.PrefillWorker"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def probe(process: RoleProcess, service: str) -> int:
    return run_kvmesh("probe", process.grpc_address, "--service", service).returncode


def wait_for(process: RoleProcess, service: str, wanted: int) -> None:
    """Watch a worker's health until it is `wanted`. Raises: grpc.RpcError if it is not within the bound."""
    with grpc.insecure_channel(process.grpc_address) as channel:
        question = health_pb2.HealthCheckRequest(service=service)
        for answer in health_pb2_grpc.HealthStub(channel).Watch(question, timeout=WAIT_S):
            if answer.status == wanted:
                return
    raise AssertionError("the watch ended")


def test_workers_that_lose_their_queue_probe_as_4_and_go_on_answering(cluster: RoleCluster) -> None:
    queue = cluster.serve("queue")
    decode, prefill = cluster.serve("decode"), cluster.serve("prefill")
    frontend = cluster.serve("frontend", "--http-port", "0")
    frontend.wait_logged("role.ready")
    roles = ((decode, DECODE), (prefill, PREFILL))
    for worker, name in roles:
        wait_for(worker, name, SERVING)

    queue.stop(signal.SIGKILL)
    for worker, name in roles:
        wait_for(worker, name, NOT_SERVING)
    probed = [probe(decode, DECODE), probe(decode, "")]
    answer = httpx.post(f"{frontend.http_url}/generate", json={"prompt": "Hi"}, trust_env=False, timeout=WAIT_S)
    metrics = httpx.get(str(decode.logged("role.started")[0]["metrics"]), trust_env=False, timeout=WAIT_S).text
    cluster.serve("queue")
    for worker, name in roles:
        wait_for(worker, name, SERVING)
        worker.wait_logged("worker.has", part="queue")

    assert probed == [4, 0]
    assert answer.status_code == 200, json.dumps(answer.json())
    assert 'kvmesh_workers_lacking{part="queue"} 1.0' in metrics
    assert [len(worker.logged("worker.lacks", part="queue")) for worker, _ in roles] == [1, 1]
    assert [len(worker.logged("worker.has", part="queue")) for worker, _ in roles] == [1, 1]
