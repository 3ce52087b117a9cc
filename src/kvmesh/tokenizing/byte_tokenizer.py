"""The tokenizer of models that have none: every UTF-8 byte is a token.

Not made of the tokenizers library: its byte-fallback decoder never recovers from bytes that are no UTF-8, which the
output of a simulated engine may be; the standard library's incremental codec does, and costs less.
"""

import codecs
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.tokenizing.tokenizer import TokenText

_BYTES = 256
_REPLACEMENT = "\ufffd"


class ByteTokenizer:
    """Reads and writes UTF-8 bytes as the ids 0..255."""

    vocab_size = _BYTES
    eos_token_ids: tuple[int, ...] = ()
    max_context_tokens: int | None = None

    @property
    def printable_ids(self) -> tuple[int, int]:
        """The first id of printable ASCII and the one after its last, as `range` takes them."""
        return ord(" "), ord("~") + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> npt.NDArray[np.uint32]:
        """Return the bytes of `text`; there are no special tokens. A lone surrogate becomes a question mark."""
        return np.frombuffer(text.encode(errors="replace"), dtype=np.uint8).astype(np.uint32)

    def render_chat(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return one line `role: content` per message."""
        return "".join(f"{role}: {content}\n" for role, content in messages)

    def token_text(self, token_id: int) -> TokenText:
        """Return the byte; what is no byte is what the detokenizer shows for it."""
        text_bytes = bytes((token_id,)) if token_id < _BYTES else _REPLACEMENT.encode()
        return TokenText(text_bytes.decode("utf-8", "replace"), text_bytes)

    def detokenizer(self, *, after: Sequence[int] = ()) -> "ByteDetokenizer":
        """Return a new detokenizer; what comes before changes nothing."""
        return ByteDetokenizer()


class ByteDetokenizer:
    """Decodes bytes as they come; what is no UTF-8, or no byte, becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> list[str]:
        """See Detokenizer; under 0.1 us per token of ASCII."""
        if not self._decoder.getstate()[0]:
            try:
                return list(bytes(token_ids).decode("ascii"))
            except ValueError:  # not all ASCII (UnicodeDecodeError), or an id beyond the bytes
                pass
        return [self._decode(token_id) for token_id in token_ids]

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", final=True)

    def _decode(self, token_id: int) -> str:
        if token_id >= _BYTES:
            return self._decoder.decode(b"", final=True) + _REPLACEMENT
        return self._decoder.decode(bytes((token_id,)))
