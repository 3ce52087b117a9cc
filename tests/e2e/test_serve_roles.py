"""`kvmesh serve ROLE`: a mesh put together by hand, as on many machines, over an etcd of its own."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from kvmesh.core.waits import Waits
from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.etcd_server import EtcdServer
from kvmesh.testing.mesh_process import WAIT_S, RoleProcess
from kvmesh.testing.role_cluster import RoleCluster

pytestmark = [
    pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH"),
    pytest.mark.timeout(180),
]


def ask(frontend: RoleProcess, prompt: str) -> httpx.Response:
    return httpx.post(f"{frontend.http_url}/generate", json={"prompt": prompt}, trust_env=False, timeout=WAIT_S)


def eventually(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline, f"not so within {WAIT_S:g} s"
        time.sleep(0.05)


def test_roles_served_one_by_one_find_each_other_and_serve(cluster: RoleCluster) -> None:
    cluster.serve("queue")
    cluster.serve("router")
    cluster.serve("processor", "--router", "separate")
    cluster.serve("decode", "--node", "rack1")
    prefill = cluster.serve("prefill", "--node", "rack2")
    frontend = cluster.serve("frontend", "--http-port", "0", "--processor", "separate", "--router", "separate")
    frontend.wait_logged("role.ready")
    prefill.wait_logged("role.ready")

    answer = ask(frontend, "Tell me a joke")

    assert answer.json()["worker_output"] == "Tell me a joke_GeneratedBy_rack1"
    assert prefill.wait_logged("prefill.completed")["worker_id"] == "rack2/prefill/0"


def test_role_whose_store_is_away_is_ready_only_once_it_is_registered() -> None:
    with EtcdServer() as etcd:
        endpoint = etcd.endpoint
        etcd.kill()
        with RoleProcess("decode", "--engine", "echo", "--discovery", f"etcd://{endpoint}") as process:
            process.wait_logged("registration.pending")
            early = process.logged("role.ready")
            etcd.start()
            process.wait_logged("role.ready")
            order = [line["event"] for line in process.log if line["event"] in {"discovery.reached", "role.ready"}]

    assert early == []
    assert order[-1] == "role.ready"
    assert "discovery.reached" in order


def test_each_role_shows_its_metrics_and_its_health(cluster: RoleCluster) -> None:
    queue = cluster.serve("queue")

    metrics = httpx.get(queue.wait_logged("role.started")["metrics"], trust_env=False, timeout=WAIT_S)

    assert "kvmesh_queue_depth 0.0" in metrics.text
    assert queue.stop() == 0


def test_of_two_queues_the_second_takes_over_when_the_first_is_killed(cluster: RoleCluster) -> None:
    first = cluster.serve("queue", "--index", "0")
    second = cluster.serve("queue", "--index", "1")
    cluster.serve("decode")
    prefill = cluster.serve("prefill")
    frontend = cluster.serve("frontend", "--http-port", "0")
    frontend.wait_logged("role.ready")
    prefill.wait_logged("role.ready")
    assert ask(frontend, "one").status_code == 200
    assert first.logged("queue.worker_attached")
    assert second.logged("queue.worker_attached") == []

    os.kill(first.pid, signal.SIGKILL)
    second.wait_logged("queue.worker_attached")
    done = len(prefill.logged("prefill.completed"))
    eventually(lambda: ask(frontend, "two").status_code == 200 and len(prefill.logged("prefill.completed")) > done)


def ready(frontend: RoleProcess) -> int:
    return httpx.get(f"{frontend.http_url}/readyz", trust_env=False, timeout=WAIT_S).status_code


def test_frontend_whose_only_worker_is_killed_is_unready_while_its_record_still_stands(cluster: RoleCluster) -> None:
    worker = cluster.serve("decode")
    frontend = cluster.serve("frontend", "--http-port", "0", "--grpc-host", "127.0.0.1", "--grpc-port", "0")
    frontend.wait_logged("role.ready")
    before = (ask(frontend, "Hi").status_code, ready(frontend))

    os.kill(worker.pid, signal.SIGKILL)
    eventually(lambda: ready(frontend) == 503)
    suspected = frontend.logged("worker.suspect")
    cluster.serve("decode", "--index", "1")
    eventually(lambda: ready(frontend) == 200)

    assert before == (200, 200)
    assert suspected == []  # so it was known before the record went
    assert ask(frontend, "Hi").status_code == 200


def test_what_waits_on_a_worker_that_hangs_goes_elsewhere_once_it_is_known_to(
    cluster: RoleCluster, tmp_path: Path
) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text("[discovery]\nttl_s = 2\n")
    flags = ("--config", str(config))
    cluster.serve("queue", *flags)
    workers = [cluster.serve("decode", "--index", str(index), *flags) for index in range(2)]
    frontend = cluster.serve("frontend", "--http-port", "0", "--policy", "round_robin", *flags)
    frontend.wait_logged("role.ready")
    eventually(lambda: len(frontend.logged("worker.followed")) == 2)

    os.kill(workers[0].pid, signal.SIGSTOP)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: ask(frontend, f"prompt {number}"), range(4)))

    assert [answer.status_code for answer in answers] == [200] * 4
    assert max(answer.elapsed.total_seconds() for answer in answers) < Waits().first_token_s
    assert frontend.logged("request.retried")


def test_of_two_workers_with_one_id_the_earlier_serves_again_when_the_later_is_gone(
    cluster: RoleCluster, tmp_path: Path
) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text("[discovery]\nttl_s = 2\n")
    cluster.serve("queue")
    earlier = cluster.serve("decode", "--config", str(config))
    frontend = cluster.serve("frontend", "--http-port", "0")
    frontend.wait_logged("role.ready")

    later = cluster.serve("decode", "--config", str(config))
    said = earlier.wait_logged("registration.superseded")
    assert later.stop() == 0
    earlier.wait_logged("registration.back")

    assert "--index" in said["fix"]
    eventually(lambda: ask(frontend, "Tell me a joke").status_code == 200)


def test_a_port_that_is_taken_says_what_to_do(cluster: RoleCluster) -> None:
    queue = cluster.serve("queue")
    _, _, port = str(queue.wait_logged("role.started")["metrics"]).removesuffix("/metrics").rpartition(":")

    with pytest.raises(AssertionError, match="choose another port with --metrics-port"):
        cluster.serve("queue", "--index", "1", "--metrics-port", port)
