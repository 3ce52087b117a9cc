"""What bounds a component's life and its calls: hooks, retries, waits, and publishers that come too late."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from kvmesh.core.errors import MeshError, Reason, TryElsewhereError
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.engines.engine import EngineLoad
from kvmesh.runtime.component_config import read_config
from kvmesh.runtime.component_processes import ComponentProcesses
from kvmesh.runtime.settings import load_settings
from kvmesh.runtime.supervisor import ChildSpec
from kvmesh.sdk import (
    KvEventPublisher,
    KvMetricsAggregator,
    KvMetricsPublisher,
    Runtime,
    context,
    depends,
    endpoint,
    on_shutdown,
    on_start,
    service,
)
from kvmesh.sdk.dependencies import graph_of
from kvmesh.sdk.publications import Publications
from kvmesh.testing.sdk import ServedComponents, serving

BOUND_S = 10.0
DONE: list[str] = []
"""What the served objects of this module did."""


class Text(BaseModel):
    text: str = ""


class Page(BaseModel):
    lines: list[str]


class Book(BaseModel):
    pages: list[Page]
    index: dict[str, int]
    title: str | None


@service(namespace="ns", workers=2)
class Worker:
    @endpoint()
    async def refuse(self, request: Text) -> Text:
        DONE.append(context.worker_id)
        raise TryElsewhereError(Reason.NO_WORKERS, "what it needs is missing")

    @endpoint()
    async def write(self, request: Text) -> Book:
        return Book(pages=[Page(lines=[])] if request.text else [], index={}, title=None)

    @endpoint()
    async def publish(self, request: Text) -> Text:
        said = []
        for late in (
            lambda: KvEventPublisher(context.component, 4),
            lambda: KvMetricsPublisher().create_endpoint(context.component),
        ):
            with pytest.raises(RuntimeError) as refused:
                late()
            said.append(str(refused.value))
        return Text(text=" ".join(said))


@service(namespace="ns")
class Entry:
    worker = depends(Worker)

    @endpoint()
    async def write(self, request: Text) -> Book:
        book: Book = await self.worker.write(request)
        return book


@service(namespace="ns")
class Slow:
    """Does not want to end."""

    @endpoint()
    async def go(self, request: Text) -> Text:
        return request

    @on_shutdown
    async def first(self) -> None:
        DONE.append(f"first of {context['component'].name}")

    @on_shutdown
    async def second(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            DONE.append("second")


@service(namespace="ns")
class Unstarted:
    """Cannot start."""

    @endpoint()
    async def go(self, request: Text) -> Text:
        return request

    @on_start
    async def load(self) -> None:
        raise FileNotFoundError("no model")

    @on_shutdown
    async def unload(self) -> None:
        DONE.append("unload")


@pytest.fixture(autouse=True)
def _nothing_done() -> None:
    DONE.clear()


@pytest.fixture
async def mesh() -> AsyncIterator[ServedComponents]:
    async with serving(Entry) as served:
        yield served


async def answer_of(served: ServedComponents, address: str, request: Any, **kwargs: Any) -> Any:
    component, name = address.split("/")
    client = await served.runtime.namespace("ns").component(component).endpoint(name).client(**kwargs)
    (answer,) = [answer async for answer in await client.generate(request)]
    return answer


@pytest.mark.parametrize("component", ["Worker", "Entry"])
async def test_empty_lists_reach_a_caller_with_the_model(mesh: ServedComponents, component: str) -> None:
    empty = await answer_of(mesh, f"{component}/write", {}, answer=Book)
    nested = await answer_of(mesh, f"{component}/write", {"text": "x"}, answer=Book)

    assert empty == Book(pages=[], index={}, title=None)
    assert nested == Book(pages=[Page(lines=[])], index={}, title=None)


async def test_an_endpoints_own_error_does_not_run_it_again_elsewhere(mesh: ServedComponents) -> None:
    with pytest.raises(TryElsewhereError, match="what it needs is missing"):
        await answer_of(mesh, "Worker/refuse", {})

    assert len(DONE) == 1


async def test_a_worker_that_drains_is_replaced_by_another(mesh: ServedComponents) -> None:
    draining = next(role for role in mesh.graph.roles if isinstance(role.instance, Worker))
    draining._begin_drain()  # before its record says so

    client = await mesh.runtime.namespace("ns").component("Worker").endpoint("write").client(answer=Book)
    answers = [[one async for one in await client.generate({})] for _ in range(2)]

    assert draining.name in client.worker_ids()
    assert answers == [[Book(pages=[], index={}, title=None)]] * 2


async def test_a_publisher_made_too_late_says_where_to_make_it(mesh: ServedComponents) -> None:
    answer = await answer_of(mesh, "Worker/publish", {})

    assert answer["text"].count("make its publishers in __init__ or @on_start") == 2


async def test_metrics_of_who_never_publishes_are_waited_for_once(mesh: ServedComponents) -> None:
    aggregator = KvMetricsAggregator(mesh.runtime.namespace("ns").component("Worker"))

    async with asyncio.timeout(BOUND_S):
        found = [await aggregator.get_metrics() for _ in range(20)]

    assert found[-1].endpoints == ()


async def test_the_wait_for_a_worker_ends_with_the_call() -> None:
    async with serving(Slow, waits__route_s="60", waits__drain_s="0.2") as served:
        client = await served.runtime.namespace("ns").component("Nobody").endpoint("go").client()

        with pytest.raises(TryElsewhereError, match="components that run"):
            async with asyncio.timeout(BOUND_S):
                await client.generate({}, timeout_s=0.05)


async def test_a_hook_that_does_not_end_is_cancelled_and_the_others_run() -> None:
    async with asyncio.timeout(BOUND_S):
        async with serving(Slow, waits__drain_s="0.2"):
            assert DONE == []

    assert DONE == ["second", "first of Slow"]


async def test_what_did_not_start_is_not_shut_down() -> None:
    with pytest.raises(FileNotFoundError):
        async with serving(Unstarted):
            raise AssertionError("it started")

    assert DONE == []


def test_a_thread_that_publishes_after_the_end_is_not_disturbed() -> None:
    async def make() -> Publications:
        return Publications(is_draining=lambda: False)

    publications = asyncio.run(make())

    publications.say_load(EngineLoad(total_blocks=5))
    publications.say_kv([])

    assert publications.total_blocks == 5


async def test_one_instance_has_blocks_of_one_size() -> None:
    publications = Publications(is_draining=lambda: False)
    publications.use(block_size=4)

    publications.use()
    with pytest.raises(RuntimeError, match="blocks of 4 and of 8 tokens"):
        publications.use(block_size=8)

    assert (publications.is_used, publications.block_size) == (True, 4)


class UnclosableRuntime(Runtime):
    async def aclose(self) -> None:
        await super().aclose()
        raise MeshError(Reason.INTERNAL, "the store is gone")


async def test_children_end_also_where_the_store_cannot_be_left() -> None:
    settings = load_settings(overrides={"waits.drain_s": 3.0}).settings
    processes = ComponentProcesses("m:C", read_config(graph_of(Slow), file=None, flags=()), settings, config_flags=())
    processes._runtime = UnclosableRuntime(MemoryDiscovery(), namespace="ns")
    runs, has_ended = asyncio.Event(), asyncio.Event()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        runs.set()
        await reader.read()
        writer.close()
        has_ended.set()

    async with await asyncio.start_server(hear, "127.0.0.1", 0) as server, asyncio.timeout(BOUND_S):
        port = server.sockets[0].getsockname()[1]
        program = f"import socket, sys; held = socket.create_connection(('127.0.0.1', {port})); sys.stdin.read()"
        processes._supervisor.start(ChildSpec("Slow/0", (sys.executable, "-c", program), dict(os.environ)))
        await runs.wait()

        with pytest.raises(MeshError, match="the store is gone"):
            await processes.stop()

        await has_ended.wait()
    assert processes._supervisor.children["Slow/0"].pid is None
