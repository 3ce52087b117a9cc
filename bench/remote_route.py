"""What a routing decision costs a router when it is asked over gRPC, beside the same decision asked in its process.

    make bench-remote-route                          every way; the table on stderr, one JSON object on stdout
    python bench/remote_route.py --tokens 512 --workers 16

A router in a process of its own follows workers that hold prefixes of the prompts. Every prompt is new, of 8,192
tokens in blocks of 64, and travels as packed tokens. Ways to ask, with so many questions open at a time:
    call         Router.Select, a unary call each
    exchange     Router.Exchange, the stream that processors use: what waits travels together

Figures, CPU us per decision, medians of alternating rounds:
    in_process   of the same questions, from the message to the answering message
    router       of the router's process
    client       of the asking process
    ratio        router / in_process
"""

import argparse
import asyncio
import random
import resource
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import numpy as np
import uvloop
from google.protobuf import wrappers_pb2
from reporting import print_report
from rich.console import Console
from rich.table import Table

from kvmesh.core.ids import RouterId
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.local_router import LocalRouter
from kvmesh.services.router import Router
from kvmesh.services.router_exchange_client import RouterExchangeClient
from kvmesh.telemetry import configure_logging
from kvmesh.testing.scripted_worker import ScriptedWorker
from kvmesh.v1 import router_pb2, router_pb2_grpc

_MODEL = "m"
_VOCABULARY = 32_000
_GROUPS = 16
"""Of prompts that share their first half."""
_PROBE = "/kvmesh.bench.Probe/"
_WARM_UP = 200

Figures = dict[str, float]
Select = Callable[[router_pb2.SelectRequest], Awaitable[object]]


