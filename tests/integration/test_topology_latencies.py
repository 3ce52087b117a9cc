"""How long requests waited lately, as the topology says it."""

from typing import Any

import pytest

from kvmesh.services.request_totals import RequestTotals
from kvmesh.testing.mesh import generate, open_frontend, running_mesh
from kvmesh.v1 import frontend_pb2, generation_pb2

REQUESTS = 4


def seconds(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)


@pytest.mark.parametrize("processor", ["inside", "separate"])
async def test_the_topology_has_quantiles_of_what_requests_waited_for_tokens(processor: str) -> None:
    sampling = generation_pb2.SamplingParams(max_tokens=8, ignore_eos=True)
    async with running_mesh(
        engine__name="simulated", mesh__decode=1, mesh__prefill=0, mesh__processor=processor
    ) as mesh:
        before = await mesh.gateway.refreshed_topology()
        async with open_frontend(mesh) as frontend:
            for number in range(REQUESTS):
                await generate(frontend, f"a prompt {number}", sampling=sampling)
            await generate(frontend, "one token", sampling=generation_pb2.SamplingParams(max_tokens=1))
        after = (await mesh.gateway.refreshed_topology()).latencies

    first, between = after.time_to_first_token, after.inter_token_time
    assert before.latencies.time_to_first_token == frontend_pb2.LatencyQuantiles()
    assert seconds(after.window) == 10
    assert (first.requests, between.requests) == (REQUESTS + 1, REQUESTS)
    assert 0 < seconds(first.p50) <= seconds(first.p90) <= seconds(first.p99) < 20
    assert 0 < seconds(between.p50) <= seconds(between.p99) < 20


def test_inter_token_time_is_the_mean_of_the_gaps_and_one_token_has_none() -> None:
    totals = RequestTotals()

    totals.begin_output(after_s=0.5, now=1.0)
    totals.end_output(output_s=3.0, tokens=4, now=4.0)
    totals.end_output(output_s=3.0, tokens=1, now=4.0)
    samples = totals.latencies(now=4.0)

    assert list(samples.times_to_first_token_s) == [0.5]
    assert list(samples.inter_token_times_s) == [1.0]
