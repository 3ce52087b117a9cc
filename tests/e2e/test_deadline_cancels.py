"""A deadline is gRPC's own all the way: when the client's passes, the engine stops at once."""

import time

import grpc
import pytest

from kvmesh.core.ids import AttemptKey
from kvmesh.engines.engine import Engine
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.runtime.engine_registry import EnginePlan
from kvmesh.testing.held_engine import HeldEngine
from kvmesh.testing.mesh import generate, open_frontend, read_baseline, running_mesh, wait_for_baseline

DEADLINE_S = 0.2
WITHIN_S = 0.1
TRIES = 5
"""The fastest counts: a machine that is busy with something else delays one, and not every one."""


class NotingEngine(HeldEngine):
    """Answers nothing, and notes when it is told to stop."""

    def __init__(self, *, node_name: str) -> None:
        super().__init__(node_name=node_name)
        self.cancelled_at: list[float] = []

    def cancel(self, key: AttemptKey) -> bool:
        self.cancelled_at.append(time.monotonic())
        return super().cancel(key)


async def test_the_engine_sees_the_cancel_within_100_ms_of_the_deadline_of_the_client() -> None:
    engines: list[NotingEngine] = []

    def build(node: str, *, index: int = 0, allocate: Allocate = allocate_here) -> Engine:
        engines.append(NotingEngine(node_name=node))
        return engines[-1]

    plan = EnginePlan(model_name="slow", tokenizer=None, min_uncached_tokens=1, build=build)
    codes, due_at = [], []
    async with running_mesh(plan=plan, mesh__decode=1, mesh__prefill=0) as mesh, open_frontend(mesh) as frontend:
        baseline = await read_baseline(mesh)
        for _ in range(TRIES):
            due_at.append(time.monotonic() + DEADLINE_S)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await generate(frontend, "slow", timeout_s=DEADLINE_S)
            codes.append(late.value.code())
            await wait_for_baseline(mesh, baseline)
    (engine,) = engines

    assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * TRIES
    assert len(engine.cancelled_at) == TRIES
    assert min(seen - due for seen, due in zip(engine.cancelled_at, due_at, strict=True)) < WITHIN_S
