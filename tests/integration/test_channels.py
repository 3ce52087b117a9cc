"""Outbound channels against real servers, present and absent."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import grpc
import pytest

from kvmesh.core.errors import BackOffError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.channels import Channels, mesh_errors
from kvmesh.services.peers import Peers
from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc

GENEROUS_S = 10.0
INFO_REQUEST = worker_control_pb2.GetInfoRequest()
DRAIN_REQUEST = worker_control_pb2.DrainRequest()


class FullControl(worker_control_pb2_grpc.WorkerControlServicer):
    """GetInfo is always full; Drain never answers."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.cleaned = asyncio.Event()

    async def Undrain(self, request: Any, context: Any) -> worker_control_pb2.UndrainResponse:
        raise AssertionError("nobody asks")

    async def GetInfo(self, request: Any, context: Any) -> worker_control_pb2.GetInfoResponse:
        raise BackOffError(Reason.OVERLOADED, "all 8 slots taken", retry_after_s=0.5, metadata={"slots": "8"})

    async def Drain(self, request: Any, context: Any) -> worker_control_pb2.DrainResponse:
        try:
            self.draining.set()
            await asyncio.Event().wait()
        finally:
            self.cleaned.set()
        raise AssertionError("unreachable")


@pytest.fixture
def control() -> FullControl:
    return FullControl()


@pytest.fixture
async def address(control: FullControl) -> AsyncIterator[str]:
    server = GrpcServer()
    server.add(control, "kvmesh.v1.WorkerControl", worker_control_pb2_grpc.add_WorkerControlServicer_to_server)
    await server.start("127.0.0.1", 0)
    yield server.address
    await server.drain_and_stop(GENEROUS_S)


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    channels = Channels()
    yield channels
    await channels.aclose()


def stub_on(channel: grpc.aio.Channel) -> "worker_control_pb2_grpc.WorkerControlAsyncStub":
    return worker_control_pb2_grpc.WorkerControlStub(channel)


async def test_one_address_has_one_channel(channels: Channels) -> None:
    first, again, other = (channels.get(f"127.0.0.1:{port}") for port in (1, 1, 2))

    assert first is again
    assert first is not other


async def test_the_channel_to_an_address_that_nobody_has_is_dropped_at_the_second_look(channels: Channels) -> None:
    for address in ("127.0.0.1:1", "127.0.0.1:2"):
        channels.get(address)

    await channels.drop_unlisted({"127.0.0.1:2"})
    after_one = set(channels.addresses)
    await channels.drop_unlisted({"127.0.0.1:2"})

    assert after_one == {"127.0.0.1:1", "127.0.0.1:2"}
    assert set(channels.addresses) == {"127.0.0.1:2"}


async def test_an_address_that_is_listed_again_keeps_its_channel(channels: Channels) -> None:
    channel = channels.get("127.0.0.1:1")

    await channels.drop_unlisted(set())
    await channels.drop_unlisted({"127.0.0.1:1"})
    await channels.drop_unlisted(set())

    assert channels.get("127.0.0.1:1") is channel


async def test_what_still_runs_at_an_unlisted_address_is_not_cut(
    channels: Channels, address: str, control: FullControl
) -> None:
    channel = channels.get(address)
    running = asyncio.ensure_future(stub_on(channel).Drain(DRAIN_REQUEST, timeout=GENEROUS_S))
    await asyncio.wait_for(control.draining.wait(), GENEROUS_S)

    for _ in range(3):
        await channels.drop_unlisted(set())

    assert set(channels.addresses) == {address}
    assert not running.done()
    running.cancel()


async def test_who_follows_discovery_drops_the_channels_to_those_who_have_gone() -> None:
    discovery, channels = MemoryDiscovery(), Channels()
    peers = Peers(discovery, namespace="mesh", channels=channels, sweep_s=0.01)
    gone = await discovery.register(worker_record(1))
    stays = await discovery.register(worker_record(2))
    peers.start()
    async with asyncio.timeout(GENEROUS_S):
        while len(peers.roster.records()) < 2:
            await peers.changed()
    for record in peers.roster.records():
        channels.get(record.address)

    await gone.stop()
    async with asyncio.timeout(GENEROUS_S):
        while len(channels.addresses) > 1:  # noqa: ASYNC110  # the sweep tells nobody
            await asyncio.sleep(0.01)
    left = set(channels.addresses)
    await stays.stop()
    await peers.aclose()
    await channels.aclose()

    assert left == {"127.0.0.1:2"}


def worker_record(index: int) -> WorkerRecord:
    """Return the record of a worker at the port of its index, where nobody listens."""
    return WorkerRecord(
        worker_id=WorkerId(f"NODE1/decode/{index}"),
        epoch=Epoch(1),
        role=WorkerRole.DECODE,
        models=("m",),
        namespace="mesh",
        block_size=4,
        address=f"127.0.0.1:{index}",
    )


async def test_error_of_a_peer_comes_back_as_it_was_raised(channels: Channels, address: str) -> None:
    with pytest.raises(BackOffError) as caught, mesh_errors():
        await stub_on(channels.get(address)).GetInfo(INFO_REQUEST, timeout=GENEROUS_S)

    error = caught.value
    assert (error.reason, error.message) == (Reason.OVERLOADED, "all 8 slots taken")
    assert (error.retry_after_s, error.metadata) == (0.5, {"slots": "8"})
    assert isinstance(error.__cause__, grpc.aio.AioRpcError)


async def test_peer_that_is_not_there_is_a_lost_worker(channels: Channels) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(TryElsewhereError) as caught, mesh_errors():
        await stub_on(channels.get(f"127.0.0.1:{port}")).GetInfo(INFO_REQUEST, timeout=GENEROUS_S)

    assert caught.value.reason is Reason.WORKER_LOST


async def test_deadline_of_a_call_is_out_of_time(channels: Channels, address: str) -> None:
    with pytest.raises(OutOfTimeError) as caught, mesh_errors():
        await stub_on(channels.get(address)).Drain(DRAIN_REQUEST, timeout=0.2)

    assert caught.value.reason is Reason.DEADLINE


async def test_dropped_channel_cancels_its_calls_and_the_next_one_is_new(
    channels: Channels, control: FullControl, address: str
) -> None:
    channel = channels.get(address)
    call = stub_on(channel).Drain(DRAIN_REQUEST, timeout=GENEROUS_S)
    await control.draining.wait()

    await channels.drop(address)
    await channels.drop(address)

    await asyncio.wait_for(control.cleaned.wait(), GENEROUS_S)
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert channels.get(address) is not channel


async def test_worker_that_comes_back_on_its_address_is_found_again(channels: Channels) -> None:
    first = GrpcServer()
    port = await first.start("127.0.0.1", 0)
    channel = channels.get(first.address)
    await asyncio.wait_for(channel.channel_ready(), GENEROUS_S)
    await first.drain_and_stop(0)
    second = GrpcServer()
    second.add(FullControl(), "kvmesh.v1.WorkerControl", worker_control_pb2_grpc.add_WorkerControlServicer_to_server)
    await second.start("127.0.0.1", port)

    with pytest.raises(BackOffError), mesh_errors():
        await stub_on(channel).GetInfo(INFO_REQUEST, timeout=GENEROUS_S, wait_for_ready=True)

    await second.drain_and_stop(0)


async def test_closed_channels_make_no_new_ones(address: str) -> None:
    channels = Channels()
    channels.get(address)

    await channels.aclose()
    await channels.aclose()

    with pytest.raises(RuntimeError, match=address):
        channels.get(address)
