"""Log probabilities in the two forms that the OpenAI API has for them."""

from collections.abc import Sequence
from typing import Any

from kvmesh.v1 import generation_pb2


def chat_logprobs(entries: Sequence[generation_pb2.TokenLogprobs]) -> dict[str, Any] | None:
    """Return the form of chats; None for no token that has text."""
    content = [
        {**_logprob_json(entry.token), "top_logprobs": [_logprob_json(likely) for likely in entry.top]}
        for entry in entries
        if _has_text(entry)
    ]
    return {"content": content, "refusal": None} if content else None


def completion_logprobs(entries: Sequence[tuple[generation_pb2.TokenLogprobs, int]]) -> dict[str, list[Any]] | None:
    """Return the form of completions, of tokens and where in the choice's text each begins; None as above."""
    tokens = [(entry, offset) for entry, offset in entries if _has_text(entry)]
    if not tokens:
        return None
    return {
        "tokens": [entry.token.text for entry, _ in tokens],
        "token_logprobs": [entry.token.logprob for entry, _ in tokens],
        "top_logprobs": [_by_text(entry) for entry, _ in tokens],
        "text_offset": [offset for _, offset in tokens],
    }


def _has_text(entry: generation_pb2.TokenLogprobs) -> bool:
    """Tell whether a token is part of the text: the one that ends a sequence is not."""
    return entry.token.HasField("output_bytes")


def _logprob_json(logprob: generation_pb2.Logprob) -> dict[str, Any]:
    return {
        "token": logprob.text,
        "logprob": logprob.logprob,
        "bytes": list(logprob.output_bytes) if logprob.HasField("output_bytes") else None,
    }


def _by_text(entry: generation_pb2.TokenLogprobs) -> dict[str, float]:
    """Return the likely tokens and the chosen one; of several with one text (parts of characters) the likeliest."""
    found: dict[str, float] = {}
    for likely in (*entry.top, entry.token):
        found.setdefault(likely.text, likely.logprob)
    return found
