"""A transformers model whose KV crosses processes, judged by plain transformers, and is kept from a numpy decode."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import structlog

from kvmesh.discovery.embedded_etcd import find_etcd
from kvmesh.engines.engine import Engine
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.runtime.engine_registry import plan_engine
from kvmesh.runtime.settings import EngineSettings
from kvmesh.testing.mesh import Answer, generate, open_frontend, running_mesh
from kvmesh.testing.mesh_process import MeshProcess
from kvmesh.testing.tiny_model import write_tiny_model
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2

torch = pytest.importorskip("torch", reason="torch is not installed: make install-hf")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make install-hf")

pytestmark = pytest.mark.timeout(400)

SIZE = 16
PROMPT_TOKENS = 200
OUTPUT_TOKENS = 40
BLOCK_BYTES = 2 * 2 * 2 * SIZE * 16 * 8
"""Layers, keys and values, heads, tokens, dimensions, bytes of a float64."""
GREEDY = generation_pb2.SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
BOUND_S = 240.0
START_S = 280.0
"""Every worker imports torch: seconds, and on a busy machine many."""
OPTIONS = {"dtype": "float64", "threads": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def tokens_of(seed: int, count: int = PROMPT_TOKENS) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(5, 512, count).tolist()
    return tokens


def answers_of_transformers(folder: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy answers of `generate`, in this process, without anything of ours."""
    torch.set_num_threads(1)  # more get in each other's way on a busy machine
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    answers = []
    for prompt in prompts:
        tokens = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, eos_token_id=None,
            pad_token_id=0, max_new_tokens=OUTPUT_TOKENS,
        )  # fmt: skip
        answers.append(tokens[0, len(prompt) :].tolist())
    return answers


async def ask(frontend: "frontend_pb2_grpc.FrontendAsyncStub", tokens: list[int]) -> Answer:
    prompt = generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=tokens))
    return await generate(frontend, prompt, timeout_s=BOUND_S, sampling=GREEDY)


@pytest.mark.skipif(find_etcd() is None, reason="no etcd: install kvmesh[etcd], or put etcd on the PATH")
async def test_prefill_in_one_process_and_decode_in_another_say_what_transformers_says(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.testing.mesh_process.WAIT_S", START_S)
    prompt = tokens_of(1)
    longer = [*prompt, *tokens_of(2, 60)]
    expected = answers_of_transformers(tiny, (prompt, longer))
    options = [part for name, value in OPTIONS.items() for part in ("--engine-option", f"{name}={value}")]
    config = tmp_path / "mesh.toml"
    config.write_text(
        "[waits]\nprefill_s = 60\nkv_transfer_s = 60\nfirst_token_s = 120\ntoken_gap_s = 60\n"
    )  # no fallback by slowness
    flags = ("--engine", "huggingface", "--model", str(tiny), *options, "--decode", "1", "--prefill", "1")
    mesh = await asyncio.to_thread(MeshProcess(*flags, "--processes", "--config", str(config)).__enter__)
    try:
        async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
            frontend = frontend_pb2_grpc.FrontendStub(channel)
            answers = [await ask(frontend, each) for each in (prompt, longer)]
            topology = (await frontend.GetTopology(frontend_pb2.GetTopologyRequest())).topology
    finally:
        await asyncio.to_thread(mesh.__exit__, None, None, None)

    assert [answer.token_ids for answer in answers] == expected
    assert [answer.started.prefill.remote for answer in answers] == [True, True]
    assert topology.counters.remote_prefills == 2
    assert answers[1].finished is not None
    assert answers[1].finished.usage.cached_tokens == (PROMPT_TOKENS - 1) // SIZE * SIZE
    assert topology.counters.kv_bytes_moved >= (len(longer) - 1) // SIZE * BLOCK_BYTES  # each block at least once


@pytest.mark.parametrize(
    ("mode", "reason"), [("queue", "fallback_no_capable_worker"), ("direct", "fallback_layout_mismatch")]
)
async def test_transformers_prefill_for_a_numpy_decode_is_refused_by_name(tiny: Path, mode: str, reason: str) -> None:
    numpy_plan, torch_plan = (
        plan_engine(EngineSettings(name=name, model=tiny, options=options))
        for name, options in (("numpy_llama", {"dtype": "float64"}), ("huggingface", OPTIONS))
    )
    engines: dict[str, Engine] = {}

    def build(node: str, *, index: int = 0, allocate: Allocate = allocate_here) -> Engine:
        plan = torch_plan if node == "prefills" else numpy_plan
        engines[node] = plan.build(node, index=index, allocate=allocate)
        return engines[node]

    prompt = tokens_of(3)
    (expected,) = answers_of_transformers(tiny, [prompt])
    async with (
        running_mesh(
            plan=replace(numpy_plan, build=build),
            mesh__decode=1,
            mesh__prefill=1,
            mesh__node_names="decodes,prefills",
            remote_prefill__mode=mode,
        ) as mesh,
        open_frontend(mesh) as frontend,
    ):
        with structlog.testing.capture_logs() as log:
            answer = await ask(frontend, prompt)

    assert answer.token_ids == expected
    assert (answer.started.prefill.remote, answer.started.prefill.reason) == (False, reason)
    said = "\n".join(str(line) for line in log)
    for engine in engines.values():
        assert engine.info.layout is not None
        assert engine.info.layout.order in said
        assert engine.info.layout.model_fingerprint in said
