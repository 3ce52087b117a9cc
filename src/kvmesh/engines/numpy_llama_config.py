"""What config.json says of a Llama model: every number that the forward pass needs, or a refusal that names the key."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvmesh.core.errors import FixRequestError, Reason

T = TypeVar("T", int, float)

_CONFIG_FILE = "config.json"
_DEFAULT_MAX_CONTEXT_TOKENS = 2_048
"""What the architecture assumes where config.json is silent."""


def unusable_model(folder: Path, problem: str) -> FixRequestError:
    """Return the error of a model folder that this engine cannot run."""
    return FixRequestError(Reason.INVALID_FIELD, f"engine.model: {folder}: {problem}", field="engine.model")


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3's change of RoPE: long wavelengths are stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_context_tokens: int


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The architecture of one model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    """Divides `heads`: each one serves a group of query heads."""
    head_dim: int
    """Even: RoPE turns pairs of dimensions."""
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    has_tied_head: bool
    """The output head is the embedding."""
    max_context_tokens: int

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        attention = 2 * self.hidden_size * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.has_tied_head else 2)
        return embeddings + self.layers * layer + self.hidden_size

    @classmethod
    def read(cls, folder: Path) -> "LlamaConfig":
        """Read the folder's config.json; blocks on the disk.

        Raises:
            FixRequestError: INVALID_FIELD on engine.model, naming the key that is missing or not supported.
        """
        return _Reader(folder, _read_json(folder, _CONFIG_FILE)).config()


@dataclass(frozen=True, slots=True)
class _Reader:
    folder: Path
    values: Mapping[str, Any]

    def config(self) -> LlamaConfig:
        self._refuse_what_we_do_not_compute()
        hidden_size, heads = self._number("hidden_size", 0), self._number("num_attention_heads", 0)
        kv_heads = self._number("num_key_value_heads", heads)
        head_dim = self._number("head_dim", hidden_size // heads)
        if heads % kv_heads:
            raise self._refusal("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
        if head_dim % 2:
            raise self._refusal("head_dim", head_dim, "an even number")
        # Newer folders keep what was rope_theta and rope_scaling in one table.
        rope = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        return LlamaConfig(
            vocab_size=self._number("vocab_size", 0),
            hidden_size=hidden_size,
            intermediate_size=self._number("intermediate_size", 0),
            layers=self._number("num_hidden_layers", 0),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=self._norm_eps(),
            rope_theta=self._number("rope_theta", 10_000.0, rope if "rope_theta" in rope else self.values),
            rope_scaling=self._scaling(rope),
            has_tied_head=self._has_tied_head(),
            max_context_tokens=self._number("max_position_embeddings", _DEFAULT_MAX_CONTEXT_TOKENS),
        )

    def _norm_eps(self) -> float:
        # Absent is the architecture's default; null, which counts as absent elsewhere, is nobody's number.
        if "rms_norm_eps" in self.values and self.values["rms_norm_eps"] is None:
            raise self._refusal("rms_norm_eps", None, "a number above 0, or no such key")
        return self._number("rms_norm_eps", 1e-6)

    def _has_tied_head(self) -> bool:
        given = self.values.get("tie_word_embeddings", False)
        if not isinstance(given, bool):
            raise self._refusal("tie_word_embeddings", given, "true or false")
        return given

    def _refuse_what_we_do_not_compute(self) -> None:
        for key, supported in (
            ("model_type", "llama"), ("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False),
            ("quantization_config", None),
        ):  # fmt: skip
            value = self.values.get(key, None if key == "model_type" else supported)
            if value != supported:
                raise self._refusal(key, value, repr(supported))

    def _scaling(self, rope: Any) -> Llama3Scaling | None:
        if not isinstance(rope, dict):
            raise self._refusal("rope_scaling", rope, "a table")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind != "llama3":
            raise self._refusal("rope_scaling.rope_type", kind, "'default' or 'llama3'")
        scaling = Llama3Scaling(
            factor=self._number("factor", 0.0, rope),
            low_freq_factor=self._number("low_freq_factor", 0.0, rope),
            high_freq_factor=self._number("high_freq_factor", 0.0, rope),
            original_max_context_tokens=self._number("original_max_position_embeddings", 0, rope),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise self._refusal("high_freq_factor", scaling.high_freq_factor, "above low_freq_factor")
        return scaling

    def _number(self, key: str, default: T, table: Mapping[str, Any] | None = None) -> T:
        """Return a number above 0; a default of 0 stands for none."""
        given = (self.values if table is None else table).get(key)
        value = default if given is None else given
        kinds = (int, float) if isinstance(default, float) else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
            shown = "missing" if given is None else given
            raise self._refusal(key, shown, "a whole number above 0" if len(kinds) == 1 else "above 0")
        return type(default)(value)

    def _refusal(self, key: str, value: object, supported: str) -> FixRequestError:
        return unusable_model(self.folder, f"{_CONFIG_FILE}: {key} is {value!r}; numpy_llama needs {supported}")


def _read_json(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise unusable_model(folder, f"has no {name}") from exc
    except (OSError, ValueError) as exc:
        raise unusable_model(folder, f"{name} cannot be read: {exc}") from exc
    if not isinstance(content, dict):
        raise unusable_model(folder, f"{name} holds no JSON object")
    return content
