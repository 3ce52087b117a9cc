"""What workers really had cached reaches the router that predicted it, and an honest mesh raises no alarm."""

import asyncio
from typing import Any

from kvmesh import telemetry
from kvmesh.testing.mesh import generate, open_frontend, running_mesh
from kvmesh.v1 import generation_pb2

SIMULATED: dict[str, Any] = {
    "engine__name": "simulated",
    "engine__speedup": 0.5,  # a request lasts longer than the news of removed blocks takes, on a busy machine too
    "engine__options__block_size": "16",
    "engine__options__block_bytes": "4096",
    "engine__options__total_blocks": "64",
}
WITHIN_S = 10.0


async def test_predictions_are_compared_with_what_workers_had_cached() -> None:
    predicted_before = telemetry.INDEX_PREDICTED_BLOCKS._value.get()
    alarms_before = telemetry.INDEX_DRIFT_ALARMS._value.get()
    expected = 0

    async with running_mesh(mesh__decode=2, mesh__prefill=0, **SIMULATED) as mesh, open_frontend(mesh) as frontend:
        for turn in range(60):  # twice as many prompts as the pools hold, so that blocks go all the time
            prompt = chr(ord("a") + turn % 12) * 160
            answer = await generate(frontend, prompt, sampling=generation_pb2.SamplingParams(max_tokens=4))
            expected += answer.started.predicted_cached_tokens // 16
        async with asyncio.timeout(WITHIN_S):
            while telemetry.INDEX_PREDICTED_BLOCKS._value.get() - predicted_before < expected:
                await mesh.gateway.router.changed()

    assert telemetry.INDEX_PREDICTED_BLOCKS._value.get() - predicted_before == expected > 0
    assert telemetry.INDEX_DRIFT_ALARMS._value.get() == alarms_before
