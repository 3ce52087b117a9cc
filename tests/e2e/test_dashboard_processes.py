"""The dashboard of a mesh of processes, of which one is killed."""

import os
import signal

import pytest

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.chromium import find_chromium, running_chromium
from kvmesh.testing.mesh_process import MeshProcess

pytestmark = [
    pytest.mark.timeout(120),  # five processes are started, and one of them twice
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: make install-chromium"),
    pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH"),
]

KILLED = "NODE2/decode/1"
STATE = f"document.querySelector('[data-worker=\"{KILLED}\"] .state')?.textContent"
EVENTS = "document.getElementById('events').textContent"


async def test_a_killed_worker_is_seen_to_go_and_to_come_back() -> None:
    with MeshProcess("--processes", "--engine", "echo", "--decode", "2", "--prefill", "0") as mesh:
        announced = mesh.wait_logged("mesh.ready")["dashboard"]
        async with running_chromium() as chromium:
            page = await chromium.open(announced, width=1280, height=900)
            await page.wait_for(f"{STATE} == 'ready'")

            os.kill(int(mesh.logged("process.started", process=KILLED)[-1]["pid"]), signal.SIGKILL)
            await page.wait_for(f"/{KILLED.replace('/', '.')} (is gone|is suspect|was started anew)/.test({EVENTS})")
            await page.wait_for(f"/{KILLED.replace('/', '.')} (is back|is ready|was started anew)/.test({EVENTS})")
            await page.wait_for(f"{STATE} == 'ready'")
            faults = page.faults
        code = mesh.stop()

    assert announced == f"{mesh.http_url}/"
    assert faults == []
    assert code == 0
