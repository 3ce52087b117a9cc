"""The OpenAI API's replies: whole, and as the chunks of a stream.

What the chunks of one stream share is serialised once, so that a token costs the escaping of its text.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from kvmesh.gateway import sse
from kvmesh.v1 import frontend_pb2, generation_pb2

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_UNSPECIFIED: "stop",
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """In what the replies of the two kinds of completion differ."""

    id_prefix: str
    object_name: str
    """`object` of a whole reply."""
    chunk_name: str
    """`object` of a chunk."""
    is_chat: bool

    def choice(
        self, text: str, reason: generation_pb2.FinishReason.ValueType, *, index: int = 0, logprobs: Any = None
    ) -> dict[str, Any]:
        """Return one choice of a whole reply."""
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        )
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": _FINISH_REASONS[reason]}


CHAT = ReplyForm("chatcmpl-", "chat.completion", "chat.completion.chunk", is_chat=True)
COMPLETION = ReplyForm("cmpl-", "text_completion", "text_completion", is_chat=False)


class Reply:
    """One request's reply: one id, one time of creation, one model."""

    def __init__(self, form: ReplyForm, started: frontend_pb2.Started, *, includes_usage: bool = False) -> None:
        """The reply is created now; `includes_usage` announces the last chunk in every other, as the API does."""
        self._form = form
        self._head: dict[str, Any] = {
            "id": form.id_prefix + started.request_id,
            "object": form.chunk_name,
            "created": int(time.time()),
            "model": started.model,
        }
        self._includes_usage = includes_usage
        prefix, suffix = self.piece("").rsplit(b'""', 1)
        self._token_prefix, self._token_suffix = prefix, suffix

    def whole(self, choices: list[dict[str, Any]], usage: generation_pb2.Usage) -> dict[str, Any]:
        """Return the reply in one piece; `choices` as the form makes them."""
        return {**self._head, "object": self._form.object_name, "choices": choices, "usage": usage_json(usage)}

    def opening(self, *, index: int = 0) -> bytes:
        """Return the events before a choice's first token: a chat says who speaks."""
        return self._chunk({"role": "assistant", "content": ""}, "", index=index) if self._form.is_chat else b""

    def tokens(self, pieces: Iterable[str]) -> bytes:
        """Return one event per piece of text of the first choice, to be written at once."""
        prefix, suffix = self._token_prefix, self._token_suffix
        return b"".join([prefix + orjson.dumps(piece) + suffix for piece in pieces])

    def piece(self, text: str, *, index: int = 0, logprobs: Any = None) -> bytes:
        """Return the event of one piece of text of any choice."""
        return self._chunk({"content": text}, text, index=index, logprobs=logprobs)

    def closing(self, reason: generation_pb2.FinishReason.ValueType, *, index: int = 0) -> bytes:
        """Return the event after a choice's last token."""
        return self._chunk({}, "", index=index, finish_reason=_FINISH_REASONS[reason])

    def ending(self, usage: generation_pb2.Usage) -> bytes:
        """Return the events after the last choice, before the stream's end."""
        if not self._includes_usage:
            return b""
        return sse.event(orjson.dumps({**self._head, "choices": [], "usage": usage_json(usage)}))

    def _chunk(
        self, delta: dict[str, str], text: str, *, index: int, logprobs: Any = None, finish_reason: str | None = None
    ) -> bytes:
        content: dict[str, Any] = {"delta": delta} if self._form.is_chat else {"text": text}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._includes_usage else {}
        return sse.event(orjson.dumps({**self._head, "choices": [choice], **usage}))


def usage_json(usage: generation_pb2.Usage) -> dict[str, Any]:
    """Return what a request consumed, in the API's words."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def model_json(model: frontend_pb2.Model) -> dict[str, Any]:
    """Return one model as the API lists it; no time of creation is known."""
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "kvmesh"}
