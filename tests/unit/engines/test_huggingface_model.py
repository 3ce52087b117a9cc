"""Which models the huggingface engine runs, and which it refuses with the name of what it cannot do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.testing.tiny_model import write_tiny_model

torch = pytest.importorskip("torch", reason="torch is not installed: make install-hf")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make install-hf")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 12, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip
STATE_SPACE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def load(folder: Path, *, dtype: str = "float32", device: str = "cpu") -> Any:
    from kvmesh.engines.huggingface_model import load_model

    return load_model(folder, dtype=dtype, device=device, threads=1)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def write_random(folder: Path, kind: str, **config: Any) -> Path:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))
    model.save_pretrained(folder / kind)
    return folder / kind


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(FixRequestError) as caught:
        call()
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "engine.model")
    return str(caught.value)


def test_what_a_model_is_comes_from_its_folder(folder: Path) -> None:
    model = load(folder)

    assert (model.shape.layers, model.shape.kv_heads, model.shape.head_dim) == (2, 2, 16)
    assert (model.vocab_size, model.max_context_tokens) == (512, 4_096)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "nope"}, "`nope`"),
        ({"model_type": "vit"}, "model_type is 'vit', and transformers has no causal language model of that type"),
        ({"model_type": "mistral", "sliding_window": 8}, "'mistral', whose cache has DynamicSlidingWindowLayer"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"num_key_value_heads": 1}, "cannot load it"),
    ],
)
def test_configuration_that_is_not_run_is_refused_by_name(folder: Path, changes: dict[str, Any], named: str) -> None:
    change_config(folder, architectures=None, **changes)

    assert named in refusal(lambda: load(folder))


@pytest.mark.parametrize(
    ("kind", "config", "named"),
    [
        ("deepseek_v3", {**SMALL, **LATENT}, "'deepseek_v3': its layers cache keys and values of several shapes"),
        ("mamba", STATE_SPACE, "'mamba'"),
    ],
)
def test_cache_that_is_not_plain_keys_and_values_is_refused_by_name(
    tmp_path: Path, kind: str, config: dict[str, Any], named: str
) -> None:
    folder = write_random(tmp_path, kind, **config)

    assert named in refusal(lambda: load(folder))


def test_missing_weights_are_refused_and_not_drawn_at_random(folder: Path) -> None:
    file = folder / "model.safetensors"
    stored = load_file(str(file))
    del stored["model.layers.1.mlp.down_proj.weight"]
    save_file(stored, str(file), metadata={"format": "pt"})

    assert "missing keys in its weights: model.layers.1.mlp.down_proj.weight" in refusal(lambda: load(folder))


def test_truncated_weights_are_refused_by_name(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    assert "cannot load it" in refusal(lambda: load(folder))


def test_model_that_is_not_told_its_positions_does_not_pass_the_proof(folder: Path) -> None:
    """So would one that takes none, or keeps state beside its cache."""
    from kvmesh.engines.huggingface_model import prove

    model = load(folder)
    counting = replace(model, takes=model.takes - {"position_ids"})

    prove(folder, model)
    assert "'llama': its logits over cached blocks differ" in refusal(lambda: prove(folder, counting))


def test_fingerprint_tells_models_and_dtypes_apart_and_folders_not(folder: Path, tmp_path: Path) -> None:
    copy, other = write_tiny_model(tmp_path / "copy"), write_tiny_model(tmp_path / "other", seed=3)

    here, there, changed = (load(each).fingerprint for each in (folder, copy, other))

    assert here == there != changed
    assert load(folder, dtype="float64").fingerprint != here
    assert here.startswith("huggingface-")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_refused_with_the_fix(folder: Path) -> None:
    with pytest.raises(FixRequestError, match=r"is cuda:1, and torch .* finds no CUDA here: use device=cpu") as caught:
        load(folder, device="cuda:1")

    assert caught.value.field == "engine.options.device"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_gpu_says_what_the_cpu_says(folder: Path) -> None:
    import numpy as np

    from kvmesh.engines.huggingface import HuggingFaceEngine
    from kvmesh.engines.huggingface_options import HuggingFaceOptions
    from kvmesh.testing.engine_contract import attempt, run_all, token_request

    answers = []
    for device in ("cpu", "cuda"):
        options = HuggingFaceOptions(total_blocks=64, dtype="float64", device=device)
        engine = HuggingFaceEngine(load(folder, dtype="float64", device=device), options)
        engine.submit(token_request(engine.info, 1, np.arange(5, 105, dtype=np.uint32), max_tokens=24))
        answers.append(run_all(engine).answers[attempt(1)].token_ids)

    assert answers[0] == answers[1]
