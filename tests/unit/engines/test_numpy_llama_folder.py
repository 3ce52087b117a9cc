"""What numpy_llama reads from a model's folder, and what it refuses by name."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.engines.numpy_llama_config import Llama3Scaling, LlamaConfig
from kvmesh.engines.numpy_llama_weights import check_weight_files, load_weights
from kvmesh.testing.tiny_model import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def write_bfloat16(file: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write the format by hand: the library's numpy door has no bfloat16."""
    header, content = {}, b""
    for name, tensor in tensors.items():
        upper = (tensor.view(np.uint32) >> 16).astype("<u2").tobytes()
        offsets = [len(content), len(content) + len(upper)]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        content += upper
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content)


def test_config_of_the_tiny_model(folder: Path) -> None:
    config = LlamaConfig.read(folder)

    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.layers) == (512, 64, 128, 2)
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 10_000.0, None)
    assert (config.has_tied_head, config.max_context_tokens) == (False, 4_096)


@pytest.mark.parametrize("is_tied", [False, True])
def test_parameters_are_counted_as_stored(folder: Path, is_tied: bool) -> None:
    stored = load_file(str(folder / "model.safetensors"))
    change_config(folder, tie_word_embeddings=is_tied)

    count = LlamaConfig.read(folder).parameters

    assert count == sum(tensor.size for name, tensor in stored.items() if name != "lm_head.weight" or not is_tied)


def test_silent_config_means_what_the_architecture_assumes(folder: Path) -> None:
    change_config(
        folder, num_key_value_heads=None, head_dim=None, rope_theta=None, rms_norm_eps=None, hidden_act=None,
        max_position_embeddings=None, tie_word_embeddings=None, attention_bias=None,
    )  # fmt: skip

    config = LlamaConfig.read(folder)

    assert (config.kv_heads, config.head_dim, config.rope_theta, config.norm_eps) == (4, 16, 10_000.0, 1e-6)
    assert (config.max_context_tokens, config.has_tied_head) == (2_048, False)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling_is_read_under_its_old_name_and_its_new_one(folder: Path, key: str) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    change_config(folder, **{key: scaling})

    assert LlamaConfig.read(folder).rope_scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; numpy_llama needs 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is 'missing'"),
        (
            {"rope_scaling": {
                "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1,
                "original_max_position_embeddings": 64,
            }},
            "high_freq_factor is 1.0; numpy_llama needs above low_freq_factor",
        ),
        ({"hidden_size": None}, "hidden_size is 'missing'"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; numpy_llama needs a whole number above 0"),
        ({"vocab_size": ""}, "vocab_size is ''"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; numpy_llama needs a divisor"),
        ({"head_dim": 5}, "head_dim is 5; numpy_llama needs an even number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; numpy_llama needs true or false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0; numpy_llama needs true or false"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(folder: Path, changes: dict[str, Any], named: str) -> None:
    change_config(folder, **changes)

    with pytest.raises(FixRequestError) as caught:
        LlamaConfig.read(folder)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "engine.model")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("key", "needed"),
    [("tie_word_embeddings", "true or false"), ("rms_norm_eps", "a number above 0, or no such key")],
)
def test_null_is_no_value_of_a_key_that_has_a_default(folder: Path, key: str, needed: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: None}))

    with pytest.raises(FixRequestError) as caught:
        LlamaConfig.read(folder)

    assert str(caught.value).endswith(f"config.json: {key} is None; numpy_llama needs {needed}")


