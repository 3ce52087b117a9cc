"""A graph with a process per worker: GPUs of their own, restarts, the end; and components that join a mesh by etcd."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.runtime.component_config import read_config
from kvmesh.runtime.component_graph import ComponentGraph
from kvmesh.runtime.served_role import ServedRole
from kvmesh.runtime.settings import load_settings
from kvmesh.sdk import Runtime, connect, endpoint, service
from kvmesh.sdk.client import Client
from kvmesh.sdk.dependencies import graph_of
from kvmesh.testing.etcd_server import EtcdServer
from kvmesh.testing.mesh_process import LoggingProcess, run_kvmesh

pytestmark = pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH")

BOUND_S = 40.0
MODULE = """
import os
from pydantic import BaseModel
from kvmesh.sdk import context, depends, endpoint, on_shutdown, service


class Ask(BaseModel):
    name: str = ""


class Seen(BaseModel):
    pid: int
    gpus: str
    greeting: str
    worker_id: str


@service(namespace="lab", resources={"gpu": 1})
class Worker:
    @endpoint()
    async def look(self, request: Ask) -> Seen:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        return Seen(pid=os.getpid(), gpus=gpus, greeting=context.config["greeting"], worker_id=context.worker_id)

    @on_shutdown
    async def leave(self) -> None:
        open(f"left-{os.getpid()}", "w").close()


@service(namespace="lab")
class Entry:
    worker = depends(Worker)

    @endpoint()
    async def look(self, request: Ask) -> Seen:
        return await self.worker.look(request)
"""


class Text(BaseModel):
    text: str


@service(namespace="guests")
class Guest:
    @endpoint()
    async def reverse(self, request: Text) -> Text:
        return Text(text=request.text[::-1])


class GraphProcess(LoggingProcess):
    """The graph of the module above, with two workers, by its command."""

    def __init__(self) -> None:
        doors = ("--http-port", "0", "--grpc-port", "0", "--node", "N")
        told = ("--Worker.workers=2", "-f", "graph.yaml")
        super().__init__("serve", "lab_graph:Entry", *doors, *told, ready_event="role.ready")

    @property
    def doors(self) -> dict[str, Any]:
        """Where it is reached, as it logged before it was ready."""
        return self.logged("role.started", name="lab_graph:Entry")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab_graph.py").write_text(MODULE)
    (folder / "graph.yaml").write_text("Worker:\n  greeting: welcome\n")
    return folder


@pytest.fixture
def graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GraphProcess]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with GraphProcess() as process:
        process.wait_logged("role.started", name="lab_graph:Entry")
        yield process


async def looks(client: Client, count: int) -> list[dict[str, Any]]:
    return [answer for _ in range(count) async for answer in await client.generate({})]


async def kill_and_wait_back(runtime: Runtime, pid: int) -> None:
    """Kill one of the two workers and wait until another process of its is known."""
    before = epochs(runtime)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(BOUND_S):
        while len(epochs(runtime)) < 2 or epochs(runtime) == before:
            await runtime.changed()


def epochs(runtime: Runtime) -> dict[str, int]:
    """Return what tells a worker's processes apart."""
    return {record.worker_id: record.epoch for record in runtime.workers("lab", "Worker")}


async def test_workers_are_processes_with_gpus_of_their_own_and_come_back(graph: GraphProcess, folder: Path) -> None:
    async with connect(graph.doors["grpc"]) as runtime, httpx.AsyncClient(base_url=graph.doors["http"]) as http:
        client = await runtime.namespace("lab").component("Worker").endpoint("look").client()
        ids = await client.wait_for_workers(2)
        before = await looks(client, 2)
        await kill_and_wait_back(runtime, before[0]["pid"])
        after = await looks(client, 2)
        whole = await http.post("/sdk/v1/lab/Entry/look", json={})
    code = graph.stop()

    assert ids == ["N/lab.Worker/0", "N/lab.Worker/1"]
    assert [(seen["worker_id"], seen["gpus"], seen["greeting"]) for seen in before] == [
        ("N/lab.Worker/0", "4", "welcome"),
        ("N/lab.Worker/1", "7", "welcome"),
    ]
    assert {(seen["worker_id"], seen["gpus"]) for seen in after} == {(ids[0], "4"), (ids[1], "7")}
    assert before[0]["pid"] not in {seen["pid"] for seen in after}
    assert whole.json()["worker_id"] in ids
    assert code == 0
    assert {f"left-{seen['pid']}" for seen in after} == {
        name for name in os.listdir(folder) if name.startswith("left-")
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "lab_graph:Entry", "--Worker.workers=9"), "Worker 9 x 1 is 9 GPUs, and 1 are here"),
        (("serve", "decode", "--set", "Worker.workers=2"), "--set is for MODULE:CLASS"),
        (("proto", "lab_graph:Entyr"), "lab_graph has no 'Entyr'; the nearest is Entry"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_served_is_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(folder)

    refused = run_kvmesh(*arguments, CUDA_VISIBLE_DEVICES="0")

    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert says in refused.stderr


async def test_a_component_joins_a_mesh_by_its_store_and_is_reached_by_its_door() -> None:
    with EtcdServer() as etcd:
        doors = {"http.port": 0, "grpc.port": 0, "engine.name": "echo", "process.node": "N", "waits.drain_s": 3}
        settings = load_settings(overrides={"discovery.store": f"etcd://{etcd.endpoint}", **doors}).settings
        frontend = ServedRole("frontend", settings)
        guest = ComponentGraph(read_config(graph_of(Guest), file=None, flags=()), settings)
        try:
            await frontend.start()
            await guest.start()
            async with connect(frontend.addresses["grpc"]) as runtime:
                client = await runtime.namespace("guests").component("Guest").endpoint("reverse").client(answer=Text)
                await client.wait_for_workers(1)
                answers = [answer async for answer in await client.generate({"text": "abc"})]
                url = f"{frontend.addresses['http']}/sdk/v1/guests/Guest/reverse"
                async with httpx.AsyncClient() as http:
                    by_http = await http.post(url, json={"text": "xyz"})
                    await guest.stop()
                    async with asyncio.timeout(BOUND_S):
                        while client.worker_ids():
                            await runtime.changed()
                    gone = await http.post(url, json={"text": "xyz"})
        finally:
            await guest.stop()
            await frontend.stop()

    assert answers == [Text(text="cba")]
    assert by_http.json() == {"text": "zyx"}
    assert gone.status_code in (404, 503)  # the route goes when this frontend hears of it too
