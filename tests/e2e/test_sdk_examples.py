"""The examples of components: each served, each asked what its README asks."""

import importlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvmesh.runtime.component_loading import load_graph
from kvmesh.testing.sdk import ServedComponents, serving

EXAMPLES = Path(__file__).parents[2] / "examples"


@asynccontextmanager
async def example(
    monkeypatch: pytest.MonkeyPatch, name: str, cls: str, *config: str
) -> AsyncIterator[tuple[ServedComponents, httpx.AsyncClient]]:
    """Serve a class of an example as its README does, from its folder."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(EXAMPLES / name)
    readme = (EXAMPLES / name / "README.md").read_text()
    assert f"\nkvmesh serve {name}:{cls}" in readme
    async with (
        serving(load_graph(f"{name}:{cls}"), config=config) as mesh,
        httpx.AsyncClient(base_url=mesh.http_url) as http,
    ):
        yield mesh, http


async def ask(http: httpx.AsyncClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the answers of an endpoint of a stream."""
    response = await http.post(f"/sdk/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    return [json.loads(line)["result"] for line in response.text.splitlines()]


async def test_basic_worker(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async with example(monkeypatch, "basic_worker", "YourWorker") as (_, http):
        monkeypatch.delitem(sys.modules, "client", raising=False)
        capsys.readouterr()
        await importlib.import_module("client").client_worker()
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        shouted = await http.post("/sdk/v1/your_namespace/YourWorker/shout", json={"text": "hello"})

    readme = (EXAMPLES / "basic_worker" / "README.md").read_text()
    assert printed == ["{'text': 'Hello'}", "{'text': 'from'}", "{'text': 'a'}", "{'text': 'client'}"]
    assert "\n".join(printed) in readme
    assert shouted.text in readme
    assert shouted.json() == {"text": "HELLO"}


async def test_kv_metrics_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async with example(monkeypatch, "kv_metrics_worker", "Watcher") as (mesh, http):
        prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
        streamed = await ask(http, "your_namespace/YourWorker/generate", tokens=prompt)
        sight = (await http.post("/sdk/v1/your_namespace/Watcher/look", json={"tokens": prompt})).json()
        (worker_id,) = mesh.runtime.namespace("your_namespace").component("YourWorker").worker_ids()

    assert [answer["token"] for answer in streamed] == [str(token) for token in prompt]
    assert set(sight["running"]) == {worker_id}
    assert sight["cached_blocks"] in ({worker_id: "2"}, {})  # what is on its way is not waited for


async def test_component_router(monkeypatch: pytest.MonkeyPatch) -> None:
    async with example(monkeypatch, "component_router", "Router") as (_, http):
        prompt = [1, 2, 3, 4, 5, 6, 7, 8]
        first, second = [(await ask(http, "your_namespace/Router/generate", tokens=prompt))[0] for _ in range(2)]
        routed = (await http.post("/sdk/v1/your_namespace/Router/route", json={"tokens": prompt})).json()

    assert (first["cached_blocks"], second["cached_blocks"]) == ("0", "2")
    assert first["worker_id"] == second["worker_id"] == routed["worker_id"]
    assert len(routed["costs"]) == 2


async def test_remote_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "DecodeWorker.remote_from=10"
    async with example(monkeypatch, "remote_prefill", "DecodeWorker", told) as (mesh, http):
        path = "your_namespace/DecodeWorker/generate"
        long = await ask(http, path, text="a prompt that is long")
        short = await ask(http, path, text="short")
        prefill = next(role for role in mesh.graph.roles if "PrefillWorker" in role.name)
        await prefill.stop()
        alone = await ask(http, path, text="a prompt that is long")

    assert {answer["prefilled_by"] for answer in long} == {"NODE1/your_namespace.PrefillWorker/0"}
    assert {answer["prefilled_by"] for answer in short + alone} == {"NODE1/your_namespace.DecodeWorker/0"}
    assert [answer["text"] for answer in alone] == [answer["text"] for answer in long]


async def test_disagg_skeleton(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [
        "Tell me a joke",
        "Which team won 2020 World Series",
        "Tell me a fact",
        "This is prefill disagg serving example",
    ]
    async with example(monkeypatch, "disagg_skeleton", "Processor") as (_, http):
        path = "disagg-demo/Processor/generate"
        answers = [(await ask(http, path, prompt=prompt, request_id="id_number"))[0] for prompt in prompts]

    readme = (EXAMPLES / "disagg_skeleton" / "README.md").read_text()
    workers = [answer["worker_output"].rpartition("_GeneratedBy_")[2] for answer in answers]
    assert [answer["request_id"] for answer in answers] == ["id_number"] * 4
    assert workers[0] == workers[2] != workers[1] == workers[3]
    assert all(prompt in readme for prompt in prompts)