@pytest.mark.parametrize(
    ("content", "named"), [(None, "has no config.json"), ("{", "cannot be read"), ("[]", "no JSON")]
)
def test_broken_config_is_refused_by_name(folder: Path, content: str | None, named: str) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)

    with pytest.raises(FixRequestError, match=named):
        LlamaConfig.read(folder)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_matrices_are_laid_out_to_be_multiplied_from_the_left(folder: Path, dtype: str) -> None:
    stored = load_file(str(folder / "model.safetensors"))

    weights = load_weights(folder, dtype=dtype)

    layer = weights.layers[1]
    assert weights.dtype.name == layer.qkv.dtype.name == weights.head.dtype.name == dtype
    np.testing.assert_array_equal(weights.head, stored["lm_head.weight"].T)
    np.testing.assert_array_equal(layer.qkv[:, 64:96], stored["model.layers.1.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(layer.gate_up[:, 128:], stored["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(layer.down, stored["model.layers.1.mlp.down_proj.weight"].T)
    matrices = (layer.qkv, layer.output, layer.gate_up, layer.down, weights.head)
    assert all(matrix.flags.c_contiguous for matrix in matrices)


@pytest.mark.parametrize(("most_bytes", "is_shared"), [(2**26, False), (512 * 64 * 4 - 1, True)])
def test_tied_head_is_the_embedding_and_a_copy_only_while_small(
    folder: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int, is_shared: bool
) -> None:
    change_config(folder, tie_word_embeddings=True)
    monkeypatch.setattr("kvmesh.engines.numpy_llama_weights._MAX_COPIED_HEAD_BYTES", most_bytes)

    weights = load_weights(folder, dtype="float32")

    assert weights.head.shape == (64, 512)
    np.testing.assert_array_equal(weights.head, weights.embedding.T)
    assert np.shares_memory(weights.head, weights.embedding) is is_shared


def test_bfloat16_is_the_upper_half_of_a_float32(folder: Path) -> None:
    stored = load_file(str(folder / "model.safetensors"))
    stored["model.norm.weight"][:4] = [1.0, -2.5, 0.0078125, 3.0]  # exact in 8 bits of mantissa
    write_bfloat16(folder / "model.safetensors", stored)

    weights = load_weights(folder, dtype="float64")

    assert weights.norm[:4].tolist() == [1.0, -2.5, 0.0078125, 3.0]
    np.testing.assert_allclose(weights.embedding, stored["model.embed_tokens.weight"], rtol=2**-7)


def test_float16_is_read(folder: Path) -> None:
    file = folder / "model.safetensors"
    halves = {name: tensor.astype(np.float16) for name, tensor in load_file(str(file)).items()}
    save_file(halves, str(file))

    weights = load_weights(folder, dtype="float32")

    np.testing.assert_array_equal(weights.embedding, halves["model.embed_tokens.weight"].astype(np.float32))


def test_shards_are_one_model_with_the_same_fingerprint(folder: Path) -> None:
    whole = load_weights(folder, dtype="float32")
    stored = load_file(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    files = {name: f"part-{index % 3}.safetensors" for index, name in enumerate(stored)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in stored.items() if files[name] == file}, str(folder / file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    sharded = load_weights(folder, dtype="float32")

    assert sharded.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(sharded.layers[1].qkv, whole.layers[1].qkv)


def test_fingerprint_is_that_of_the_model_and_not_of_the_dtype_it_is_computed_in(folder: Path) -> None:
    fingerprints = [load_weights(folder, dtype=dtype).fingerprint for dtype in ("float32", "float64")]

    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("changed", ["weight", "config"])
def test_fingerprint_tells_models_apart(folder: Path, changed: str) -> None:
    before = load_weights(folder, dtype="float32").fingerprint
    if changed == "config":
        change_config(folder, rope_theta=10_001.0)
    else:
        file = folder / "model.safetensors"
        stored = load_file(str(file))
        stored["model.layers.1.mlp.down_proj.weight"][3, 4] += 1e-3
        save_file(stored, str(file))

    assert load_weights(folder, dtype="float32").fingerprint != before


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("absent", "has neither model.safetensors nor model.safetensors.index.json"),
        ("index", "model.safetensors.index.json cannot be read"),
        ("shard", "names part-1.safetensors, which is not there"),
    ],
)
def test_missing_files_are_named_before_anything_is_loaded(folder: Path, broken: str, named: str) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    if broken == "index":
        index.write_text("{}")
    elif broken == "shard":
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "part-1.safetensors"}}))

    with pytest.raises(FixRequestError, match=named):
        check_weight_files(folder)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("truncated", "model.safetensors is no safetensors file"),
        ("tensor", "no weights are named model.norm.weight"),
        ("shape", r"model.norm.weight has shape \(63,\), and config.json says \(64,\)"),
        ("dtype", "model.norm.weight is I64; numpy_llama reads F64, F32, F16, BF16"),
    ],
)
def test_broken_weights_are_refused_by_name(folder: Path, broken: str, named: str) -> None:
    file = folder / "model.safetensors"
    stored: dict[str, np.ndarray[Any, Any]] = {**load_file(str(file))}
    if broken == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        norm = stored.pop("model.norm.weight")
        if broken == "shape":
            stored["model.norm.weight"] = norm[:63].copy()
        elif broken == "dtype":
            stored["model.norm.weight"] = norm.astype(np.int64)
        save_file(stored, str(file))

    with pytest.raises(FixRequestError, match=named):
        load_weights(folder, dtype="float32")


def test_loaded_weights_outlive_their_file(folder: Path) -> None:
    weights = load_weights(folder, dtype="float32")
    embedding = weights.embedding.copy()
    shutil.rmtree(folder)

    np.testing.assert_array_equal(weights.embedding, embedding)
