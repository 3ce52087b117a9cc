"""What Router.Explain says over REST of a running mesh."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from kvmesh.testing.mesh import generate, open_frontend, running_mesh

PROMPT = "A prompt that one worker has seen before. " * 20


@pytest.fixture
async def explain() -> AsyncIterator[Any]:
    """Ask a mesh of three decode workers, one of which has served PROMPT, and return status and body."""
    async with (
        running_mesh(engine__name="simulated", mesh__decode=3, mesh__prefill=0, router__seed=7) as mesh,
        open_frontend(mesh) as frontend,
        httpx.AsyncClient(base_url=f"http://{mesh.http_address}", timeout=20) as client,
    ):
        served = await generate(frontend, PROMPT, sampling={"max_tokens": 1})

        async def ask(**hints: Any) -> tuple[int, dict[str, Any]]:
            query = {"model": "simulated", "text": PROMPT, "hints": hints}
            answer = await client.post("/mesh/v1/router:explain", json={"query": query})
            return answer.status_code, {"served": served.started.worker_id, **answer.json()}

        yield ask


async def warm(explain: Any, **hints: Any) -> dict[str, Any]:
    """Return the explanation once the router has heard of the cached prompt."""
    async with asyncio.timeout(20):
        while True:
            _, body = await explain(**hints)
            if any(candidate["terms"]["overlap_blocks"] for candidate in body["explanation"]["candidates"]):
                return {"served": body["served"], **body["explanation"]}
            await asyncio.sleep(0.05)


async def test_every_candidate_is_there_with_every_term_input_and_age(explain: Any) -> None:
    explanation = await warm(explain)

    first, *others = explanation["candidates"]
    assert (first["worker_id"], first["lost"]) == (explanation["served"], "")
    assert first["cost"] == first["terms"]["prefill_cost"] + first["terms"]["decode_cost"]
    assert all(other["lost"].startswith("cost ") and other["cost"] > first["cost"] for other in others)
    for candidate in explanation["candidates"]:
        assert {"prefill_blocks", "credit_blocks", "request_cost", "overlap_blocks"} <= candidate["terms"].keys()
        assert {"active_prefill_tokens", "new_blocks", "waiting_requests", "total_blocks"} <= candidate["inputs"].keys()
        assert candidate["load_age"].endswith("s")
        assert candidate["kv_age"].endswith("s")
    assert len(others) == 2
    assert int(explanation["seed"]) > 0
    assert explanation["prefill"] == {"remote": False, "reason": "few_uncached_tokens"}


async def test_weights_of_one_request_are_those_in_force(explain: Any) -> None:
    explanation = await warm(explain, cost={"overlap_credit": 0.5, "request_weight": 3})

    knobs = explanation["knobs"]
    assert (knobs["overlap_credit"], knobs["request_weight"]) == (0.5, 3.0)
    assert (knobs["prefill_scale"], knobs["temperature"]) == (1.0, 0.0)
    first = explanation["candidates"][0]
    assert first["terms"]["credit_blocks"] == 0.5 * first["terms"]["overlap_blocks"]


async def test_who_could_not_be_chosen_is_listed_with_the_reason(explain: Any) -> None:
    explanation = await warm(explain, excluded_worker_ids=["NODE9/decode/9"])
    status, body = await explain(pinned_worker_id=explanation["served"])

    rejected = body["explanation"]["rejected"]
    assert status == 200
    assert [candidate["worker_id"] for candidate in body["explanation"]["candidates"]] == [explanation["served"]]
    assert len(rejected) == 2
    assert all(worker["reason"] == f"{explanation['served']} is pinned" for worker in rejected)
    assert all(worker["inputs"]["total_blocks"] > 0 and worker["load_age"] for worker in rejected)


@pytest.mark.parametrize(
    ("hints", "status", "says"),
    [
        ({"required_labels": {"zone": "nowhere"}}, 400, "zone=nowhere"),
        ({"pinned_worker_id": "nobody"}, 400, "nobody"),
        ({"pinned_rank": 1}, 400, "pinned_rank"),
        ({"cost": {"temperature": -1}}, 400, "temperature"),
    ],
)
async def test_hints_that_nobody_can_satisfy_are_named(
    explain: Any, hints: dict[str, Any], status: int, says: str
) -> None:
    found, body = await explain(**hints)

    assert found == status
    assert says in str(body)
