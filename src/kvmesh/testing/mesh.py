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
from typing import Any

import grpc

from kvmesh.core.roster import WorkerRole
from kvmesh.runtime.engine_registry import EnginePlan
from kvmesh.runtime.mesh import Mesh
from kvmesh.runtime.settings import load_settings
from kvmesh.v1 import worker_control_pb2, worker_control_pb2_grpc

__all__ = ["SHORT_WAITS", "Baseline", "WorkerBaseline", "read_baseline", "running_mesh", "wait_for_baseline"]

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

_ANSWER_S = 5.0
_LOOK_AGAIN_S = 0.05


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


@asynccontextmanager
async def running_mesh(*, plan: EnginePlan | None = None, **overrides: Any) -> AsyncIterator[Mesh]:
    """Run a mesh for the block.

    `overrides` are settings with `__` for the dot, as in `waits__route_s=0.5` or `engine__options__block_size="16"`;
    `plan` brings engines of the caller's own. Raises: SettingsError, and what `Mesh.start` raises.
    """
    given = {key.replace("__", ".", 2): value for key, value in overrides.items()}
    waits = {f"waits.{name}": value for name, value in SHORT_WAITS.items()}
    settings = load_settings(overrides={"http.port": 0, "grpc.port": 0, **waits, **given}).settings
    mesh = Mesh(settings, plan=plan)
    try:
        await mesh.start()
        yield mesh
    finally:
        await mesh.stop()


async def read_baseline(mesh: Mesh) -> Baseline:
    """Ask every worker, the queue and the gateway what they hold now; the workers by WorkerControl.GetInfo."""
    addresses = {worker.id: worker.address for worker in mesh.topology().workers}
    held = await asyncio.gather(*(_held_by(address) for address in addresses.values()))
    topology = await mesh.gateway.refreshed_topology()
    return Baseline(
        workers={worker_id: one for worker_id, one in zip(addresses, held, strict=True) if one is not None},
        active_requests=sum(
            worker.active_requests + worker.waiting_requests
            for worker in topology.workers
            if worker.role in (WorkerRole.DECODE, WorkerRole.PREFILL)
        ),
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
        await mesh.gateway.router.changed(until=loop.time() + _LOOK_AGAIN_S)


async def _held_by(address: str) -> WorkerBaseline | None:
    """Return what a worker holds, or None if it is gone."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_control_pb2_grpc.WorkerControlStub(channel)
        try:
            info = await stub.GetInfo(worker_control_pb2.GetInfoRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError:
            return None
    return WorkerBaseline(
        used_blocks=info.used_blocks, pins=info.pins, imports=info.imports, requests=info.requests
    )
