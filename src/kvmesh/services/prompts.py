"""From a client's prompt to what is routed and sent: template, tokens, block hashes. Everything here is done once."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.hashing import text_tokens
from kvmesh.core.roster import WorkerRecord
from kvmesh.tokenizing.tokenizer import Tokenizer
from kvmesh.v1 import decode_worker_pb2, generation_pb2
from kvmesh.wire.validation import invalid

TOKENS, TEXT = "tokens", "text"
"""Prompt forms, as worker records name them."""
_OFF_LOOP_CHARS = 4096
"""Texts longer than this are tokenised in a thread: the loop would stand still for milliseconds."""
_MOST_CHARS_PER_TOKEN = 256
"""No vocabulary in use has a longer token (runs of spaces and of dashes come near): text longer than so many for each
token of the context need not be tokenised to be refused."""
_LONG_TEXTS = 2
"""Tokenised at once: each takes a core for as long as it lasts, and up to a hundred times its size in memory."""
_Tokens = npt.NDArray[np.uint32]


class Tokenising:
    """Where one processor's texts become tokens: long ones in threads, in turn."""

    def __init__(self) -> None:
        """Start no thread before a long text comes."""
        self._threads = ThreadPoolExecutor(_LONG_TEXTS, thread_name_prefix="tokenise")

    async def run(self, encode: Callable[[str], _Tokens], text: str) -> _Tokens:
        """Return the tokens of a text. One that nobody waits for any more by its turn is left out."""
        if len(text) <= _OFF_LOOP_CHARS:
            return encode(text)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode, text)

    def close(self) -> None:
        """Take no more long texts; those that were taken are tokenised, and not waited for. Idempotent."""
        self._threads.shutdown(wait=False)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPrompt:
    """A prompt in every form its model's workers read."""

    text: str | None
    """None for a prompt that came as tokens and has no tokenizer."""
    token_ids: npt.NDArray[np.uint32] | None
    """Shape (prompt_tokens,); None for workers that accept TEXT alone."""
    identity: npt.NDArray[np.uint32]
    """What block hashes are made of: the tokens, or the UTF-8 bytes where there are none."""

    wire_tokens: generation_pb2.TokenIds | None = None
    """The tokens as they came, where they came as tokens: copied on, they need not be made again."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; UTF-8 bytes for workers that accept TEXT."""
        return len(self.identity)


async def prepare_prompt(
    prompt: generation_pb2.Prompt,
    *,
    tokenizer: Tokenizer | None,
    tokenising: Tokenising,
    accepts: frozenset[str],
    max_context_tokens: int = 0,
) -> PreparedPrompt:
    """Render and tokenise as the workers need it; `accepts`: the forms they read, together.

    `max_context_tokens` is what every one of them has room for, prompt and output; 0 = not known.

    Raises: FixRequestError(INVALID_FIELD or EMPTY_PROMPT) naming the field.
    """
    if prompt.WhichOneof("input") == "token_ids":
        return _from_tokens(prompt.token_ids, tokenizer, accepts)
    text = _render(prompt.messages, tokenizer) if prompt.WhichOneof("input") == "messages" else prompt.text
    if not text:
        raise FixRequestError(Reason.EMPTY_PROMPT, "the messages hold no text", field="prompt.messages")
    if tokenizer is None or TOKENS not in accepts:
        if TEXT not in accepts:
            raise invalid("prompt", "no tokenizer is configured for this model: send token ids")
        return PreparedPrompt(text, None, text_tokens(text))
    # A chat template writes the special tokens itself.
    encode = partial(tokenizer.encode, add_special_tokens=prompt.WhichOneof("input") != "messages")
    if max_context_tokens and len(text) > max_context_tokens * _MOST_CHARS_PER_TOKEN:
        raise invalid(
            "prompt", f"{len(text)} characters leave no room in a context of {max_context_tokens} tokens: shorten it"
        )
    token_ids = await tokenising.run(encode, text)
    if not len(token_ids):
        raise FixRequestError(Reason.EMPTY_PROMPT, "the prompt has no tokens", field="prompt")
    return PreparedPrompt(text, token_ids, token_ids)


def accepted_forms(records: Iterable[WorkerRecord]) -> frozenset[str]:
    """Return every prompt form that any of these workers reads."""
    return frozenset[str]().union(*(record.accepts for record in records))


def fill_input(request: decode_worker_pb2.DecodeRequest, prepared: PreparedPrompt, accepts: frozenset[str]) -> None:
    """Set the prompt of a DecodeRequest in a form that one worker reads: tokens where it reads both.

    Raises: FixRequestError(INVALID_FIELD) if there is none.
    """
    if TOKENS in accepts and prepared.wire_tokens is not None:
        request.token_ids.CopyFrom(prepared.wire_tokens)
    elif TOKENS in accepts and prepared.token_ids is not None:
        request.token_ids.token_ids.extend(prepared.token_ids.tolist())
    elif TEXT in accepts and prepared.text is not None:
        request.text = prepared.text
    else:
        raise invalid("prompt", "this model's workers read text, not token ids: send text")


def _from_tokens(
    wire_tokens: generation_pb2.TokenIds, tokenizer: Tokenizer | None, accepts: frozenset[str]
) -> PreparedPrompt:
    token_ids = np.array(wire_tokens.token_ids, dtype=np.uint32)
    text = None
    if TEXT in accepts:
        if tokenizer is None and TOKENS not in accepts:
            raise invalid("prompt.token_ids", "this model's workers read text, not token ids: send text")
        text = _decode(token_ids, tokenizer) if tokenizer is not None else None
    identity = token_ids if TOKENS in accepts else text_tokens(text or "")
    return PreparedPrompt(text, token_ids, identity, wire_tokens)


def _decode(token_ids: npt.NDArray[np.uint32], tokenizer: Tokenizer) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join(detokenizer.push(token_ids.tolist())) + detokenizer.flush()


def _render(messages: generation_pb2.ChatMessages, tokenizer: Tokenizer | None) -> str:
    """Render with the model's template; without one, a lone message is its content, several are one per line."""
    if tokenizer is not None:
        return tokenizer.render_chat([(message.role, message.content) for message in messages.messages])
    if len(messages.messages) == 1:
        return messages.messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages.messages)
