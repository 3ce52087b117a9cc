"""What a Hugging Face model folder says of its tokenizer; every file but tokenizer.json is optional."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.core.errors import FixRequestError, Reason

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_CONFIG_FILE = "config.json"
_GENERATION_CONFIG_FILE = "generation_config.json"
_UNLIMITED_TOKENS = 2**31
"""A `model_max_length` beyond this is the field's way of saying that none is known."""


def broken_folder(problem: str, *, fix: str) -> FixRequestError:
    """Return the error of a model folder that cannot be used."""
    return FixRequestError(Reason.INVALID_FIELD, f"engine.model: {problem}: {fix}", field="engine.model")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The configuration files of one folder, parsed; an absent file is an empty mapping."""

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "ModelFolder":
        """Read the folder; blocks on the disk.

        Raises:
            FixRequestError: INVALID_FIELD on engine.model, naming the file that is missing or broken, and the fix.
        """
        if not path.is_dir():
            raise broken_folder(f"{path} is no folder", fix="give the folder that holds the model's tokenizer.json")
        if not (path / TOKENIZER_FILE).is_file():
            raise broken_folder(
                f"{path} has no {TOKENIZER_FILE}",
                fix=f"download it with the model, or write it with AutoTokenizer.from_pretrained({str(path)!r})"
                f".save_pretrained({str(path)!r})",
            )
        config = _read_json(path / _CONFIG_FILE)
        # A model of text and images keeps what we need one level down.
        text_config = config.get("text_config")
        return cls(
            path=path,
            config={**config, **text_config} if isinstance(text_config, dict) else config,
            generation_config=_read_json(path / _GENERATION_CONFIG_FILE),
            tokenizer_config=_read_json(path / TOKENIZER_CONFIG_FILE),
        )

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the special tokens that have a name, e.g. `bos_token`."""
        named = {name: value for name, value in self.tokenizer_config.items() if name.endswith("_token")}
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that config.json and generation_config.json say end a sequence; either may name one, several or none.

        Raises:
            FixRequestError: INVALID_FIELD on engine.model, naming the file and what is no id of the model.
        """
        files = ((_CONFIG_FILE, self.config), (_GENERATION_CONFIG_FILE, self.generation_config))
        ids = {token for name, values in files for token in self._eos_token_ids_of(name, values.get("eos_token_id"))}
        return tuple(sorted(ids))

    def _eos_token_ids_of(self, name: str, value: Any) -> list[int]:
        given: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
        for token in given:
            if not isinstance(token, int) or isinstance(token, bool):
                raise broken_folder(
                    f"{self.path / name}: eos_token_id is {value!r}",
                    fix="it must be a token id, a list of ids, or null",
                )
            if self.vocab_size is not None and token >= self.vocab_size:
                raise broken_folder(
                    f"{self.path / name}: eos_token_id {token} is beyond the vocabulary, whose vocab_size is "
                    f"{self.vocab_size}",
                    fix=f"it must be below {self.vocab_size}; correct the one that is wrong",
                )
        return [token for token in given if token >= 0]  # -1 is how some folders write none

    @property
    def vocab_size(self) -> int | None:
        """Rows of the model's embedding; may exceed the tokenizer's vocabulary."""
        size = self.config.get("vocab_size")
        return size if isinstance(size, int) and not isinstance(size, bool) else None

    @property
    def max_context_tokens(self) -> int | None:
        """The smallest limit that any file names."""
        limits = (self.config.get("max_position_embeddings"), self.tokenizer_config.get("model_max_length"))
        return min((int(n) for n in limits if isinstance(n, int | float) and 0 < n < _UNLIMITED_TOKENS), default=None)

    def chat_template(self) -> tuple[str, str] | None:
        """Return the name of the file that has the template, and the template; None without one.

        Raises:
            FixRequestError: INVALID_FIELD on engine.model, when the file cannot be read.
        """
        file = self.path / TEMPLATE_FILE
        if file.is_file():
            return TEMPLATE_FILE, _read_text(file)
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return (TOKENIZER_CONFIG_FILE, template) if isinstance(template, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(_read_text(file))
    except json.JSONDecodeError as exc:
        raise broken_folder(f"{file} is no JSON: {exc}", fix="download it again") from exc
    if not isinstance(content, dict):
        raise broken_folder(f"{file} holds no JSON object", fix="download it again")
    return content


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise broken_folder(f"{file} cannot be read: {exc}", fix="download it again, or mend its permissions") from exc
