"""A frontend whose processor runs in another process, and goes away and comes back."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest

from kvmesh.core.errors import MeshError, Reason, TryElsewhereError
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.channels import Channels
from kvmesh.services.peers import Peers
from kvmesh.services.remote_processor import RemoteProcessor
from kvmesh.testing.tcp_proxy import TcpProxy
from kvmesh.testing.worker_group import eventually
from kvmesh.v1 import frontend_pb2, generation_pb2, processor_pb2, processor_pb2_grpc

if TYPE_CHECKING:
    from kvmesh.v1.processor_pb2_grpc import _ServicerContext as Context

GENEROUS_S = 20.0
REQUEST = frontend_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="a"))


class Processor(processor_pb2_grpc.ProcessorServicer):
    """Answers every request with its two ends, or with `refusal`."""

    def __init__(self, refusal: MeshError | None) -> None:
        self.asked = 0
        self.on_request: Callable[[], Awaitable[None]] | None = None
        """Called before a request is answered."""
        self._refusal = refusal

    async def GetTotals(
        self, request: processor_pb2.GetTotalsRequest, context: "Context"
    ) -> processor_pb2.GetTotalsResponse:
        return processor_pb2.GetTotalsResponse()

    async def Generate(
        self, request: processor_pb2.ProcessorGenerateRequest, context: "Context"
    ) -> AsyncIterator[processor_pb2.ProcessorGenerateResponse]:
        self.asked += 1
        if self.on_request is not None:
            await self.on_request()
        if self._refusal is not None:
            raise self._refusal
        yield processor_pb2.ProcessorGenerateResponse(started=frontend_pb2.Started(request_id=request.request_id))
        yield processor_pb2.ProcessorGenerateResponse(finished=generation_pb2.Finished())


@dataclass(slots=True)
class Side:
    """A frontend's side of one processor, which is reached through a proxy."""

    remote: RemoteProcessor
    proxy: TcpProxy
    served: Processor

    async def generate(self) -> list[str]:
        async with aclosing(self.remote.generate(REQUEST)) as events:
            return [type(event).__name__ async for event in events]


@asynccontextmanager
async def side(*, route_s: float = GENEROUS_S, refusal: MeshError | None = None) -> AsyncIterator[Side]:
    discovery = MemoryDiscovery()
    async with AsyncExitStack() as stack:
        served = Processor(refusal)
        server = grpc.aio.server(interceptors=[CallInterceptor()])
        processor_pb2_grpc.add_ProcessorServicer_to_server(served, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, None)
        proxy = TcpProxy(port)
        await proxy.start()
        stack.push_async_callback(proxy.aclose)
        await discovery.register(
            WorkerRecord(
                worker_id=WorkerId("n/processor/0"), epoch=Epoch(1), role=WorkerRole.PROCESSOR, models=(),
                namespace="default", block_size=1, address=proxy.address,
            )
        )  # fmt: skip
        channels = Channels()
        stack.push_async_callback(channels.aclose)
        peers = Peers(discovery, namespace="default")
        peers.start()
        stack.push_async_callback(peers.aclose)
        async with asyncio.timeout(GENEROUS_S):
            while not peers.processor_addresses():
                await peers.changed()
        remote = RemoteProcessor(peers=peers, channels=channels, waits=Waits(route_s=route_s))
        stack.push_async_callback(remote.aclose)
        yield Side(remote, proxy, served)


async def test_a_request_that_has_not_begun_waits_for_the_only_processor_to_come_back() -> None:
    async with side() as mesh, asyncio.timeout(GENEROUS_S):
        await mesh.generate()
        await mesh.proxy.cut()
        waiting = asyncio.ensure_future(mesh.generate())
        await eventually(lambda: not mesh.remote.reaches_any())  # and with it that there is nobody else
        assert not waiting.done()
        mesh.proxy.restore()

        events = await waiting

    assert events == ["Started", "Finished"]
    assert mesh.served.asked == 2


async def test_a_processor_that_stays_away_fails_the_request_within_the_wait_for_a_route() -> None:
    async with side(route_s=0.2) as mesh, asyncio.timeout(GENEROUS_S):
        await mesh.generate()
        await mesh.proxy.cut()

        with pytest.raises(MeshError) as refused:
            await mesh.generate()

    assert refused.value.reason is Reason.WORKER_LOST
    assert "is gone or does not answer" in refused.value.message


async def test_a_processor_that_answers_that_a_worker_is_lost_is_not_asked_again() -> None:
    async with side(refusal=TryElsewhereError(Reason.WORKER_LOST, "twice")) as mesh, asyncio.timeout(GENEROUS_S):
        with pytest.raises(MeshError) as refused:
            await mesh.generate()

    assert refused.value.reason is Reason.WORKER_LOST
    assert mesh.served.asked == 1


async def test_a_processor_that_is_lost_with_every_request_is_not_asked_for_ever() -> None:
    async with side() as mesh, asyncio.timeout(GENEROUS_S):
        mesh.served.on_request = mesh.proxy.break_connections

        with pytest.raises(MeshError) as refused:
            await mesh.generate()

    assert refused.value.reason is Reason.WORKER_LOST
    assert mesh.served.asked == 4


async def test_a_processor_that_is_gone_is_not_reached_until_it_is_back() -> None:
    async with side() as mesh, asyncio.timeout(GENEROUS_S):
        await mesh.generate()
        assert mesh.remote.reaches_any()
        await mesh.proxy.cut()
        await eventually(lambda: not mesh.remote.reaches_any())
        mesh.proxy.restore()

        await eventually(mesh.remote.reaches_any)

        assert await mesh.generate() == ["Started", "Finished"]
