"""The port behind which every tokenizer stands."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class TokenText(NamedTuple):
    """One token, read on its own."""

    text: str
    """U+FFFD for bytes that are no whole character; its name for a special token."""
    text_bytes: bytes | None
    """What it adds to a text, maybe a part of a character; None for a special token, which adds nothing."""


class Detokenizer(Protocol):
    """Turns the output tokens of ONE request into text as they come."""

    def push(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token, in order; "" while the bytes of a character are incomplete."""

    def flush(self) -> str:
        """Return the text of what is still incomplete, at the end of the output."""


class Tokenizer(Protocol):
    """What a processor needs to know of a model to serve text with it. Safe to share between requests."""

    @property
    def vocab_size(self) -> int:
        """Token ids of the model are 0 .. vocab_size - 1."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence, sorted; () = none."""

    @property
    def max_context_tokens(self) -> int | None:
        """Tokens of prompt and output together; None = the model does not say."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> npt.NDArray[np.uint32]:
        """Return the tokens of `text` `(tokens,)`; pass `add_special_tokens=False` for what `render_chat` returned.

        A chat template writes its special tokens itself; adding them again would begin the sequence twice.
        """

    def render_chat(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the prompt of a conversation of (role, content), ready for the assistant's answer.

        Raises:
            FixRequestError: INVALID_FIELD on prompt.messages, when the model's template refuses them or there is none.
        """

    def token_text(self, token_id: int) -> TokenText:
        """Return one token's text and bytes; of an id that the vocabulary does not have, nothing."""

    def detokenizer(self, *, after: Sequence[int] = ()) -> Detokenizer:
        """Return a new detokenizer; `after` is the end of the prompt, which decides whether a first space is kept."""
