"""The huggingface engine: what transformers' own `generate` says, whatever the batch, the chunks and the device."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvmesh.engines.engine import Engine, EngineRequest, Sampling
from kvmesh.engines.huggingface_options import HuggingFaceOptions
from kvmesh.engines.numpy_llama import NumpyLlamaEngine
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions
from kvmesh.engines.numpy_llama_weights import load_weights
from kvmesh.testing.engine_contract import NOTHING_HELD, attempt, held, prompt_tokens, run_all, token_request
from kvmesh.testing.tiny_model import write_tiny_model

torch = pytest.importorskip("torch", reason="torch is not installed: make install-hf")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make install-hf")

if TYPE_CHECKING:
    from kvmesh.engines.huggingface_model import HuggingFaceModel

SIZE = 16
OUTPUT_TOKENS = 24

SMALL = {
    "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {**GROUPED, "head_dim": 24},
    "mistral": {**GROUPED, "sliding_window": None},
    "mixtral": {**GROUPED, "sliding_window": None, "num_local_experts": 4},
    "gpt_neox": {**SMALL, "intermediate_size": 96},
    "gpt2": {"vocab_size": 300, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3},
    "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 48, "init_std": 0.3},
    "bloom": {"vocab_size": 300, "hidden_size": 48, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "falcon": {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
}
"""Position encodings of every sort: rotary whole and in part, learned, counted from the mask, and as slopes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def write_model(folder: Path, kind: str) -> Path:
    """Write a small model of one architecture, its weights drawn at random."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
    return folder / kind


@cache
def load(folder: Path, dtype: str = "float64") -> "HuggingFaceModel":
    from kvmesh.engines.huggingface_model import load_model

    return load_model(folder, dtype=dtype, device="cpu", threads=1)


def make(folder: Path, **changes: Any) -> Engine:
    from kvmesh.engines.huggingface import HuggingFaceEngine

    options = HuggingFaceOptions(**{"total_blocks": 128, "block_size": SIZE, "dtype": "float64", **changes})
    return HuggingFaceEngine(load(folder, options.dtype), options)


def request_of(engine: Engine, number: int, *, prompt: int, **changes: Any) -> EngineRequest:
    tokens = prompt_tokens(number, prompt, vocab_size=engine.info.vocab_size)
    return token_request(engine.info, number, tokens, **{"max_tokens": OUTPUT_TOKENS, **changes})


def answer_alone(engine: Engine, request: EngineRequest) -> list[int]:
    engine.submit(request)
    return run_all(engine).answers[request.key].token_ids


def answer_of_transformers(folder: Path, prompt: Sequence[int], *, dtype: str = "float64") -> list[int]:
    tokens = load(folder, dtype).module.generate(
        torch.tensor([list(prompt)]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        eos_token_id=None, pad_token_id=0, max_new_tokens=OUTPUT_TOKENS,
    )  # fmt: skip
    answer: list[int] = tokens[0, len(prompt) :].tolist()
    return answer


@pytest.fixture(scope="module")
def tiny(folders: Path) -> Path:
    return write_tiny_model(folders / "tiny")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_in_one_batch_are_those_that_generate_gives_alone(folders: Path, kind: str) -> None:
    folder = write_model(folders, kind)
    dtype = "float32" if kind == "mixtral" else "float64"  # its kernel for experts has no float64
    engine = make(folder, max_batched_tokens=40, dtype=dtype)
    requests = [request_of(engine, number, prompt=prompt) for number, prompt in ((1, 9), (2, 50), (3, 33), (4, 120))]
    for request in requests:
        engine.submit(request)

    answers = run_all(engine).answers

    found = [answers[request.key].token_ids for request in requests]
    assert found == [answer_of_transformers(folder, request.token_ids.tolist(), dtype=dtype) for request in requests]  # type: ignore[union-attr]  # token requests
    assert len(set(map(tuple, found))) == len(found)
    assert min(len(set(tokens)) for tokens in found) > 2
    assert held(engine) == NOTHING_HELD


def test_cached_prefix_and_chunks_change_no_token(tiny: Path) -> None:
    engine = make(tiny, max_batched_tokens=7)
    tokens = prompt_tokens(1, 100, vocab_size=512)
    longer = np.concatenate((tokens, prompt_tokens(2, 30, vocab_size=512)))
    answer_alone(engine, token_request(engine.info, 1, tokens, max_tokens=1))

    engine.submit(token_request(engine.info, 2, longer, max_tokens=OUTPUT_TOKENS))
    answer = run_all(engine).answers[attempt(2)]

    assert answer.prompt_output.cached_tokens == 96
    assert answer.token_ids == answer_of_transformers(tiny, longer.tolist())


def test_other_blocks_give_other_tokens(tiny: Path) -> None:
    """What is read comes from the pool, and from nowhere else."""
    engine = make(tiny)
    request = request_of(engine, 1, prompt=100)
    expected = answer_alone(engine, request)
    pin = engine.pin_prefix(request.block_hashes)
    memory = engine.kv_memory()
    assert memory is not None
    memory[pin.block_ids[3]] = 0

    changed = answer_alone(engine, request)

    assert changed != expected


def test_answers_are_those_of_numpy_llama(tiny: Path) -> None:
    """Two implementations of one architecture, in float64; a draw by a seed is the same too."""
    numpy_options = NumpyLlamaOptions(total_blocks=128, block_size=SIZE, dtype="float64")
    ours, theirs = make(tiny), NumpyLlamaEngine(load_weights(tiny, dtype="float64"), numpy_options)
    sampled = Sampling(max_tokens=OUTPUT_TOKENS, temperature=1.2, top_p=0.9, seed=5, logprobs=3)

    answers = []
    for engine in (ours, theirs):
        engine.submit(request_of(engine, 1, prompt=60))
        engine.submit(request_of(engine, 2, prompt=45, sampling=sampled))
        answers.append(run_all(engine).answers)

    mine, other = answers
    assert [mine[attempt(number)].token_ids for number in (1, 2)] == [other[attempt(n)].token_ids for n in (1, 2)]
    told, wanted = (each[attempt(2)].outputs[0].logprobs[0] for each in (mine, other))
    assert told.top_token_ids == wanted.top_token_ids
    np.testing.assert_allclose(told.top_logprobs, wanted.top_logprobs, atol=1e-4)
    ours_layout, their_layout = ours.info.layout, theirs.info.layout
    assert ours_layout is not None
    assert their_layout is not None
    assert ours_layout.bytes_per_block == their_layout.bytes_per_block
    assert ours_layout.order != their_layout.order
    assert ours_layout.model_fingerprint != their_layout.model_fingerprint


def test_bfloat16_says_what_generate_says(tiny: Path) -> None:
    engine = make(tiny, dtype="bfloat16")
    request = request_of(engine, 1, prompt=40, max_tokens=6)
    assert request.token_ids is not None

    tokens = answer_alone(engine, request)

    expected = answer_of_transformers(tiny, request.token_ids.tolist(), dtype="bfloat16")
    assert tokens[:3] == expected[:3]  # later ones may be near-ties: bfloat16 has 8 bits of them
    assert engine.info.layout is not None
    assert (engine.info.layout.dtype, engine.info.layout.bytes_per_block) == ("bfloat16", 2 * 2 * 2 * SIZE * 16 * 2)


def test_end_of_sequence_ends_unless_ignored(tiny: Path) -> None:
    request = request_of(make(tiny), 1, prompt=20)
    tokens = answer_alone(make(tiny), request)
    engine = make(tiny, eos_token_ids=(tokens[3],))
    heeding = Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0)
    asked = token_request(engine.info, 2, prompt_tokens(1, 20, vocab_size=512), sampling=heeding)

    assert answer_alone(engine, asked) == tokens[: tokens.index(tokens[3]) + 1]
    assert answer_alone(engine, request) == tokens


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_blocks_move_between_memories_of_another_device(tiny: Path, is_mirrored: bool) -> None:
    """A GPU's blocks live twice: computed ones show in memory, and those that arrive there are read."""
    from kvmesh.engines.huggingface_kv import BlockKv
    from kvmesh.engines.huggingface_model import compute
    from kvmesh.engines.numpy_llama_forward import Span

    model = load(tiny)
    tokens = prompt_tokens(1, 9, vocab_size=512)
    sent, got = (np.zeros((4, model.shape.block_bytes(4)), dtype=np.uint8) for _ in range(2))
    here, there = (
        BlockKv(memory, model.shape, block_size=4, device="cpu", is_mirrored=is_mirrored) for memory in (sent, got)
    )
    expected = compute(model, [Span(tokens, 0, [2, 0, 1])], here)
    there.expect([3, 1])
    blank = [there.is_whole(block) for block in (3, 1)]
    got[[3, 1]] = sent[[2, 0]]

    found = compute(model, [Span(tokens[8:], 8, [3, 1, 2])], there)

    assert blank == [False, False]
    assert all(there.is_whole(block) for block in (3, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[2].view(np.float64), sent[1].view(np.float64), rtol=1e-6, atol=1e-9)
