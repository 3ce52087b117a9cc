"""The forward pass against a naive twin: whole sequences, no cache, one token, one head and one dimension at a time."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from kvmesh.engines.numpy_llama_config import LlamaConfig
from kvmesh.engines.numpy_llama_forward import LlamaForward, Span
from kvmesh.engines.numpy_llama_weights import Floats, load_weights
from kvmesh.testing.tiny_model import write_tiny_model

SMALL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one_head_each": {"num_key_value_heads": 4},
    "one_head_for_all": {"num_key_value_heads": 1},
    "head_dim_of_its_own": {"head_dim": 8},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_theta": 500_000.0},
    "llama3": {"rope_scaling": LLAMA3, "head_dim": 12},
    "rope_parameters": {"rope_theta": None, "rope_parameters": {"rope_theta": 777.0, **LLAMA3}},
}


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a small model of random weights as float32."""
    config = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q_size, kv_size = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (
            ("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,)),
            ("self_attn.q_proj", (q_size, hidden)), ("self_attn.k_proj", (kv_size, hidden)),
            ("self_attn.v_proj", (kv_size, hidden)), ("self_attn.o_proj", (hidden, q_size)),
            ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)), ("mlp.down_proj", (hidden, inner)),
        ):  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    rng = np.random.default_rng(5)
    tensors = {name: rng.normal(0.0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


class NaiveLlama:
    """Reads the folder for itself and shares nothing with the engine."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        stored = load_file(str(folder / "model.safetensors"))
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in stored.items()}
        self.heads: int = self.config["num_attention_heads"]
        self.kv_heads: int = self.config["num_key_value_heads"]
        self.dim: int = self.config.get("head_dim", self.config["hidden_size"] // self.heads)

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float64]:
        """Return the logits after the last token."""
        rows = [self.tensors["model.embed_tokens.weight"][token] for token in tokens]
        for layer in range(self.config["num_hidden_layers"]):
            rows = self._layer(f"model.layers.{layer}.", rows)
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return np.asarray(head.dot(self._norm(rows[-1], "model.norm.weight")))

    def _layer(self, prefix: str, rows: list[Any]) -> list[Any]:
        normed = [self._norm(row, f"{prefix}input_layernorm.weight") for row in rows]
        queries, keys, values = (
            [self.tensors[f"{prefix}self_attn.{name}_proj.weight"].dot(row) for row in normed] for name in "qkv"
        )
        results = []
        for position, row in enumerate(rows):
            attended = []
            for head in range(self.heads):
                shared = head * self.kv_heads // self.heads
                query = self._turn(self._head(queries[position], head), position)
                scores = [
                    sum(query * self._turn(self._head(keys[earlier], shared), earlier)) / math.sqrt(self.dim)
                    for earlier in range(position + 1)
                ]
                weights = [math.exp(score - max(scores)) for score in scores]
                attended.append(
                    sum(
                        weight / sum(weights) * self._head(values[earlier], shared)
                        for earlier, weight in enumerate(weights)
                    )
                )
            hidden = row + self.tensors[f"{prefix}self_attn.o_proj.weight"].dot(np.concatenate(attended))
            normed_hidden = self._norm(hidden, f"{prefix}post_attention_layernorm.weight")
            gate, up = (self.tensors[f"{prefix}mlp.{name}_proj.weight"].dot(normed_hidden) for name in ("gate", "up"))
            inner = np.array([g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
            results.append(hidden + self.tensors[f"{prefix}mlp.down_proj.weight"].dot(inner))
        return results

    def _head(self, row: Any, head: int) -> Any:
        return row[head * self.dim : (head + 1) * self.dim]

    def _norm(self, row: Any, weight: str) -> Any:
        mean = sum(value**2 for value in row) / len(row)
        return row * self.tensors[weight] / math.sqrt(mean + self.config["rms_norm_eps"])

    def _turn(self, head: Any, position: int) -> Any:
        half = self.dim // 2
        turned = [0.0] * self.dim
        for pair in range(half):
            angle = position * self._frequency(pair)
            one, two = head[pair], head[pair + half]
            turned[pair] = one * math.cos(angle) - two * math.sin(angle)
            turned[pair + half] = one * math.sin(angle) + two * math.cos(angle)
        return np.array(turned)

    def _frequency(self, pair: int) -> float:
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or self.config["rope_theta"]
        frequency: float = 1.0 / theta ** (2 * pair / self.dim)
        if rope.get("rope_type") != "llama3":
            return frequency
        original, low, high = (
            float(rope[key]) for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            return frequency
        if wavelength > original / low:
            return frequency / float(rope["factor"])
        smooth = (original / wavelength - low) / (high - low)
        return float((1 - smooth) * frequency / float(rope["factor"]) + smooth * frequency)


def blank_kv(config: LlamaConfig, *, blocks: int, block_size: int, dtype: str = "float64") -> Floats:
    """Memory full of what must never be read."""
    return np.full((blocks, config.layers, 2, block_size, config.kv_heads, config.head_dim), np.nan, dtype=dtype)


def tokens_of(count: int, *, seed: int = 1, vocab_size: int = 50) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, vocab_size, count, dtype=np.uint32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_naive_twin(variant: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, **VARIANTS[variant])
    weights = load_weights(folder, dtype="float64")
    forward, kv = LlamaForward(weights), blank_kv(weights.config, blocks=8, block_size=4)
    tokens = tokens_of(23)

    found = forward.logits(forward.compute([Span(tokens, 0, [6, 2, 0, 5, 1, 7])], kv))

    np.testing.assert_allclose(found[0], NaiveLlama(folder).logits(tokens.tolist()), rtol=1e-9, atol=1e-10)


def test_llama3_scaling_meets_all_three_of_its_cases(tmp_path: Path) -> None:
    plain = NaiveLlama(write_model(tmp_path / "plain", head_dim=12))
    scaled = NaiveLlama(write_model(tmp_path / "scaled", head_dim=12, rope_scaling=LLAMA3))

    stretched = [plain._frequency(pair) / scaled._frequency(pair) for pair in range(6)]

    assert stretched[0] == 1.0
    assert any(1.0 < ratio < 8.0 for ratio in stretched)
    assert stretched[-1] == pytest.approx(8.0)


def test_float32_is_near_the_naive_twin(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    weights = load_weights(folder, dtype="float32")
    forward, kv = LlamaForward(weights), blank_kv(weights.config, blocks=6, block_size=4, dtype="float32")
    tokens = tokens_of(23)

    found = forward.logits(forward.compute([Span(tokens, 0, range(6))], kv))

    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], NaiveLlama(folder).logits(tokens.tolist()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 3, 4, 9])
def test_chunks_and_neighbours_change_nothing(chunk: int, tmp_path: Path) -> None:
    weights = load_weights(write_model(tmp_path), dtype="float64")
    forward, kv = LlamaForward(weights), blank_kv(weights.config, blocks=16, block_size=4)
    alone = blank_kv(weights.config, blocks=16, block_size=4)
    sequences = [(tokens_of(23, seed=1), [3, 1, 4, 15, 9, 2]), (tokens_of(14, seed=2), [6, 5, 0, 8])]
    expected = [forward.compute([Span(tokens, 0, blocks)], alone)[0] for tokens, blocks in sequences]

    found: dict[int, Any] = {}
    for start in range(0, 23, chunk):
        running = [index for index, (tokens, _) in enumerate(sequences) if start < len(tokens)]
        spans = [
            Span(tokens[start : start + chunk], start, blocks)
            for tokens, blocks in (sequences[index] for index in running)
        ]
        found |= dict(zip(running, forward.compute(spans, kv), strict=True))

    for index in range(2):
        np.testing.assert_allclose(found[index], expected[index], rtol=1e-11, atol=1e-11)


def test_long_span_is_computed_in_parts_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_weights(write_model(tmp_path), dtype="float64")
    forward, kv = LlamaForward(weights), blank_kv(weights.config, blocks=10, block_size=4)
    span = Span(tokens_of(37), 0, range(10))
    whole = forward.compute([span], kv)
    monkeypatch.setattr("kvmesh.engines.numpy_llama_attention._MAX_SCORES", 4 * 37 * 5)  # 5 queries at a time

    in_parts = forward.compute([span], kv)

    np.testing.assert_allclose(in_parts, whole, rtol=1e-11, atol=1e-11)


def test_kv_of_a_token_is_written_where_the_layout_says(tmp_path: Path) -> None:
    folder = write_model(tmp_path, num_hidden_layers=1)
    weights = load_weights(folder, dtype="float64")
    forward, kv = LlamaForward(weights), blank_kv(weights.config, blocks=3, block_size=4)
    twin = NaiveLlama(folder)
    tokens = tokens_of(7)
    forward.compute([Span(tokens, 0, [2, 0])], kv)

    normed = twin._norm(twin.tensors["model.embed_tokens.weight"][tokens[5]], "model.layers.0.input_layernorm.weight")
    key, value = (twin.tensors[f"model.layers.0.self_attn.{name}_proj.weight"].dot(normed) for name in "kv")

    # token 5 is the second one of the sequence's second block, which is block 0 of the pool
    for head in range(2):
        np.testing.assert_allclose(kv[0, 0, 0, 1, head], twin._turn(twin._head(key, head), 5), rtol=1e-9)
        np.testing.assert_allclose(kv[0, 0, 1, 1, head], twin._head(value, head), rtol=1e-9)
    assert np.isnan(kv[1]).all()
    assert np.isnan(kv[0, :, :, 3]).all()


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: the naive twin alone is the judge")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: as above")
    folder = write_tiny_model(tmp_path)
    weights = load_weights(folder, dtype="float64")
    forward, kv = LlamaForward(weights), blank_kv(weights.config, blocks=16, block_size=16)
    tokens = tokens_of(200, vocab_size=512)
    model = transformers.LlamaForCausalLM.from_pretrained(folder).double()

    found = forward.logits(forward.compute([Span(tokens, 0, range(16))], kv))
    with torch.no_grad():
        expected = model(torch.tensor([tokens.tolist()])).logits[0, -1].numpy()

    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)
