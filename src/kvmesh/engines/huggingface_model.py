"""Models read by transformers: loaded, refused by name where their cache is none of ours, and computed over blocks."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from xxhash import xxh3_128

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.engines.huggingface_folder import check_folder
from kvmesh.engines.huggingface_kv import BlockKv, KvShape
from kvmesh.engines.numpy_llama_config import unusable_model
from kvmesh.engines.numpy_llama_forward import Span
from kvmesh.engines.numpy_llama_weights import Floats

_LOAD_ERRORS = (
    OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers raises for folders it cannot read, whatever is wrong with them."""
_UNSTEADY_ROPE = frozenset({"dynamic", "longrope"})
"""Position encodings by which the KV of a token depends on how long its sequence has become."""
_TOLERANCE = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 1e-1}
"""Of logits, relative to the largest: far more than rounding, far less than a token that is missed or misplaced."""


@dataclass(frozen=True, slots=True)
class HuggingFaceModel:
    """A model in memory: read-only, and shared by every engine that runs it."""

    module: Any
    """The transformers model."""
    shape: KvShape
    dtype: str
    device: str
    vocab_size: int
    max_context_tokens: int
    fingerprint: str
    """Of configuration and weights: equal in each process that loads the same model as the same dtype."""
    takes: frozenset[str]
    """Names of the arguments of its forward pass."""


def load_model(folder: Path, *, dtype: str, device: str, threads: int = 0) -> HuggingFaceModel:
    """Read a model; blocks on the disk, and computes a few tokens to see that it can be run over blocks.

    `threads` above 0 are those of torch from now on, in this whole process.

    Raises:
        FixRequestError: INVALID_FIELD on engine.model or engine.options.device, saying what is wrong.
    """
    _check_device(device)
    if threads:
        torch.set_num_threads(threads)
    check_folder(folder)
    config = _read_config(folder)
    module = _load(folder, config, dtype)
    fingerprint = _fingerprint(config, module)
    try:
        module.to(device)
    except torch.OutOfMemoryError as exc:
        raise _unusable_device(f"{device} has too little memory for {folder}: {exc}") from exc
    text = config.get_text_config(decoder=True)
    model = HuggingFaceModel(
        module=module,
        shape=_probe_shape(folder, config, module),
        dtype=dtype,
        device=device,
        vocab_size=int(module.get_input_embeddings().num_embeddings),
        max_context_tokens=int(getattr(text, "max_position_embeddings", None) or 2**31),
        fingerprint=fingerprint,
        takes=frozenset(inspect.signature(module.forward).parameters),
    )
    prove(folder, model)
    return model


def compute(model: HuggingFaceModel, spans: Sequence[Span], kv: BlockKv) -> Floats:
    """Write the KV of spans of equally many tokens; return the logits after each one's last, (spans, vocab_size)."""
    with torch.inference_mode():
        return _compute(model, spans, kv)


def _compute(model: HuggingFaceModel, spans: Sequence[Span], kv: BlockKv) -> Floats:
    step = kv.open(spans)
    given = {
        "position_ids": step.positions,
        "logits_to_keep": 1,  # of a long prompt all logits would be the most of the work
    }
    output = model.module(
        input_ids=step.token_ids,
        attention_mask=step.mask,
        past_key_values=step.cache,
        use_cache=True,
        **{name: value for name, value in given.items() if name in model.takes},
    )
    kv.give_out(step.writes)
    return _in_numpy(output.logits[:, -1])


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise _unusable_device(
            f"is {device}, and torch {torch.__version__} finds no CUDA here: use device=cpu, or "
            "install a CUDA build of torch where there is a GPU"
        )
    index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise _unusable_device(f"is {device}, and there are {count} GPUs: cuda:0..cuda:{count - 1}")


def _unusable_device(why: str) -> FixRequestError:
    field = "engine.options.device"
    return FixRequestError(Reason.INVALID_FIELD, f"{field} {why}", field=field)


