"""The probes of the Kubernetes manifests, asked of the roles themselves."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.runtime.served_role import ROLES, ServedRole
from kvmesh.runtime.settings import load_settings
from kvmesh.testing.etcd_server import EtcdServer

ANSWER_S = 10.0
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.mark.parametrize("role", ROLES)
async def test_the_probes_of_a_role_find_it_serving(
    role: str, root: Path, kustomized: Callable[[Path], list[dict[str, Any]]], etcd: EtcdServer
) -> None:
    (container,) = next(
        each["spec"]["template"]["spec"]["containers"]
        for each in kustomized(root / "deploy/kubernetes/base")
        if each["kind"] == "Deployment" and each["metadata"]["name"] == f"kvmesh-{role}"
    )
    here = {
        "discovery.store": f"etcd://127.0.0.1:{etcd.client_port}",
        **dict.fromkeys(("grpc.host", "http.host", "process.host"), "127.0.0.1"),
        **dict.fromkeys(("grpc.port", "http.port", "process.port", "process.metrics_port"), 0),
    }
    loaded = load_settings(config_file=root / "deploy/kubernetes/base/kvmesh.toml", overrides=here)
    needed = [ServedRole("queue", loaded.settings)] if role == "prefill" else []
    served = ServedRole(role, loaded.settings)
    try:
        for each in (*needed, served):
            await each.start()
        if needed:
            async with asyncio.timeout(ANSWER_S):
                await served.wait_ready()
        async with grpc.aio.insecure_channel(served.addresses["grpc"]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            services = [container[probe]["grpc"].get("service", "") for probe in PROBES]
            asked = [health_pb2.HealthCheckRequest(service=service) for service in services]
            answers = await asyncio.gather(*(health.Check(each, timeout=ANSWER_S) for each in asked))
    finally:
        for each in (served, *needed):
            await each.stop()

    assert [answer.status for answer in answers] == [health_pb2.HealthCheckResponse.SERVING] * len(PROBES)
