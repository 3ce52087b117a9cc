"""A tiny Llama model, made on the spot: a folder as one downloads, of half a megabyte, the same byte for byte.

Its weights are random, so what it says means nothing; but it computes like any other model, and its tokens depend on
every token before them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.testing.tiny_tokenizer import BOS_TOKEN, EOS_TOKEN, write_tiny_tokenizer

_VOCAB_SIZE = 512
_MAX_CONTEXT_TOKENS = 4_096
_BOS_TOKEN_ID, _EOS_TOKEN_ID = 0, 1
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": _BOS_TOKEN_ID,
    "eos_token_id": _EOS_TOKEN_ID,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.25,
    "intermediate_size": 128,
    "max_position_embeddings": _MAX_CONTEXT_TOKENS,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": _VOCAB_SIZE,
}
_SEED = 2_026
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def write_tiny_model(folder: Path, *, seed: int = _SEED) -> Path:
    """Write the model and its tokenizer into `folder`, always the same for a seed; return the folder.

    Raises:
        FixRequestError: INVALID_FIELD `folder`, and nothing is written, if another model is there.
        OSError: it cannot be written.
    """
    config, config_file = (json.dumps(_CONFIG, indent=2) + "\n").encode(), folder / "config.json"
    is_ours = config_file.is_file() and config_file.read_bytes() == config
    if not is_ours and any((folder / name).exists() for name in _FILES):
        raise FixRequestError(Reason.INVALID_FIELD, f"{folder} holds another model", field="folder")
    folder.mkdir(parents=True, exist_ok=True)
    config_file.write_bytes(config)  # first: what is interrupted is known as ours, and can be written again
    write_tiny_tokenizer(folder, vocab_size=_VOCAB_SIZE, max_context_tokens=_MAX_CONTEXT_TOKENS)
    _check_special_tokens(folder)
    generation = {"bos_token_id": _BOS_TOKEN_ID, "eos_token_id": _EOS_TOKEN_ID, "do_sample": True, "temperature": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(save(_weights(seed), metadata={"format": "pt"}))
    return folder


def _weights(seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Draw every tensor, in order of name."""
    hidden, inner, head_dim = _CONFIG["hidden_size"], _CONFIG["intermediate_size"], _CONFIG["head_dim"]
    q_size, kv_size = _CONFIG["num_attention_heads"] * head_dim, _CONFIG["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (_VOCAB_SIZE, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (_VOCAB_SIZE, hidden),
    }
    for layer in range(_CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (q_size, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, q_size),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    # Raw bits, and a uniform distribution made of them exactly: numpy keeps the stream of a bit generator the same
    # from release to release, and neither that of its distributions nor the last bit of a logarithm.
    bits = np.random.PCG64(seed)
    width = _CONFIG["initializer_range"] * 12**0.5
    tensors = {}
    for name, shape in sorted(shapes.items()):
        drawn = (bits.random_raw(int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) * 2.0**-24 - 0.5
        tensor = 1.0 + 0.2 * drawn if len(shape) == 1 else width * drawn
        tensors[name] = tensor.astype(np.float32).reshape(shape)
    return tensors


def _check_special_tokens(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    assert (ids[BOS_TOKEN], ids[EOS_TOKEN]) == (_BOS_TOKEN_ID, _EOS_TOKEN_ID), "the tokenizer numbers them otherwise"