def prefix(group: int, tokens: int) -> "np.ndarray[Any, np.dtype[np.uint32]]":
    """Return what the prompts of a group begin with: half of each."""
    return np.random.default_rng(group).integers(0, _VOCABULARY, tokens // 2, dtype=np.uint32)


def questions(count: int, tokens: int, seed: int) -> list[router_pb2.SelectRequest]:
    """Return questions about prompts that were never seen before."""
    drawn = np.random.default_rng((1 << 20) + seed)
    made = []
    for number in range(count):
        rest = drawn.integers(0, _VOCABULARY, tokens - tokens // 2, dtype=np.uint32)
        prompt = np.concatenate([prefix(number % _GROUPS, tokens), rest])
        query = router_pb2.RoutingQuery(model=_MODEL, packed_token_ids=prompt.astype("<u4").tobytes())
        made.append(router_pb2.SelectRequest(query=query))
    return made


def cpu_us() -> float:
    """Return what this process has used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) * 1e6


async def serve(workers: int, tokens: int, block_size: int) -> None:
    """Run the router; print its port."""
    discovery = MemoryDiscovery()
    for number in range(workers):
        worker = await ScriptedWorker.start(discovery, number, block_size=block_size, total_blocks=100_000)
        worker.cache([int(token) for token in prefix(number % _GROUPS, tokens)])
    router = LocalRouter(
        discovery=discovery,
        namespace="default",
        router_id=RouterId("router"),
        policy=build_policy("least_work"),
        rng=random.Random(1),
    )
    router.start()
    held = tokens // 2 // block_size
    while not (len(known := router.workers()) == workers and all(one.indexed_blocks == held for one in known)):
        await router.changed()
    service = Router(router, waits=Waits())

    async def used(_request: wrappers_pb2.Int32Value, _context: object) -> wrappers_pb2.DoubleValue:
        return wrappers_pb2.DoubleValue(value=cpu_us())

    async def in_process(request: wrappers_pb2.Int32Value, _context: object) -> wrappers_pb2.DoubleValue:
        asked = [one.SerializeToString() for one in questions(200, tokens, request.value)]
        began = cpu_us()
        for message in asked:
            answer = await service.Select(router_pb2.SelectRequest.FromString(message), None)  # type: ignore[arg-type]
            answer.SerializeToString()
        return wrappers_pb2.DoubleValue(value=(cpu_us() - began) / len(asked))

    server = grpc.aio.server(interceptors=[CallInterceptor()])
    router_pb2_grpc.add_RouterServicer_to_server(service, server)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            behaviour, wrappers_pb2.Int32Value.FromString, wrappers_pb2.DoubleValue.SerializeToString
        )
        for name, behaviour in (("Used", used), ("InProcess", in_process))
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_PROBE.strip("/"), handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


class Asking:
    """The client's side of one router process."""

    def __init__(self, channel: grpc.aio.Channel, tokens: int) -> None:
        """Ask on `channel`."""
        self._tokens = tokens
        self._stub = router_pb2_grpc.RouterStub(channel)
        self._probes = {
            name: channel.unary_unary(
                _PROBE + name, wrappers_pb2.Int32Value.SerializeToString, wrappers_pb2.DoubleValue.FromString
            )
            for name in ("Used", "InProcess")
        }
        self._exchange = RouterExchangeClient(self._stub.Exchange(), write_timeout_s=10.0, on_end=lambda _ended: None)
        self._seed = 0

    async def aclose(self) -> None:
        """End the exchange."""
        await self._exchange.aclose()

    async def in_process(self) -> float:
        """Return CPU us of one decision without gRPC."""
        return await self._probe("InProcess")

    async def round(self, way: str, at_a_time: int, calls: int) -> tuple[float, float]:
        """Ask so many questions; return CPU us per decision of the router and of this process."""
        select: Select = self._call if way == "call" else self._ask
        self._seed += 1
        asked = iter(questions(calls, self._tokens, self._seed))
        before = await self._probe("Used"), cpu_us()
        async with asyncio.TaskGroup() as group:
            for _ in range(at_a_time):
                group.create_task(_ask_all(select, asked))
        after = await self._probe("Used"), cpu_us()
        return (after[0] - before[0]) / calls, (after[1] - before[1]) / calls

    async def _call(self, request: router_pb2.SelectRequest) -> object:
        return await self._stub.Select(request, timeout=30.0)

    async def _ask(self, request: router_pb2.SelectRequest) -> object:
        return await self._exchange.ask(router_pb2.RouterQuestion(select=request))

    async def _probe(self, name: str) -> float:
        self._seed += 1
        answer: wrappers_pb2.DoubleValue = await self._probes[name](
            wrappers_pb2.Int32Value(value=self._seed), timeout=60.0
        )
        return answer.value


async def _ask_all(select: Select, asked: "Any") -> None:
    for request in asked:
        await select(request)


async def measure(port: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every way in turn, and the same decision in the router's process between them."""
    ways = [(way, at_a_time) for way in ("call", "exchange") for at_a_time in given.at_a_time]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {way: [] for way in ways}
    in_process = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        asking = Asking(channel, given.tokens)
        for way in ways:
            await asking.round(*way, _WARM_UP)
        for _ in range(given.rounds):
            in_process.append(await asking.in_process())
            for way in ways:
                found[way].append(await asking.round(*way, given.calls))
        await asking.aclose()
    alone = statistics.median(in_process)
    return [
        {
            "params": {"way": way, "at_a_time": at_a_time, "tokens": given.tokens, "workers": given.workers},
            "ours": {
                "in_process": round(alone, 1),
                "router": round(router := statistics.median(one for one, _ in rounds), 1),
                "client": round(statistics.median(one for _, one in rounds), 1),
                "ratio": round(router / alone, 2),
            },
            "peer": None,
            "ratio": None,
        }
        for (way, at_a_time), rounds in found.items()
    ]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a prompt. default: %(default)s")
    parser.add_argument("--block-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--at-a-time", type=int, nargs="+", default=[1, 16, 64], help="default: 1 16 64")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=1000, help="in a round. default: %(default)s")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        configure_logging(level="error")
        uvloop.run(serve(given.workers, given.tokens, given.block_size))
        return
    command = [sys.executable, __file__, "--serve", "--workers", str(given.workers), "--tokens", str(given.tokens)]
    with subprocess.Popen(
        [*command, "--block-size", str(given.block_size)], stdout=subprocess.PIPE, text=True
    ) as router:
        assert router.stdout is not None
        try:
            reports = uvloop.run(measure(int(router.stdout.readline()), given))
        finally:
            router.kill()
    show(reports)
    print_report("remote_route", reports)


def show(reports: Sequence[dict[str, Any]]) -> None:
    """Print the table for people."""
    table = Table(title="CPU us per decision (medians)")
    for name in ("way", "at a time", "in process", "router", "ratio", "client"):
        table.add_column(name, justify="right")
    for report in reports:
        params, ours = report["params"], report["ours"]
        figures = (ours[name] for name in ("in_process", "router", "ratio", "client"))
        table.add_row(params["way"], str(params["at_a_time"]), *map(str, figures))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
