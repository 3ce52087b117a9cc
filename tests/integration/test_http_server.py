"""The HTTP server as a part of a process: its port, and its end."""

import asyncio
import signal
from collections.abc import AsyncGenerator

import httpx
import orjson
import pytest

from kvmesh.core.errors import Reason
from kvmesh.gateway.app import create_app
from kvmesh.gateway.server import MAX_HEAD_BYTES, HttpServer
from kvmesh.services.channels import PortTakenError
from kvmesh.v1 import frontend_pb2, generation_pb2
from kvmesh.wire.generation import Delta, DeltaWriter, Event

HELLO = {"messages": [{"role": "user", "content": "x"}], "stream": True}


class HeldGenerator:
    """Yields one token, then waits to be released."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.closed = asyncio.Event()

    async def generate(
        self,
        request: frontend_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        writer: DeltaWriter | None = None,
    ) -> AsyncGenerator[Event, None]:
        try:
            yield frontend_pb2.Started(request_id=request_id or "")
            yield Delta(["one"], [1])
            await self.released.wait()
            yield generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_STOP)
        finally:
            self.closed.set()

    def models(self) -> frontend_pb2.ListModelsResponse:
        return frontend_pb2.ListModelsResponse()


def server_of(
    generator: HeldGenerator, *, port: int = 0, client_write_s: float = 30.0, head_wait_s: float = 30.0
) -> HttpServer:
    app = create_app(services=[], generator=generator, unready_reason=lambda: None, client_write_s=client_write_s)
    return HttpServer(app, host="127.0.0.1", port=port, head_wait_s=head_wait_s)


async def test_a_taken_port_says_what_to_do() -> None:
    first = server_of(HeldGenerator())
    await first.start()
    second = server_of(HeldGenerator(), port=first.port)

    with pytest.raises(PortTakenError, match="--http-port"):
        await second.start()

    await second.stop(0)
    await first.stop(0)


async def test_the_signal_handlers_of_the_process_stay_its_own() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    server = server_of(HeldGenerator())

    await server.start()
    during = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    await server.stop(0)

    assert during == before


async def test_the_address_is_known_once_bound_only() -> None:
    server = server_of(HeldGenerator())

    with pytest.raises(RuntimeError, match="not been started"):
        _ = server.address
    await server.start()

    assert server.address == f"127.0.0.1:{server.port}"
    assert server.port > 0
    await server.stop(0)


async def test_a_stream_that_ends_within_the_grace_ends_well() -> None:
    generator = HeldGenerator()
    server = server_of(generator)
    await server.start()

    async with (
        httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json=HELLO) as response,
    ):
        lines = response.aiter_lines()
        first = await anext(lines)
        stopping = asyncio.create_task(server.stop(30))
        generator.released.set()
        rest = [line async for line in lines if line]
        await stopping

    assert first.startswith("data: ")
    assert rest[-1] == "data: [DONE]"


async def test_a_stream_that_outlasts_the_grace_is_ended_with_draining() -> None:
    generator = HeldGenerator()
    server = server_of(generator)
    await server.start()

    async with (
        httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json=HELLO) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        stopping = asyncio.create_task(server.stop(0))
        rest = [line async for line in lines if line]
        await stopping

    assert Reason.DRAINING.value.lower() in rest[-1]
    assert generator.closed.is_set()


class EndlessGenerator(HeldGenerator):
    """Yields as long as somebody asks."""

    async def generate(
        self,
        request: frontend_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        writer: DeltaWriter | None = None,
    ) -> AsyncGenerator[Event, None]:
        try:
            yield frontend_pb2.Started(request_id=request_id or "")
            while True:
                yield Delta(["x" * 65536], [1])
        finally:
            self.closed.set()


async def test_a_client_that_does_not_read_is_given_up() -> None:
    generator = EndlessGenerator()
    server = server_of(generator, client_write_s=0.2)
    await server.start()
    body = orjson.dumps(HELLO)

    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    await writer.drain()
    await asyncio.wait_for(generator.closed.wait(), 20)

    assert (await reader.read(15)).startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()
    await server.stop(0)


class WritingGenerator(HeldGenerator):
    """Writes numbers while its door takes them, and yields the next one when it does not."""

    def __init__(self, count: int, *, padding: int) -> None:
        super().__init__()
        self.count, self.padding = count, padding
        self.written = self.yielded = 0

    async def generate(
        self,
        request: frontend_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        writer: DeltaWriter | None = None,
    ) -> AsyncGenerator[Event, None]:
        assert writer is not None
        yield frontend_pb2.Started(request_id=request_id or "")
        for number in range(self.count):
            delta = Delta([f"{number}{' ' * self.padding}"], [number])
            if number and writer.is_writable:
                self.written += 1
                writer.write(delta)
            else:
                self.yielded += 1
                yield delta
        yield generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_STOP)


@pytest.mark.parametrize(("count", "padding", "yielded"), [(50, 0, {1}), (200, 65_536, set(range(2, 200)))])
async def test_written_and_yielded_tokens_reach_the_client_in_order(
    count: int, padding: int, yielded: set[int]
) -> None:
    generator = WritingGenerator(count, padding=padding)
    server = server_of(generator)
    await server.start()

    async with (
        httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json=HELLO) as response,
    ):
        events = [orjson.loads(line[6:]) for line in [line async for line in response.aiter_lines() if line][:-1]]
    await server.stop(0)

    pieces = [event["choices"][0]["delta"].get("content") for event in events]
    assert [int(piece) for piece in pieces if piece] == list(range(count))
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert generator.yielded in yielded
    assert generator.written == count - generator.yielded


async def test_nothing_is_answered_after_the_stop() -> None:
    server = server_of(HeldGenerator())
    await server.start()
    await server.stop(0)
    await server.stop(0)

    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://{server.address}/healthz")


@pytest.mark.parametrize("beginning", [b"GET /", b"GET / HTTP/1.1\r\nhost: localhost\r\nx-long: "])
async def test_a_head_without_end_is_refused_and_its_connection_closed(beginning: bytes) -> None:
    server = server_of(HeldGenerator())
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)

    writer.write(beginning + b"a" * (MAX_HEAD_BYTES + 1 - len(beginning)))
    async with asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.read()

    assert head.startswith(b"HTTP/1.1 431 ")
    assert orjson.loads(body)["code"] == 3
    assert f"content-length: {len(body)}\r\n".encode() in head
    writer.close()
    await server.stop(0)


async def test_a_body_longer_than_a_head_may_be_is_no_head() -> None:
    server = server_of(HeldGenerator())
    await server.start()

    async with httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False, timeout=20) as client:
        replies = [await client.post("/v1/chat/completions", content=b" " * 300_000) for _ in range(2)]

    assert [reply.status_code for reply in replies] == [400, 400]
    await server.stop(0)


@pytest.mark.parametrize(("sent", "told"), [(b"POST /v1/models HTTP/1.1\r\nHost: loc", b"HTTP/1.1 408 "), (b"", b"")])
async def test_a_head_that_does_not_arrive_in_time_ends_its_connection(sent: bytes, told: bytes) -> None:
    server = server_of(HeldGenerator(), head_wait_s=0.1)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)

    writer.write(sent)
    async with asyncio.timeout(10):
        answer = await reader.read()

    assert answer.startswith(told)
    assert bool(answer) is bool(told)
    writer.close()
    await server.stop(0)


async def test_a_request_whose_head_arrived_in_time_may_take_longer() -> None:
    generator = HeldGenerator()
    server = server_of(generator, head_wait_s=0.1)
    await server.start()

    async with httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False) as client:
        async with client.stream("POST", "/v1/chat/completions", json=HELLO) as response:
            asyncio.get_running_loop().call_later(0.3, generator.released.set)
            lines = [line async for line in response.aiter_lines() if line]
        await asyncio.sleep(0.3)  # an idle connection is not one that owes a head
        listed = await client.get("/v1/models")

    assert lines[-1] == "data: [DONE]"
    assert listed.status_code == 200
    await server.stop(0)
