"""The four prompts of the walk-through, by curl's door: POST /generate, engine echo."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest

from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.mesh import generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.v1 import frontend_pb2, worker_control_pb2, worker_control_pb2_grpc

PROMPTS = (
    "Tell me a joke",
    "Which team won 2020 World Series",
    "Tell me a fact",
    "This is prefill disagg serving example",
)
LANDINGS = "ABAA"
"""Which worker each prompt goes to, the first one's being A: by similarity, else by load."""
ASK_S = 10.0


@asynccontextmanager
async def http_client(mesh: Mesh) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{mesh.http_address}", trust_env=False, timeout=ASK_S) as client:
        yield client


async def post_all(mesh: Mesh) -> list[str]:
    """Send the four prompts, one after the other, and return the node that answered each."""
    nodes = []
    async with http_client(mesh) as client:
        for prompt in PROMPTS:
            response = await client.post(
                "/generate",
                json={"prompt": prompt, "request_id": "id_number"},
                headers={"accept": "text/event-stream"},
            )
            assert response.status_code == 200, response.text
            assert response.headers["content-type"] == "application/json"
            body = response.json()
            assert body.keys() == {"worker_output", "request_id"}
            assert body["request_id"] == "id_number"
            text, _, node = body["worker_output"].rpartition("_GeneratedBy_")
            assert text == prompt
            nodes.append(node)
    return nodes


@pytest.mark.parametrize("prefill", [0, 1], ids=["aggregated", "disaggregated"])
async def test_the_four_prompts_land_as_listed(prefill: int) -> None:
    async with running_mesh(mesh__prefill=prefill, router__policy="prompt_similarity") as mesh:
        baseline = await read_baseline(mesh)

        nodes = await post_all(mesh)

        assert set(nodes) == {"NODE1", "NODE2"}
        named = {nodes[0]: "A", nodes[1]: "B"}
        assert "".join(named[node] for node in nodes) == LANDINGS
        await wait_for_baseline(mesh, baseline)


async def test_the_prefill_worker_takes_every_task_of_the_disaggregated_walkthrough() -> None:
    async with running_mesh(router__policy="prompt_similarity") as mesh:
        await post_all(mesh)

        topology = await mesh.gateway.refreshed_topology()
        assert topology.counters.remote_prefills == len(PROMPTS)
        assert topology.counters.local_prefills == 0
        assert topology.queue.completed == len(PROMPTS)
        counters = {str(worker.identity.worker_id): (await worker.describe()).counters for worker in mesh.workers}
        assert counters["NODE3/prefill/0"]["tasks"] == len(PROMPTS)
        assert counters["NODE1/decode/0"]["remote_prefills"] + counters["NODE2/decode/1"]["remote_prefills"] == 4


async def test_each_streamed_request_says_that_its_prefill_was_remote() -> None:
    async with running_mesh() as mesh, open_frontend(mesh) as frontend:
        answers = [await generate(frontend, prompt, client_request_id="id_number") for prompt in PROMPTS]

        assert [answer.started.prefill.remote for answer in answers] == [True] * len(PROMPTS)
        assert {answer.started.client_request_id for answer in answers} == {"id_number"}
        assert len({answer.started.request_id for answer in answers}) == len(PROMPTS)
        assert all(answer.finished is not None for answer in answers)


async def test_after_the_drain_of_the_prefill_worker_the_next_prefill_is_local() -> None:
    async with (
        running_mesh() as mesh,
        open_frontend(mesh) as frontend,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
    ):
        control = worker_control_pb2_grpc.WorkerControlStub(channel)
        before = await generate(frontend, "Tell me a joke")

        drained = await control.Drain(worker_control_pb2.DrainRequest(worker_id="NODE3/prefill/0"), timeout=ASK_S)
        after = await generate(frontend, "Tell me a fact")

        assert before.started.prefill.remote
        assert (drained.finished, drained.cancelled) == (0, 0)
        assert not after.started.prefill.remote
        assert after.started.prefill.reason == "no_prefill_worker"
        assert after.text.startswith("Tell me a fact_GeneratedBy_NODE")
        states = {worker.id: worker.state for worker in mesh.topology().workers}
        assert states["NODE3/prefill/0"] == frontend_pb2.WORKER_STATE_DRAINING


async def test_a_client_without_a_prompt_is_told_so() -> None:
    async with running_mesh() as mesh, http_client(mesh) as client:
        response = await client.post("/generate", json={"prompt": "", "request_id": "id_number"})

        assert response.status_code == 400
        assert response.json()["details"][0]["reason"] == "EMPTY_PROMPT"


async def test_an_answer_that_was_cut_short_says_so() -> None:
    prompt = " ".join(["word"] * 200)
    async with running_mesh(mesh__prefill=0) as mesh, http_client(mesh) as client:
        cut = (await client.post("/generate", json={"prompt": prompt})).json()
        sampling = {"max_tokens": 300}
        whole = (await client.post("/generate", json={"prompt": prompt, "sampling": sampling})).json()

    assert cut["finish_reason"] == "FINISH_REASON_LENGTH"
    assert len(cut["worker_output"].split()) == 128
    assert whole.keys() == {"worker_output", "request_id"}
    assert whole["worker_output"].startswith(f"{prompt}_GeneratedBy_NODE")
