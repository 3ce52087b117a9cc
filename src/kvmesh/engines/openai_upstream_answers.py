"""What an OpenAI-compatible server says, read: server-sent events, completion chunks, errors. Pure.

bytes -> `EventLines` -> payload of one `data:` line -> `read_chunk` -> text, finish, usage | an error of ours
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from kvmesh.core.errors import (
    BackOffError,
    FixRequestError,
    MeshError,
    NotKnownError,
    OutOfTimeError,
    Reason,
    TryElsewhereError,
)
from kvmesh.engines.engine import FinishReason
from kvmesh.engines.stream_thread import StreamUsage

DONE = b"[DONE]"
"""The payload after which nothing comes."""
_MAX_LINE_BYTES = 4 * 1024 * 1024
_MAX_TEXT_CHARS = 512
"""Of the upstream's own words in an error."""
_FINISH = {"length": FinishReason.LENGTH}
"""By the upstream's word; every other end is a stop."""
_MAX_RETRY_S = 3_600.0


class EventLines:
    """Cuts a byte stream into the payloads of its `data:` lines; comments and other fields are left out."""

    def __init__(self) -> None:
        """Start with nothing read."""
        self._rest = b""

    def push(self, data: bytes) -> list[bytes]:
        """Return the payloads that `data` completes. Raises: TryElsewhereError if a line never ends."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            raise _unreadable(f"a line of over {_MAX_LINE_BYTES} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a completion's stream."""

    text: str = ""
    finish: FinishReason | None = None
    usage: StreamUsage | None = None


def read_chunk(payload: bytes) -> Chunk:
    """Read one event of either API. Raises: MeshError if it is an error, or nothing that can be read."""
    try:
        event = orjson.loads(payload)
        if event.get("error"):
            raise _error_in_stream(event["error"])
        usage = _read_usage(event.get("usage"))
        choices = event.get("choices") or [{}]
        choice = choices[0]
        text = choice.get("text")
        if text is None:
            text = (choice.get("delta") or {}).get("content")
        word = choice.get("finish_reason")
        if not isinstance(text, str | None) or not isinstance(word, str | None):
            raise TypeError("text and finish_reason are strings, or null")
        finish = _FINISH.get(word, FinishReason.STOP) if word else None  # some write an empty one for null
        return Chunk(text=text or "", finish=finish, usage=usage)
    except (ValueError, TypeError, AttributeError, LookupError) as exc:
        raise _unreadable(payload[:_MAX_TEXT_CHARS].decode("utf-8", "replace")) from exc


def read_models(body: bytes) -> dict[str, int]:
    """Return the listed models and their contexts in tokens, 0 = not said. Raises: TryElsewhereError."""
    try:
        listed = orjson.loads(body)["data"]
        return {str(model["id"]): _context_tokens(model) for model in listed}
    except (ValueError, TypeError, LookupError) as exc:
        raise _unreadable(body[:_MAX_TEXT_CHARS].decode("utf-8", "replace")) from exc


def error_of_status(status: int, body: bytes, *, url: str, retry_after: str | None = None) -> MeshError:
    """Return what a response that is no 200 means for its request."""
    text, param = _words_of(body)
    said = f"the upstream answered {status}{f': {text}' if text else ''}"  # read by strangers too: no address
    match status:
        case 404:
            return NotKnownError(Reason.UNKNOWN_MODEL, said, field="model")
        case 401 | 403:
            return MeshError(Reason.INTERNAL, f"{url}: {said} (see --engine-option api_key_env)")
        case 408 | 504:
            return OutOfTimeError(Reason.DEADLINE, said)
        case 429:
            return BackOffError(Reason.OVERLOADED, said, retry_after_s=_seconds(retry_after))
        case _ if 400 <= status < 500:
            return FixRequestError(Reason.INVALID_FIELD, said, field=param or "prompt")
        case _:
            return TryElsewhereError(Reason.WORKER_LOST, f"{url}: {said}")


def _error_in_stream(error: Any) -> MeshError:
    """Return what an error means that came after the answer had begun with 200."""
    fields = error if isinstance(error, Mapping) else {"message": str(error)}
    code, kind = fields.get("code"), str(fields.get("type") or "")
    if isinstance(code, int) and 400 <= code < 600:
        return error_of_status(code, orjson.dumps({"error": dict(fields)}), url="in its stream")
    said = f"the upstream's stream ended with {str(fields.get('message') or fields)[:_MAX_TEXT_CHARS]}"
    if "rate_limit" in kind:
        return BackOffError(Reason.OVERLOADED, said)
    if "invalid_request" in kind:
        return FixRequestError(Reason.INVALID_FIELD, said, field=_param(fields) or "prompt")
    return TryElsewhereError(Reason.WORKER_LOST, said)


def _words_of(body: bytes) -> tuple[str, str | None]:
    """Return an error body's message and the field it names, in whatever shape this server writes them."""
    try:
        parsed = orjson.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip()[:_MAX_TEXT_CHARS], None
    inner = parsed.get("error", parsed) if isinstance(parsed, Mapping) else parsed
    if not isinstance(inner, Mapping):
        return str(inner)[:_MAX_TEXT_CHARS], None
    return str(inner.get("message") or inner.get("detail") or dict(inner))[:_MAX_TEXT_CHARS], _param(inner)


def _param(fields: Mapping[str, Any]) -> str | None:
    param = fields.get("param")
    return param if isinstance(param, str) and param else None


def _read_usage(usage: Any) -> StreamUsage | None:
    if not usage or not usage.get("prompt_tokens"):
        return None
    cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return StreamUsage(
        prompt_tokens=int(usage["prompt_tokens"]),
        cached_tokens=int(cached_tokens) if cached_tokens is not None else None,
        completion_tokens=int(usage.get("completion_tokens") or 0),
    )


def _context_tokens(model: Mapping[str, Any]) -> int:
    """Return the context a model list tells: `max_model_len` is vLLM's and SGLang's word, `n_ctx_train` llama.cpp's."""
    meta = model.get("meta") or {}
    return int(model.get("max_model_len") or model.get("context_length") or meta.get("n_ctx") or 0)


def _seconds(retry_after: str | None) -> float | None:
    """Return a Retry-After in seconds; the other form, a date, is nothing to wait for here."""
    try:
        seconds = float(retry_after) if retry_after is not None else None
    except ValueError:
        return None
    return seconds if seconds is not None and 0 <= seconds <= _MAX_RETRY_S else None


def _unreadable(what: str) -> TryElsewhereError:
    return TryElsewhereError(Reason.WORKER_LOST, f"the upstream sent what is no OpenAI answer: {what}")
