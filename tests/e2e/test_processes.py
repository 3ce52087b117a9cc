"""`kvmesh up --processes`: every role a process of its own, found through etcd, brought back when it is killed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import httpx
import pytest

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.mesh_process import WAIT_S, MeshProcess, run_kvmesh
from kvmesh.v1 import frontend_pb2

pytestmark = pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH")

ECHO = ("--processes", "--engine", "echo", "--decode", "2", "--prefill", "1")
ETCD = "etcd"
ROLES = {ETCD, "gateway", "queue", "NODE1/decode/0", "NODE2/decode/1", "NODE3/prefill/0"}


def ask(mesh: MeshProcess, prompt: str) -> httpx.Response:
    body = {"prompt": prompt, "request_id": "12345"}
    return httpx.post(f"{mesh.http_url}/generate", json=body, trust_env=False, timeout=WAIT_S)


def pid_of(mesh: MeshProcess, role: str) -> int:
    return int(mesh.logged("process.started", process=role)[-1]["pid"])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def remote_prefills(topology: frontend_pb2.Topology) -> int:
    return topology.counters.remote_prefills


def eventually(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline, f"not so within {WAIT_S:g} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def echo() -> Iterator[MeshProcess]:
    with MeshProcess(*ECHO) as mesh:
        yield mesh


def test_processes_serve_as_one_mesh(echo: MeshProcess) -> None:
    before = echo.topology()

    answer = ask(echo, "Tell me a joke").json()

    assert answer["worker_output"].startswith("Tell me a joke_GeneratedBy_NODE")
    assert {worker.id for worker in before.workers} == {"NODE1/decode/0", "NODE2/decode/1", "NODE3/prefill/0"}
    assert remote_prefills(echo.topology()) == remote_prefills(before) + 1
    assert echo.logged("prefill.leased", process="NODE3/prefill/0")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("role", sorted(ROLES))
def test_role_that_is_killed_comes_back_and_the_mesh_is_whole_again(echo: MeshProcess, role: str) -> None:
    os.kill(pid_of(echo, role), signal.SIGKILL)

    echo.wait_logged("process.died", process=role, exit=-signal.SIGKILL)
    echo.wait_logged("process.started", process=role, times=2)
    if role != ETCD:  # which says nothing of the kind
        echo.wait_logged("role.ready", process=role, times=2)
    eventually(partial(_answers, echo, f"after {role}"))
    eventually(partial(_is_whole, echo))


def test_router_and_processor_on_their_own_serve_as_well_and_all_end_together() -> None:
    with MeshProcess(*ECHO, "--router", "separate", "--processor", "separate") as mesh:
        pids = {str(line["process"]): int(line["pid"]) for line in mesh.logged("process.started")}
        answer = ask(mesh, "Tell me a joke").json()
        code = mesh.stop(signal.SIGINT)

    assert pids.keys() == ROLES | {"router", "processor"}
    assert answer["worker_output"].startswith("Tell me a joke_GeneratedBy_NODE")
    assert code == 0
    assert [role for role, pid in pids.items() if is_alive(pid)] == []
    assert mesh.stray_lines == []


def test_nothing_outlives_a_supervisor_that_is_killed() -> None:
    with MeshProcess("--processes", "--engine", "echo", "--decode", "1", "--prefill", "0") as mesh:
        pids = [int(line["pid"]) for line in mesh.logged("process.started")]
        assert len(pids) >= 3  # the store among them, which ends otherwise than what is ours

        mesh.stop(signal.SIGKILL)

        eventually(lambda: not any(is_alive(pid) for pid in pids))


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


def _answers(mesh: MeshProcess, prompt: str) -> bool:
    try:
        answer = ask(mesh, prompt)
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.json()["worker_output"].startswith(f"{prompt}_GeneratedBy_")


def _is_whole(mesh: MeshProcess) -> bool:
    """Tell whether every role is there with its live incarnation: an answer comes, and its prefill went remote."""
    before = mesh.topology()
    if len(before.workers) < 3 or {worker.state for worker in before.workers} != {frontend_pb2.WORKER_STATE_READY}:
        return False
    return _answers(mesh, "whole?") and remote_prefills(mesh.topology()) > remote_prefills(before)
