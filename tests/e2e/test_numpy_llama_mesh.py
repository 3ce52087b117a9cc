"""A mesh around a real model: KV that moves between workers gives the tokens that KV computed in place gives."""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
import pytest

from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.mesh import Answer, generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.v1 import generation_pb2, router_pb2, worker_control_pb2, worker_control_pb2_grpc
from kvmesh.wire.routing import query_from_proto

BLOCK_TOKENS = 16
PROMPT_TOKENS = 300
CAP_TOKENS = 288
"""Full blocks of 300 tokens."""
BLOCK_BYTES = 2 * 2 * BLOCK_TOKENS * 2 * 16 * 8
"""Layers, keys and values, tokens, KV heads, dimensions, bytes of a float64."""
OUTPUT_TOKENS = 64
WITHIN_S = 5.0
ONE_TOKEN = generation_pb2.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
GREEDY = generation_pb2.SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a mesh around the tiny model, in float64."""
    return {
        "engine__name": "numpy_llama",
        "engine__model": write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"),
        "engine__options__dtype": "float64",
    }


def tokens_of(seed: int, *, count: int = PROMPT_TOKENS) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(5, 512, count).tolist()
    return tokens


def prompt_of(tokens: list[int]) -> generation_pb2.Prompt:
    return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=tokens))


async def prefill_counters(mesh: Mesh) -> Mapping[str, int]:
    """Ask the one prefill worker what it has done."""
    topology = await mesh.gateway.refreshed_topology()
    (address,) = (worker.address for worker in topology.workers if worker.role == "prefill")
    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_control_pb2_grpc.WorkerControlStub(channel)
        info = await stub.GetInfo(worker_control_pb2.GetInfoRequest(), timeout=WITHIN_S)
    return info.counters


async def wait_indexed(mesh: Mesh, tokens: list[int], answer: Answer, *, cached_tokens: int = CAP_TOKENS) -> None:
    """Wait until the router has heard that the answer's worker caches so much of a prompt."""
    wanted = router_pb2.RoutingQuery(model="tiny", token_ids=generation_pb2.TokenIds(token_ids=tokens))
    router = mesh.gateway.router
    query = query_from_proto(wanted, block_sizes=frozenset({BLOCK_TOKENS}))
    async with asyncio.timeout(WITHIN_S):
        while not any(
            blocks * BLOCK_TOKENS >= cached_tokens and worker.worker_id == answer.started.worker_id
            for worker, blocks in router.overlaps(query).items()
        ):
            await router.changed()


