"""The tokenizer of a Hugging Face model folder."""

import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers.decoders import DecodeStream

from kvmesh.tokenizing.chat_template import ChatTemplate, no_template
from kvmesh.tokenizing.model_folder import TOKENIZER_FILE, ModelFolder, broken_folder
from kvmesh.tokenizing.token_bytes import TokenBytes
from kvmesh.tokenizing.tokenizer import TokenText

# Read by the library, which has no other switch: it would hand the one text of each call to a thread of its own.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_MAX_HELD_TOKENS = 16
"""A character has 4 bytes at most, and so have 4 tokens: what is still incomplete after these never becomes whole."""
_REPLACEMENT = "\ufffd"
"""What the library shows for bytes that are no whole character."""


class FolderTokenizer:
    """Reads tokenizer.json, and what else the folder says of its model."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, folder: ModelFolder, template: ChatTemplate | None) -> None:
        """Use `load`."""
        # A folder may have been saved with a training run's limits: they would cut prompts without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes(tokenizer)
        self._template = template
        self._vocab_size = folder.vocab_size or tokenizer.get_vocab_size()
        self._max_context_tokens = folder.max_context_tokens
        named = tokenizer.token_to_id(folder.special_tokens.get("eos_token", ""))
        self._eos_token_ids = tuple(sorted({*folder.eos_token_ids, *(() if named is None else (named,))}))

    @classmethod
    def load(cls, path: Path) -> "FolderTokenizer":
        """Read a model's folder; blocks on the disk, up to a second for a large vocabulary.

        Raises:
            FixRequestError: INVALID_FIELD on engine.model, naming the file that is missing or broken, and the fix.
        """
        folder = ModelFolder.read(path)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path / TOKENIZER_FILE))
        except Exception as exc:  # the library raises nothing narrower
            raise broken_folder(
                f"{path / TOKENIZER_FILE} is no tokenizer: {exc}",
                fix="download it again, or update the tokenizers package if the file is newer than it",
            ) from exc
        return cls(tokenizer, folder, _compile_template(folder))

    @property
    def vocab_size(self) -> int:
        """Token ids of the model are 0 .. vocab_size - 1."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that one of the folder's files says ends a sequence, sorted."""
        return self._eos_token_ids

    @property
    def max_context_tokens(self) -> int | None:
        """The smallest limit that one of the folder's files names; None = none does."""
        return self._max_context_tokens

    def encode(self, text: str, *, add_special_tokens: bool = True) -> npt.NDArray[np.uint32]:
        """See Tokenizer; about 1 us per token. Lets other threads run meanwhile."""
        # Of the library's encoders only those of batches release the GIL; the fast one leaves out character offsets.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return np.array(encoding.ids, dtype=np.uint32)

    def render_chat(self, messages: Sequence[tuple[str, str]]) -> str:
        """See Tokenizer."""
        if self._template is None:
            raise no_template()
        return self._template.render(messages)

    def token_text(self, token_id: int) -> TokenText:
        """See Tokenizer."""
        return self._token_bytes.token_text(token_id)

    def detokenizer(self, *, after: Sequence[int] = ()) -> "FolderDetokenizer":
        """See Tokenizer."""
        return FolderDetokenizer(self._tokenizer, after=after)


class FolderDetokenizer:
    """The library's decode stream, kept going where it would hold back for ever or fail for good."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._shown = list(after[-_MAX_HELD_TOKENS:])
        """The tokens whose text was returned last: the next token is decoded after them."""
        if self._decode(self._shown).endswith(_REPLACEMENT):  # the stream would show it again, made whole
            self._shown = []
        self._held: list[int] = []
        """The tokens since then: their text is still to come."""
        self._stream = self._new_stream()

    def push(self, token_ids: Sequence[int]) -> list[str]:
        """See Detokenizer; special tokens have no text."""
        pieces: list[str] = []
        for token_id in token_ids:
            self._held.append(token_id)
            try:
                piece = self._stream.step(self._tokenizer, token_id)
            except Exception:  # nothing narrower is raised; bytes that are no UTF-8 undid the text before them
                pieces.append(self.flush())
                continue
            if piece is not None:
                self._shown, self._held = self._held, []
                pieces.append(piece)
            else:
                pieces.append(self.flush() if len(self._held) >= _MAX_HELD_TOKENS else "")
        return pieces

    def flush(self) -> str:
        """See Detokenizer."""
        shown = self._decode(self._shown)
        whole = self._decode(self._shown + self._held)
        text = whole[len(shown) :] if whole.startswith(shown) else self._decode(self._held)
        self._held = []
        self._stream = self._new_stream()
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(ids=self._shown, skip_special_tokens=True)


def _compile_template(folder: ModelFolder) -> ChatTemplate | None:
    found = folder.chat_template()
    if found is None:
        return None
    file, source = found
    try:
        return ChatTemplate(source, special_tokens=folder.special_tokens)
    except jinja2.TemplateError as exc:
        raise broken_folder(f"the chat template of {folder.path / file} is broken: {exc}", fix="mend it") from exc
