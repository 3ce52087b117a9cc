"""`make run` and the prompts that people copy: sentences of a real forward pass, whose KV a real transport moved."""

import asyncio
import os
import re
import signal
from collections.abc import Iterable

import httpx
import pytest

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.mesh_process import WAIT_S, MeshProcess, run_kvmesh

pytestmark = pytest.mark.timeout(180)

SEEDS = {
    "Tell me a joke": "Why did the queue break up with the stack? It wanted to be served first come, first served.",
    "Which team won 2020 World Series": "The Los Angeles Dodgers won the 2020 World Series. They beat the Tampa Bay "
    "Rays in six games.",
    "Tell me a fact": "An octopus has three hearts, and two of them stop beating while it swims.",
    "This is prefill disagg serving example": "Yes, it is: one worker computes the prompt, the KV cache moves, and "
    "another worker writes this answer.",
}
BEGINNINGS = {
    "What is a KV cache?": "A KV cache keeps the keys and values",
    "What is prefill?": "Prefill reads the whole prompt",
    "What is decode?": "Decode writes the answer",
    "What is disaggregated serving?": "It means that some workers compute prompts",
    "What is a router?": "A router picks the worker",
    "What is a block?": "A block is a fixed number of tokens",
    "What is a token?": "A token is a piece of text",
    "What is a transformer?": "A transformer is a neural network",
    "What is attention?": "Attention is how a model weighs",
    "What is gRPC?": "gRPC is a way for programs",
    "What is a service mesh?": "A service mesh connects many services",
    "What is kvmesh?": "kvmesh is a mesh for model inference",
    "What is a lease?": "A lease is a task on loan",
    "Who are you?": "I am a very small language model",
    "Hello": "Hello! Ask me for a joke",
    "How are you?": "I am fine, thank you",
    "Thank you": "You are welcome.",
    "Goodbye": "Goodbye!",
    "What can you do?": "I can tell a joke or a fact",
    "Tell me a story": "Once a prompt travelled",
    "Write a poem": "A block is filled, a lease is kept",
    "Give me some advice": "Measure first",
    "Why is the sky blue?": "The sky is blue because",
    "How fast is light?": "Light travels at about",
    "What is the largest planet?": "Jupiter is the largest planet",
    "Who was the first person on the Moon?": "Neil Armstrong was the first person",
    "What is the highest mountain?": "Mount Everest is the highest mountain",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet",
    "Count to five": "One, two, three, four, five.",
    "What is Python?": "Python is a programming language",
    "What is the capital of France?": "The capital of France is Paris.",
    "Name the capital of Kenya": "The capital of Kenya is Nairobi.",
}
EXPECTED = SEEDS | BEGINNINGS
KV_BYTES_PER_TOKEN = 2 * 3 * 2 * 32 * 4
"""Keys and values, layers, KV heads, dimensions, bytes of a float32."""
BLOCK_TOKENS = 4
BETWEEN_PROCESSES = {"nixl", "shared_memory", "tcp"}
"""Transports that are no copy within one process."""


async def ask(mesh: MeshProcess, prompts: Iterable[str]) -> dict[str, str]:
    """Send all prompts at once, as curl would each, and return what was answered."""
    async with httpx.AsyncClient(base_url=mesh.http_url, trust_env=False, timeout=WAIT_S) as client:

        async def one(prompt: str) -> str:
            response = await client.post("/generate", json={"prompt": prompt, "request_id": "id_number"})
            assert response.status_code == 200, response.text
            return str(response.json()["worker_output"])

        wanted = list(prompts)
        return dict(zip(wanted, await asyncio.gather(*map(one, wanted)), strict=True))


def unexpected(answers: dict[str, str]) -> dict[str, str]:
    return {prompt: text for prompt, text in answers.items() if not text.startswith(EXPECTED[prompt])}


def test_the_default_mesh_answers_in_sentences_with_and_without_its_prefill_worker() -> None:
    prompts = list(EXPECTED)
    with MeshProcess() as mesh:
        before = asyncio.run(ask(mesh, prompts[0::2]))
        moved = mesh.topology().counters
        shown = run_kvmesh("status", "--target", mesh.grpc_address).stdout
        metrics = httpx.get(f"{mesh.http_url}/metrics", trust_env=False, timeout=WAIT_S).text
        drained = run_kvmesh("drain", "NODE3/prefill/0", "--target", mesh.grpc_address)
        after = asyncio.run(ask(mesh, prompts[1::2]))
        ended = mesh.topology().counters

    assert drained.returncode == 0, drained.stderr
    assert unexpected(before | after) == {}
    assert {prompt: text for prompt, text in (before | after).items() if prompt in SEEDS} == SEEDS
    assert moved.remote_prefills > len(before) / 2
    assert moved.kv_bytes_moved >= moved.remote_prefills * BLOCK_TOKENS * KV_BYTES_PER_TOKEN
    assert f"prefills: {moved.remote_prefills} remote" in shown
    assert "KiB of KV moved" in shown
    by_transport = dict(re.findall(r'^kvmesh_kv_bytes_moved_total\{transport="(\w+)"\} (\S+)$', metrics, re.MULTILINE))
    assert by_transport
    assert by_transport.keys() <= BETWEEN_PROCESSES
    assert ended.remote_prefills == moved.remote_prefills
    assert ended.local_prefills > moved.local_prefills
    assert ended.failed == 0
    assert mesh.logged("prefill.completed", worker_id="NODE3/prefill/0")
    assert mesh.stray_lines == []


@pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH")
def test_a_prefill_process_that_is_killed_among_the_answers_changes_none_of_them() -> None:
    prompts = list(EXPECTED)

    async def ask_all(mesh: MeshProcess) -> dict[str, str]:
        first = await ask(mesh, prompts[:4])
        rest = asyncio.ensure_future(ask(mesh, prompts[4:]))
        await asyncio.to_thread(mesh.wait_logged, "prefill.leased", process="NODE3/prefill/0")
        os.kill(int(mesh.logged("process.started", process="NODE3/prefill/0")[0]["pid"]), signal.SIGKILL)
        return first | await rest

    with MeshProcess("--processes") as mesh:
        answers = asyncio.run(ask_all(mesh))
        found = mesh.topology().counters

    assert unexpected(answers) == {}
    assert found.remote_prefills > 0
    assert found.kv_bytes_moved > 0
    assert found.failed == 0
    assert mesh.logged("process.died", process="NODE3/prefill/0")
