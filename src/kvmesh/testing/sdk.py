"""Components inside a test: the real thing in this process, on free ports, without a server to start first.

    async with serving(YourWorker) as mesh:
        client = await mesh.runtime.namespace("ns").component("YourWorker").endpoint("generate").client()
        answers = [answer async for answer in await client.generate({"text": "hello"})]

Programs declared with `@worker()` that are awaited within the block are connected to it.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from kvmesh.runtime.component_config import read_config
from kvmesh.runtime.component_graph import ComponentGraph
from kvmesh.runtime.settings import load_settings
from kvmesh.sdk.context import Place, placed
from kvmesh.sdk.dependencies import Graph, graph_of
from kvmesh.sdk.runtime import Runtime
from kvmesh.testing.mesh import SHORT_WAITS

__all__ = ["ServedComponents", "serving"]


class ServedComponents:
    """What `serving` runs."""

    def __init__(self, graph: ComponentGraph, runtime: Runtime) -> None:
        self.graph = graph
        """The processes-to-be, here in one."""
        self.runtime = runtime
        """Connected, for clients."""

    @property
    def http_url(self) -> str:
        """http://HOST:PORT of the door."""
        return f"http://{self.graph.http_address}"

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC door."""
        return self.graph.grpc_address

    def instances(self, cls: type) -> list[Any]:
        """Return the served objects of a class."""
        return [role.instance for role in self.graph.roles if isinstance(role.instance, cls)]


@asynccontextmanager
async def serving(
    *targets: type | Graph, config: Sequence[str] = (), **overrides: Any
) -> AsyncIterator[ServedComponents]:
    """Serve classes, with all that they depend on, or a graph of `link`, for the block.

    `config` are `Class.key=value`; `overrides` are settings with `__` for the dot. Raises: what a start raises.
    """
    given = {key.replace("__", ".", 2): value for key, value in overrides.items()}
    waits = {f"waits.{name}": value for name, value in SHORT_WAITS.items()}
    doors = {"http.port": 0, "grpc.port": 0, "process.node": "NODE1"}
    settings = load_settings(overrides={**doors, **waits, **given}).settings
    services = {one.address: one for target in targets for one in graph_of(target).services}
    graph = ComponentGraph(read_config(Graph(tuple(services.values())), file=None, flags=config), settings)
    runtime = Runtime(graph.discovery, namespace=settings.namespace, waits=settings.waits)
    try:
        await graph.start()
        runtime.start()
        with placed(Place(runtime)):
            yield ServedComponents(graph, runtime)
    finally:
        await runtime.aclose()
        await graph.stop()
