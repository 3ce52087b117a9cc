"""What the OpenAI API's requests hold, as far as it is served, and the mesh's request they become.

A field that changes the answer and is not served is refused by its name, never ignored; a field whose value asks for
nothing is let through, because clients send many of those.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.v1 import frontend_pb2, generation_pb2
from kvmesh.wire.validation import MAX_STOP_BYTES, MAX_STOPS, invalid

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "echo": (None, False),
    "suffix": (None, ""),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "reasoning_effort": (None,),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "verbosity": (None,),
}
"""Fields of the API that are not served, with the values that ask for nothing."""

_ABOUT_THE_CALLER = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}
)
"""Fields that change no answer here."""

_NEUTRAL_IN_MESSAGES: dict[str, tuple[object, ...]] = {
    "name": (None, ""),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
    "function_call": (None,),
    "tool_calls": (None, []),
}
"""What clients send along when they pass an earlier answer back."""


def _text_of_parts(value: object) -> object:
    """Join a list of text parts; null is what an answer without text has."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('only parts of the form {"type": "text", "text": "..."} are served')
    return "".join(part["text"] for part in value)


def _one_or_many(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


def _only_prompt(value: object) -> object:
    """Unwrap a list of one prompt."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise ValueError("one prompt per request")
        return value[0]
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Strict):
    """What else a stream carries."""

    include_usage: bool = False
    """True: one more chunk before the end, with the usage and no choices."""
    include_obfuscation: bool = False
    """Taken and not acted upon: padding against eavesdroppers belongs to TLS here."""


def _no_long_stop(stop: str) -> str:
    if (size := len(stop.encode())) > MAX_STOP_BYTES:
        raise ValueError(f"{size} bytes are too many: up to {MAX_STOP_BYTES}")
    return stop


_Stop = Annotated[str, Field(min_length=1), AfterValidator(_no_long_stop)]


class Message(_Strict):
    """One message of a conversation."""

    role: str = Field(min_length=1)
    content: Annotated[str, BeforeValidator(_text_of_parts)] = ""


class OpenAIRequest(_Strict):
    """What both kinds of completion take."""

    model: str = ""
    """May be empty while the mesh serves exactly one model."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=2**32)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**32)
    """Not of the API, but what its servers commonly take."""
    ignore_eos: bool = False
    """Likewise."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Annotated[list[_Stop], BeforeValidator(_one_or_many), Field(max_length=MAX_STOPS)] = []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    mesh_fields: ClassVar[Mapping[str, str]] = {}
    """This API's name of what the mesh's request, and what is made of it, calls by another."""

    def prompt_message(self) -> generation_pb2.Prompt:
        """Return the prompt. Raises: FixRequestError(EMPTY_PROMPT)."""
        raise NotImplementedError

    def token_limit(self) -> int | None:
        """Return the most tokens to produce."""
        return self.max_tokens

    def to_generate_request(self, *, client_request_id: str) -> frontend_pb2.GenerateRequest:
        """Return the mesh's request. Raises: FixRequestError."""
        sampling = generation_pb2.SamplingParams(
            max_tokens=self.token_limit(),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else self.seed % 2**64,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
        )
        return frontend_pb2.GenerateRequest(
            prompt=self.prompt_message(), model=self.model, sampling=sampling, client_request_id=client_request_id
        )


class ChatRequest(OpenAIRequest):
    """The body of /v1/chat/completions."""

    mesh_fields: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("prompt", "prompt.messages", "prompt.messages.messages", "text", "token_ids"), "messages"
    )
    messages: list[Message]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**32)

    def prompt_message(self) -> generation_pb2.Prompt:
        """Return the conversation."""
        if not self.messages:
            raise FixRequestError(Reason.EMPTY_PROMPT, "", field="messages")
        messages = [generation_pb2.ChatMessage(role=item.role, content=item.content) for item in self.messages]
        return generation_pb2.Prompt(messages=generation_pb2.ChatMessages(messages=messages))

    def token_limit(self) -> int | None:
        """Return the newer of the API's two names for it where it is set."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(OpenAIRequest):
    """The body of /v1/completions."""

    mesh_fields: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("prompt.text", "prompt.token_ids", "text", "token_ids"), "prompt"
    )
    prompt: Annotated[str | list[Annotated[int, Field(ge=0, lt=2**32)]], BeforeValidator(_only_prompt)]

    def prompt_message(self) -> generation_pb2.Prompt:
        """Return the text or the tokens."""
        if not self.prompt:
            raise FixRequestError(Reason.EMPTY_PROMPT, "", field="prompt")
        if isinstance(self.prompt, str):
            return generation_pb2.Prompt(text=self.prompt)
        return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=self.prompt))


Body = TypeVar("Body", bound=OpenAIRequest)


def parse_body(value: Any, kind: type[Body]) -> Body:
    """Return a request of this kind. Raises: FixRequestError naming the field, with its range where it has one."""
    if not isinstance(value, Mapping):
        raise FixRequestError(Reason.INVALID_FIELD, "the body must be a JSON object")
    served = _without_neutral(value, _NEUTRAL, path="")
    served = {name: item for name, item in served.items() if name not in _ABOUT_THE_CALLER}
    messages = served.get("messages")
    if isinstance(messages, list):
        served["messages"] = [
            _without_neutral(item, _NEUTRAL_IN_MESSAGES, path=f"messages[{index}].")
            if isinstance(item, Mapping)
            else item
            for index, item in enumerate(messages)
        ]
    try:
        return kind.model_validate(served)
    except ValidationError as exc:
        raise _refusal(exc) from exc


def _without_neutral(value: Mapping[str, Any], neutral: Mapping[str, Sequence[object]], *, path: str) -> dict[str, Any]:
    """Return what is left to look at. Raises: FixRequestError naming a field that asks for what is not served."""
    for name, item in value.items():
        if name in neutral and item not in neutral[name]:
            allowed = [f"send {orjson.dumps(value).decode()}" for value in neutral[name] if value is not None]
            advice = " or ".join(["leave it out", *allowed])
            raise invalid(f"{path}{name}", f"not supported: {advice}")
    return {name: item for name, item in value.items() if name not in neutral}


def _refusal(exc: ValidationError) -> FixRequestError:
    first = exc.errors(include_url=False, include_input=False)[0]
    # A union's error names the branch that was tried after the field: that is no part of the path.
    field, *rest = first["loc"]
    parts = [field, *(part for part in rest if not (isinstance(part, str) and ("[" in part or part in {"str", "int"})))]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    if first["type"] == "extra_forbidden":
        return invalid(path, "not supported: leave it out")
    return invalid(path, first["msg"].removeprefix("Value error, "))
