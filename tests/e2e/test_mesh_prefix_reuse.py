"""The simulated engine: prompts go where their prefix is cached, and the worker holds what the router predicted."""

import asyncio
from typing import Any

from kvmesh.runtime.mesh import Mesh
from kvmesh.testing.mesh import Answer, generate, open_frontend, read_baseline, running_mesh, wait_for_baseline
from kvmesh.v1 import generation_pb2, router_pb2
from kvmesh.wire.routing import query_from_proto

BLOCK_TOKENS = 16
PROMPT_TOKENS = 320
CAP_TOKENS = 304
"""Full blocks that may be reused: the last token is always computed, so block 20 of 20 is not."""
SIMULATED: dict[str, Any] = {
    "engine__name": "simulated",
    "engine__speedup": 0,
    "engine__options__block_size": str(BLOCK_TOKENS),
    "engine__options__block_bytes": "4096",
    "remote_prefill__min_uncached_tokens": 64,
}
WITHIN_S = 5.0


def prompt_of(letter: str) -> str:
    """Return a prompt of its own first block on: the byte tokenizer makes a token of each letter."""
    return letter * PROMPT_TOKENS


def sampling(max_tokens: int = 4) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(max_tokens=max_tokens)


async def wait_indexed(mesh: Mesh, prompt: str, answer: Answer) -> None:
    """Wait until the router has heard that the answer's worker caches the whole prompt."""
    wanted = router_pb2.RoutingQuery(
        model="simulated", token_ids=generation_pb2.TokenIds(token_ids=list(prompt.encode()))
    )
    router = mesh.gateway.router
    query = query_from_proto(wanted, block_sizes=frozenset({BLOCK_TOKENS}))
    async with asyncio.timeout(WITHIN_S):
        while not any(
            blocks * BLOCK_TOKENS >= CAP_TOKENS and worker.worker_id == answer.started.worker_id
            for worker, blocks in router.overlaps(query).items()
        ):
            await router.changed()


async def test_a_repeated_prompt_goes_to_the_worker_that_holds_it_as_predicted() -> None:
    async with running_mesh(mesh__decode=3, mesh__prefill=0, **SIMULATED) as mesh, open_frontend(mesh) as frontend:
        for letter in "abcd":
            first = await generate(frontend, prompt_of(letter), sampling=sampling())
            await wait_indexed(mesh, prompt_of(letter), first)

            second = await generate(frontend, prompt_of(letter), sampling=sampling())

            assert first.finished is not None
            assert second.finished is not None
            assert first.started.predicted_cached_tokens == first.finished.usage.cached_tokens == 0
            assert second.started.worker_id == first.started.worker_id
            assert second.started.predicted_cached_tokens == second.finished.usage.cached_tokens == CAP_TOKENS
        counters = mesh.topology().counters
        assert counters.requests == 8
        assert counters.cached_tokens == counters.predicted_cached_tokens == 4 * CAP_TOKENS
        assert counters.prompt_tokens == 8 * PROMPT_TOKENS
        assert counters.completion_tokens == 8 * 4
        assert (counters.remote_prefills, counters.local_prefills) == (0, 8)


async def test_a_remote_prefill_moves_the_blocks_once_and_the_repeat_needs_none() -> None:
    async with running_mesh(mesh__decode=2, mesh__prefill=1, **SIMULATED) as mesh, open_frontend(mesh) as frontend:
        baseline = await read_baseline(mesh)
        first = await generate(frontend, prompt_of("x"), sampling=sampling())
        await wait_indexed(mesh, prompt_of("x"), first)

        second = await generate(frontend, prompt_of("x"), sampling=sampling())

        assert first.finished is not None
        assert second.finished is not None
        assert first.started.prefill.remote
        assert first.finished.usage.remote_prefill_tokens == CAP_TOKENS
        assert first.finished.usage.kv_bytes_moved == CAP_TOKENS // BLOCK_TOKENS * 4096
        assert first.finished.usage.cached_tokens == 0
        assert not second.started.prefill.remote
        assert second.started.prefill.reason == "few_uncached_tokens"
        assert second.finished.usage.kv_bytes_moved == 0
        assert second.finished.usage.cached_tokens == second.started.predicted_cached_tokens == CAP_TOKENS
        counters = mesh.topology().counters
        assert counters.kv_bytes_moved == CAP_TOKENS // BLOCK_TOKENS * 4096
        assert (counters.remote_prefills, counters.local_prefills) == (1, 1)
        await wait_for_baseline(mesh, baseline)


async def test_a_remote_prefill_gives_the_tokens_that_a_local_one_gives() -> None:
    greedy = generation_pb2.SamplingParams(max_tokens=24, temperature=0, seed=7)
    answers = []
    for prefill in (0, 1):
        async with (
            running_mesh(mesh__decode=1, mesh__prefill=prefill, **SIMULATED) as mesh,
            open_frontend(mesh) as frontend,
        ):
            answers.append(await generate(frontend, prompt_of("y"), sampling=greedy))

    local, remote = answers
    assert (local.started.prefill.remote, remote.started.prefill.remote) == (False, True)
    assert len(local.token_ids) == 24
    assert remote.token_ids == local.token_ids
    assert remote.text == local.text
