"""A whole mesh inside a test: real servers on free ports, short waits, and the leak check.

    async with running_mesh(engine__name="simulated", mesh__prefill=0) as mesh:
        baseline = await read_baseline(mesh)
        ...
        await wait_for_baseline(mesh, baseline)

What a request holds is given back a moment after its client is gone, so the baseline is waited for, within a bound.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from kvmesh.runtime.engine_registry import EnginePlan
from kvmesh.runtime.mesh import Mesh
from kvmesh.runtime.settings import load_settings
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2, worker_control_pb2, worker_control_pb2_grpc

if TYPE_CHECKING:
    from kvmesh.v1.frontend_pb2_grpc import FrontendAsyncStub

__all__ = [
    "SHORT_WAITS",
    "Answer",
    "Baseline",
    "WorkerBaseline",
    "generate",
    "open_frontend",
    "read_baseline",
    "running_mesh",
    "wait_for_baseline",
]

SHORT_WAITS: Mapping[str, float] = {
    "route_s": 1.0,
    "connect_s": 2.0,
    "prefill_s": 5.0,
    "first_token_s": 20.0,
    "token_gap_s": 10.0,
    "drain_s": 3.0,
    "request_s": 30.0,
}
"""What `running_mesh` sets unless told otherwise: short enough that nothing outlives a test's own bound."""
_SMALLEST: Mapping[str, Any] = {"engine.name": "echo", "process.transports": "memory"}
"""Unless told otherwise: no model to load, nothing of the host to share."""

_ANSWER_S = 5.0
_LOOK_AGAIN_S = 0.05
_REQUEST_S = 20.0


@dataclass(frozen=True, slots=True)
class WorkerBaseline:
    """What a worker holds for requests, tasks and handoffs; cached blocks that nobody uses do not count."""

    used_blocks: int = 0
    pins: int = 0
    imports: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Baseline:
    """Everything that must be as before once nothing runs."""

    workers: Mapping[str, WorkerBaseline] = field(default_factory=dict)
    """By worker_id; only those that answer."""
    active_requests: int = 0
    """Those that workers report as theirs, running and waiting."""
    reservations: int = 0
    """Bookings of the gateway's router."""
    running: int = 0
    """Requests of the gateway's processor."""
    queue_depth: int = 0
    queue_leased: int = 0


@dataclass(slots=True)
class Answer:
    """Everything one Frontend.Generate stream said."""

    started: frontend_pb2.Started = field(default_factory=frontend_pb2.Started)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finished: generation_pb2.Finished | None = None
    """None: the stream failed."""


@asynccontextmanager
async def running_mesh(*, plan: EnginePlan | None = None, **overrides: Any) -> AsyncIterator[Mesh]:
    """Run a mesh for the block.

    `overrides` are settings with `__` for the dot, as in `waits__route_s=0.5` or `engine__options__block_size="16"`;
    the engine is `echo` unless they name one. `plan` brings engines of the caller's own.

    Raises: SettingsError, and what `Mesh.start` raises.
    """
    given = {key.replace("__", ".", 2): value for key, value in overrides.items()}
    waits = {f"waits.{name}": value for name, value in SHORT_WAITS.items()}
    settings = load_settings(overrides={"http.port": 0, "grpc.port": 0, **_SMALLEST, **waits, **given}).settings
    mesh = Mesh(settings, plan=plan)
    try:
        await mesh.start()
        yield mesh
    finally:
        await mesh.stop()


@asynccontextmanager
async def open_frontend(mesh: Mesh) -> AsyncIterator["FrontendAsyncStub"]:
    """Open a client of the gRPC door."""
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        yield frontend_pb2_grpc.FrontendStub(channel)


async def generate(
    frontend: "FrontendAsyncStub",
    prompt: str | generation_pb2.Prompt,
    *,
    timeout_s: float = _REQUEST_S,
    into: Answer | None = None,
    **fields: Any,
) -> Answer:
    """Run one request to its end; `fields` are those of GenerateRequest, `into` keeps what came before a failure.

    Raises: grpc.aio.AioRpcError.
    """
    given = generation_pb2.Prompt(text=prompt) if isinstance(prompt, str) else prompt
    request = frontend_pb2.GenerateRequest(prompt=given, **fields)
    answer = Answer() if into is None else into
    async for response in frontend.Generate(request, timeout=timeout_s):
        match response.WhichOneof("event"):
            case "started":
                answer.started = response.started
            case "chunk":
                answer.text += response.chunk.text
                answer.token_ids += response.chunk.token_ids
            case "finished":
                answer.finished = response.finished
    return answer


async def read_baseline(mesh: Mesh) -> Baseline:
    """Ask every worker, the queue and the gateway what they hold now; the workers by WorkerControl.GetInfo."""
    topology = await mesh.gateway.refreshed_topology()
    held = await asyncio.gather(*(_held_by(worker.address) for worker in topology.workers))
    alive = [(worker, one) for worker, one in zip(topology.workers, held, strict=True) if one is not None]
    return Baseline(
        workers={worker.id: one for worker, one in alive},
        active_requests=sum(worker.active_requests + worker.waiting_requests for worker, _ in alive),
        reservations=topology.counters.reservations,
        running=topology.counters.running,
        queue_depth=topology.queue.depth,
        queue_leased=topology.queue.leased,
    )


async def wait_for_baseline(mesh: Mesh, expected: Baseline, *, within_s: float = 10.0) -> None:
    """Wait until the mesh holds `expected` again. Raises: AssertionError naming both when `within_s` have passed."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while (found := await read_baseline(mesh)) != expected:
        if loop.time() >= deadline:
            raise AssertionError(f"not given back within {within_s:g} s:\nexpected {expected}\nfound    {found}")
        await asyncio.sleep(_LOOK_AGAIN_S)


async def _held_by(address: str) -> WorkerBaseline | None:
    """Return what a worker holds, or None if it is gone."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_control_pb2_grpc.WorkerControlStub(channel)
        try:
            info = await stub.GetInfo(worker_control_pb2.GetInfoRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError:
            return None
    return WorkerBaseline(used_blocks=info.used_blocks, pins=info.pins, imports=info.imports, requests=info.requests)
