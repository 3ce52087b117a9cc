"""What can be said of a model's folder, and of the packages that read it, before torch is imported."""

import json
from importlib import import_module
from pathlib import Path

from kvmesh.core.errors import NotServedError, Reason
from kvmesh.engines.numpy_llama_config import unusable_model
from kvmesh.engines.numpy_llama_weights import check_weight_files

_CONFIG_FILE = "config.json"


def require_packages() -> None:
    """Import torch and transformers. Raises: NotServedError(UNIMPLEMENTED) naming what to install."""
    try:
        for package in ("torch", "transformers"):
            import_module(package)
    except (ImportError, OSError, RuntimeError) as exc:  # missing, or its libraries are, or the two do not fit
        raise NotServedError(
            Reason.UNIMPLEMENTED,
            "engine unavailable: huggingface needs torch and transformers: pip install 'kvmesh[hf]', and of torch the "
            f"build for this machine ({type(exc).__name__}: {exc})",
        ) from exc


def check_folder(folder: Path) -> int:
    """Return the bytes of the model's weights.

    Raises:
        FixRequestError: INVALID_FIELD on engine.model, naming what is missing or not supported.
    """
    try:
        config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise unusable_model(folder, f"has no {_CONFIG_FILE}: give the folder of a Hugging Face model") from exc
    except (OSError, ValueError) as exc:
        raise unusable_model(folder, f"{_CONFIG_FILE} cannot be read: {exc}") from exc
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise unusable_model(folder, f"{_CONFIG_FILE} names no model_type")
    if config.get("quantization_config") is not None:
        raise unusable_model(
            folder,
            f"{_CONFIG_FILE}: quantization_config is set, and this engine runs no quantised model: take the model's "
            "unquantised folder, and --engine-option dtype=bfloat16 to save memory",
        )
    if config.get("is_encoder_decoder"):
        raise unusable_model(
            folder,
            f"{_CONFIG_FILE}: is_encoder_decoder is true ({_type(config)}): this engine runs decoders alone",
        )
    check_weight_files(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _type(config: dict[str, object]) -> str:
    return f"model_type is {config['model_type']!r}"
