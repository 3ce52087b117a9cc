"""A real model whose KV crosses processes: the tokens are those of one process, to the last one."""

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.testing.mesh import Answer, generate, open_frontend, running_mesh
from kvmesh.testing.mesh_process import MeshProcess
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.v1 import (
    frontend_pb2,
    frontend_pb2_grpc,
    generation_pb2,
    router_pb2,
    router_pb2_grpc,
    worker_control_pb2,
    worker_control_pb2_grpc,
)

pytestmark = [
    pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH"),
    pytest.mark.timeout(180),
]

PROMPT_TOKENS = 300
CAP_TOKENS = 288
HELD_TOKENS = 96
GREEDY = generation_pb2.SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
BOUND_S = 30.0


def tokens_of(seed: int, count: int = PROMPT_TOKENS) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(5, 512, count).tolist()
    return tokens


def prompt_of(tokens: list[int]) -> generation_pb2.Prompt:
    return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=tokens))


async def ask(channel: grpc.aio.Channel, tokens: list[int], *, max_tokens: int = 64) -> Answer:
    wanted = generation_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return await generate(
        frontend_pb2_grpc.FrontendStub(channel), prompt_of(tokens), timeout_s=BOUND_S, sampling=wanted
    )


async def wait_cached(channel: grpc.aio.Channel, tokens: list[int], cached_tokens: int) -> None:
    """Wait until the router has heard that some worker caches so much of a prompt."""
    router = router_pb2_grpc.RouterStub(channel)
    query = router_pb2.RoutingQuery(model="tiny", token_ids=generation_pb2.TokenIds(token_ids=tokens))
    deadline = asyncio.get_running_loop().time() + BOUND_S
    while True:
        overlaps = (await router.GetOverlaps(router_pb2.GetOverlapsRequest(query=query))).overlaps
        if any(each.blocks * each.block_size >= cached_tokens for each in overlaps):
            return
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


async def prefill_info(channel: grpc.aio.Channel) -> worker_control_pb2.GetInfoResponse:
    frontend = frontend_pb2_grpc.FrontendStub(channel)
    topology = (await frontend.GetTopology(frontend_pb2.GetTopologyRequest())).topology
    (address,) = (worker.address for worker in topology.workers if worker.role == "prefill")
    async with grpc.aio.insecure_channel(address) as direct:
        stub = worker_control_pb2_grpc.WorkerControlStub(direct)
        return await stub.GetInfo(worker_control_pb2.GetInfoRequest(), timeout=BOUND_S)


async def test_remote_prefill_prefix_reuse_and_prefix_handoff_give_the_tokens_of_one_process(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    prompt, held = tokens_of(1), tokens_of(2, HELD_TOKENS + 4)
    longer = [*prompt, *tokens_of(3, 40)]
    with_held_prefix = [*held[:HELD_TOKENS], *tokens_of(4, PROMPT_TOKENS - HELD_TOKENS)]
    prompts = (prompt, longer, with_held_prefix)
    async with (
        running_mesh(
            mesh__decode=1, mesh__prefill=0, engine__name="numpy_llama", engine__model=folder,
            engine__options__dtype="float64",
        ) as aggregated,
        open_frontend(aggregated) as frontend,
    ):  # fmt: skip
        expected = [await generate(frontend, prompt_of(each), sampling=GREEDY) for each in prompts]

    flags = ("--engine", "numpy_llama", "--model", str(folder), "--dtype", "float64", "--decode", "2", "--prefill", "1")
    config = tmp_path / "mesh.toml"
    config.write_text("[remote_prefill]\nmin_uncached_tokens = 128\n")
    mesh = await asyncio.to_thread(MeshProcess(*flags, "--processes", "--config", str(config)).__enter__)
    try:
        async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
            first = await ask(channel, prompt)
            await wait_cached(channel, prompt, CAP_TOKENS)
            second = await ask(channel, longer)
            await ask(channel, held, max_tokens=1)  # below the threshold: computed, and so held, by decode alone
            await wait_cached(channel, held, HELD_TOKENS)
            before = (await prefill_info(channel)).counters
            third = await ask(channel, with_held_prefix)
            after = (await prefill_info(channel)).counters
            topology = (await frontend_pb2_grpc.FrontendStub(channel).GetTopology(_ASK)).topology
    finally:
        await asyncio.to_thread(mesh.__exit__, None, None, None)

    answers = (first, second, third)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert [answer.started.prefill.remote for answer in answers] == [True, False, True]
    assert second.finished is not None
    assert second.started.predicted_cached_tokens == second.finished.usage.cached_tokens == CAP_TOKENS
    assert after["computed_tokens"] - before["computed_tokens"] == CAP_TOKENS - HELD_TOKENS
    assert after["prefix_tokens"] - before["prefix_tokens"] == HELD_TOKENS
    assert topology.counters.remote_prefills == 2
    assert topology.counters.kv_bytes_moved > 0


_ASK = frontend_pb2.GetTopologyRequest()