async def test_remote_prefill_gives_the_tokens_of_an_aggregated_mesh_and_its_bytes_are_counted(
    llama: dict[str, Any],
) -> None:
    tokens = tokens_of(1)
    async with running_mesh(mesh__decode=1, mesh__prefill=0, **llama) as mesh, open_frontend(mesh) as frontend:
        local = await generate(frontend, prompt_of(tokens), sampling=GREEDY)

    async with running_mesh(mesh__decode=2, mesh__prefill=1, **llama) as mesh, open_frontend(mesh) as frontend:
        baseline = await read_baseline(mesh)
        remote = await generate(frontend, prompt_of(tokens), sampling=GREEDY)
        counters = mesh.topology().counters
        await wait_for_baseline(mesh, baseline)

    assert local.finished is not None
    assert remote.finished is not None
    assert (local.started.prefill.remote, remote.started.prefill.remote) == (False, True)
    assert len(local.token_ids) == OUTPUT_TOKENS
    assert len(set(local.token_ids)) > OUTPUT_TOKENS // 2
    assert remote.token_ids == local.token_ids
    assert remote.text == local.text
    assert remote.finished.usage.remote_prefill_tokens == CAP_TOKENS
    assert remote.finished.usage.kv_bytes_moved == CAP_TOKENS // BLOCK_TOKENS * BLOCK_BYTES
    assert (counters.remote_prefills, counters.kv_bytes_moved) == (1, CAP_TOKENS // BLOCK_TOKENS * BLOCK_BYTES)


async def test_second_request_with_the_prefix_finds_it_as_predicted(llama: dict[str, Any]) -> None:
    tokens = tokens_of(2)
    longer = [*tokens, *tokens_of(3, count=40)]
    async with running_mesh(mesh__decode=1, mesh__prefill=0, **llama) as mesh, open_frontend(mesh) as frontend:
        expected = await generate(frontend, prompt_of(longer), sampling=GREEDY)

    async with running_mesh(mesh__decode=2, mesh__prefill=1, **llama) as mesh, open_frontend(mesh) as frontend:
        first = await generate(frontend, prompt_of(tokens), sampling=GREEDY)
        await wait_indexed(mesh, tokens, first)

        second = await generate(frontend, prompt_of(longer), sampling=GREEDY)

        assert first.finished is not None
        assert second.finished is not None
        assert second.started.worker_id == first.started.worker_id
        assert second.started.predicted_cached_tokens == second.finished.usage.cached_tokens == CAP_TOKENS
        assert second.token_ids == expected.token_ids
        counters = mesh.topology().counters
        assert counters.cached_tokens == counters.predicted_cached_tokens == CAP_TOKENS


async def test_prompt_whose_prefix_only_decode_holds_has_only_the_rest_computed_elsewhere(
    llama: dict[str, Any],
) -> None:
    tokens = tokens_of(4)
    head_blocks = 6
    head = tokens[: head_blocks * BLOCK_TOKENS + 1]  # too short to be sent away
    async with running_mesh(mesh__decode=1, mesh__prefill=0, **llama) as mesh, open_frontend(mesh) as frontend:
        expected = await generate(frontend, prompt_of(tokens), sampling=GREEDY)

    settings = llama | {"remote_prefill__min_uncached_tokens": 100}
    async with running_mesh(mesh__decode=1, mesh__prefill=1, **settings) as mesh, open_frontend(mesh) as frontend:
        baseline = await read_baseline(mesh)
        first = await generate(frontend, prompt_of(head), sampling=ONE_TOKEN)
        await wait_indexed(mesh, tokens, first, cached_tokens=head_blocks * BLOCK_TOKENS)
        before = await prefill_counters(mesh)

        second = await generate(frontend, prompt_of(tokens), sampling=GREEDY)

        after = await prefill_counters(mesh)
        await wait_for_baseline(mesh, baseline)

    assert (first.started.prefill.remote, second.started.prefill.remote) == (False, True)
    assert (before["computed_tokens"], before["prefix_tokens"]) == (0, 0)
    assert after["prefix_tokens"] == head_blocks * BLOCK_TOKENS
    assert after["computed_tokens"] == CAP_TOKENS - head_blocks * BLOCK_TOKENS
    assert second.finished is not None
    assert second.started.predicted_cached_tokens == second.finished.usage.cached_tokens == head_blocks * BLOCK_TOKENS
    assert second.finished.usage.kv_bytes_moved == CAP_TOKENS // BLOCK_TOKENS * BLOCK_BYTES, "the prefix and the rest"
    assert second.token_ids == expected.token_ids
    assert len(second.token_ids) == OUTPUT_TOKENS


async def test_requests_at_once_each_get_the_answer_they_get_alone(llama: dict[str, Any]) -> None:
    prompts = [tokens_of(seed, count=60 + 30 * seed) for seed in range(6)]
    async with running_mesh(mesh__decode=1, mesh__prefill=0, **llama) as mesh, open_frontend(mesh) as frontend:
        alone = [await generate(frontend, prompt_of(tokens), sampling=GREEDY) for tokens in prompts]

    async with running_mesh(mesh__decode=2, mesh__prefill=1, **llama) as mesh, open_frontend(mesh) as frontend:
        together = await asyncio.gather(*(generate(frontend, prompt_of(tokens), sampling=GREEDY) for tokens in prompts))

    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


async def test_chat_is_rendered_by_the_template_of_the_folder(llama: dict[str, Any]) -> None:
    message = generation_pb2.ChatMessage(role="user", content="Tell me a joke about a queue.")
    sampling = generation_pb2.SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=5)
    async with running_mesh(mesh__decode=1, mesh__prefill=0, **llama) as mesh, open_frontend(mesh) as frontend:
        answers = [
            await generate(
                frontend,
                generation_pb2.Prompt(messages=generation_pb2.ChatMessages(messages=[message])),
                sampling=sampling,
            )
            for _ in range(2)
        ]

    assert answers[0].finished is not None
    assert answers[0].finished.usage.prompt_tokens > 3
    assert answers[0].token_ids == answers[1].token_ids != []
