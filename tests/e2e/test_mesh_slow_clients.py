"""A client that stops reading, at a gRPC door: its request ends and gives back everything, everywhere."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kvmesh.core.errors import Reason
from kvmesh.runtime.mesh import Mesh
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.frontend import Frontend
from kvmesh.testing.mesh import read_baseline, running_mesh, wait_for_baseline
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2
from kvmesh.wire.error_catalog import from_rpc_error

SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384))
"""So that a few hundred messages fill what a connection takes in for a client that does not read."""
ENDLESS = 100_000


@asynccontextmanager
async def impatient_door(mesh: Mesh) -> AsyncIterator["frontend_pb2_grpc.FrontendAsyncStub"]:
    """A client of a second door of the mesh, one that bears a client that does not read for 0.3 s only."""
    door = GrpcServer(client_write_s=0.3)
    frontend = Frontend(
        generator=mesh.gateway.processor, topology=mesh.gateway.refreshed_topology, request_timeout_s=300
    )
    door.add(frontend, "kvmesh.v1.Frontend", frontend_pb2_grpc.add_FrontendServicer_to_server)
    port = await door.start("127.0.0.1", 0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=SMALL_WINDOW) as channel:
            yield frontend_pb2_grpc.FrontendStub(channel)
    finally:
        await door.drain_and_stop(1)


async def read_to_the_end(call: "grpc.aio.UnaryStreamCall[Any, Any]") -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_request_of_a_grpc_client_that_stops_reading_and_has_no_deadline_is_given_up() -> None:
    request = frontend_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(text="hello"),
        sampling=generation_pb2.SamplingParams(max_tokens=ENDLESS, ignore_eos=True),
    )
    async with running_mesh(engine__name="simulated", engine__speedup=0, mesh__prefill=0) as mesh:
        baseline = await read_baseline(mesh)
        async with impatient_door(mesh) as frontend:
            call = frontend.Generate(request)
            first = await call.read()
            booked = (await read_baseline(mesh)).reservations
            await wait_for_baseline(mesh, baseline)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_to_the_end(call)

    assert isinstance(first, frontend_pb2.GenerateResponse)
    assert first.WhichOneof("event") == "started"
    assert booked == 1
    assert from_rpc_error(caught.value).reason is Reason.SLOW_CONSUMER