def _read_config(folder: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _LOAD_ERRORS as exc:
        raise unusable_model(folder, f"config.json: transformers {transformers.__version__}: {exc}") from exc
    kind = config.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise unusable_model(
            folder, f"config.json: model_type is {kind!r}, and transformers has no causal language model of that type"
        )
    ropes = _ropes(getattr(config.get_text_config(decoder=True), "rope_parameters", None))
    if unsteady := sorted(ropes & _UNSTEADY_ROPE):
        raise unusable_model(
            folder,
            f"config.json: rope_type is {unsteady[0]!r} ({kind}): its KV depends on how long a sequence becomes, "
            "and so cannot be shared between requests",
        )
    try:
        layers = {type(layer) for layer in DynamicCache(config=config).layers}
    except _LOAD_ERRORS as exc:
        raise unusable_model(folder, f"config.json: layer_types of {kind!r} are not known: {exc}") from exc
    if others := sorted(layer.__name__ for layer in layers - {DynamicLayer}):
        raise unusable_model(
            folder,
            f"config.json: model_type is {kind!r}, whose cache has {', '.join(others)}: this engine keeps KV in "
            "blocks, and runs models that attend fully in every layer (no sliding window, state space or hybrid cache)",
        )
    return config


def _ropes(parameters: Any) -> set[str]:
    """Return the kinds of position encoding; some models have one for each kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = [_ropes(each) for each in parameters.values()]
    return {str(parameters.get("rope_type", "default"))}.union(*nested)


def _load(folder: Path, config: Any, dtype: str) -> Any:
    transformers.utils.logging.disable_progress_bar()
    try:
        module, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except _LOAD_ERRORS as exc:
        raise unusable_model(folder, f"transformers {transformers.__version__} cannot load it: {exc}") from exc
    for kind in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, info[kind])):
            # They would be drawn at random: an answer that looks like one.
            raise unusable_model(folder, f"{kind.replace('_', ' ')} in its weights: {', '.join(found[:3])}")
    module.requires_grad_(False).eval()
    return module


def _fingerprint(config: Any, module: Any) -> str:
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    described = {key: value for key, value in config.to_dict().items() if key not in volatile}
    digest = xxh3_128(repr(sorted(described.items(), key=lambda item: item[0])).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    # The same model behind another engine is another: what the two compute differs by rounding.
    return f"huggingface-{digest.hexdigest()}"


def _probe_shape(folder: Path, config: Any, module: Any) -> KvShape:
    """Return what a token leaves in the model's own cache, having it compute two."""
    kind = config.model_type
    cache = DynamicCache(config=config)
    try:
        with torch.inference_mode():
            module(input_ids=torch.tensor([[0, 1]], device=module.device), past_key_values=cache, use_cache=True)
    except _LOAD_ERRORS as exc:
        raise unusable_model(folder, f"model_type is {kind!r}: it cannot compute two tokens: {exc}") from exc
    shapes = {
        tuple(tensor.shape) if tensor is not None else ()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    }
    dtypes = {tensor.dtype for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None}
    if len(shapes) != 1 or len(dtypes) != 1 or len(shape := shapes.pop()) != 4 or shape[2] != 2:
        raise unusable_model(
            folder,
            f"model_type is {kind!r}: its layers cache keys and values of several shapes or none "
            "(latent, shared or recurrent), and this engine needs (kv_heads, tokens, head_dim), alike in all of them",
        )
    return KvShape(layers=len(cache.layers), kv_heads=shape[1], head_dim=shape[3], dtype=dtypes.pop())


def prove(folder: Path, model: HuggingFaceModel) -> None:
    """Have a model compute seven tokens over blocks, in chunks and in a padded batch, and by itself.

    Raises:
        FixRequestError: INVALID_FIELD on engine.model if it does not say the same.
    """
    token_ids = (np.arange(7) * 5 % model.vocab_size).astype(np.uint32)
    memory = np.zeros((8, model.shape.block_bytes(2)), dtype=np.uint8)
    kv = BlockKv(memory, model.shape, block_size=2, device=model.device, is_mirrored=model.device != "cpu")
    long, short = [6, 1, 4, 3], [0, 5]
    compute(model, [Span(token_ids[:4], 0, long)], kv)
    compute(model, [Span(token_ids[4:6], 4, long)], kv)
    compute(model, [Span(token_ids[:2], 0, short)], kv)
    found = compute(model, [Span(token_ids[6:7], 6, long), Span(token_ids[2:3], 2, short)], kv)
    with torch.inference_mode():
        whole = model.module(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None].to(model.device)).logits[0]
    expected = _in_numpy(whole[[6, 2]])
    distance = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-9))
    if not distance <= _TOLERANCE[model.dtype]:  # true for a NaN too
        raise unusable_model(
            folder,
            f"model_type is {model.module.config.model_type!r}: its logits over cached blocks differ from those of a "
            f"plain forward pass, by {distance:.1g} of the largest: it keeps state beside its cache, or counts "
            "positions by itself",
        )


def _in_numpy(logits: Any) -> Floats:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    found: Floats = wide.cpu().numpy()
    return found
