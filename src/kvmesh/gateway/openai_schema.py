"""What the OpenAI API's requests hold, as far as it is served, and the mesh's requests they become: one per choice."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.gateway.openai_unserved import without_unserved
from kvmesh.v1 import frontend_pb2, generation_pb2
from kvmesh.wire.validation import MAX_LOGPROBS, MAX_STOP_BYTES, MAX_STOPS, invalid

MAX_CHOICES = 32
"""Of one request; each is a request of the mesh."""


def _text_of_parts(value: object) -> object:
    """Join a list of text parts; null is what an answer without text has."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError('must be text, or a list of parts of the form {"type": "text", "text": "..."}')
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('only parts of the form {"type": "text", "text": "..."} are served')
    return "".join(part["text"] for part in value)


def _one_or_many(value: object) -> object:
    if value is not None and not isinstance(value, str | list):
        raise ValueError(f"must be text, or a list of up to {MAX_STOPS} texts")
    return [] if value is None else [value] if isinstance(value, str) else value


def _many_prompts(value: object) -> object:
    """Make a list of prompts of one."""
    is_many = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    return value if is_many else [value]


def _none_if_false(value: object) -> object:
    return None if value is False else value


def _typed_format(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(value.get("type"), str):
        raise ValueError('must have a type, as in {"type": "json_object"}')
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
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """Choices per prompt."""
    response_format: Annotated[dict[str, Any], AfterValidator(_typed_format)] | None = None
    """Passed on as it is, to engines that keep to one."""

    @property
    def choices_per_prompt(self) -> int:
        """How many answers each prompt gets; choice i answers prompt i // choices_per_prompt."""
        return self.n or 1

    @property
    def logprob_count(self) -> int | None:
        """How many likely tokens are told per output token; None = not even its own log probability."""
        raise NotImplementedError

    @property
    def echoed(self) -> list[str]:
        """The prompts that their answers begin with; [] = none does."""
        return []

    @property
    def is_plain(self) -> bool:
        """Whether each choice is nothing but its text."""
        return self.logprob_count is None and not self.echoed

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    mesh_fields: ClassVar[Mapping[str, str]] = {}
    """This API's name of what the mesh's request, and what is made of it, calls by another."""

    def prompt_messages(self) -> list[generation_pb2.Prompt]:
        """Return the prompts. Raises: FixRequestError(EMPTY_PROMPT)."""
        raise NotImplementedError

    def token_limit(self) -> int | None:
        """Return the most tokens to produce."""
        return self.max_tokens

    def to_generate_requests(self, *, client_request_id: str) -> list[frontend_pb2.GenerateRequest]:
        """Return the mesh's requests, one per choice. Raises: FixRequestError."""
        sampling = generation_pb2.SamplingParams(
            max_tokens=self.token_limit(),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else self.seed % 2**64,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprob_count,
            response_format=self._format_json(),
        )
        prompts = self.prompt_messages()
        if len(prompts) * self.choices_per_prompt > MAX_CHOICES:
            raise invalid(
                "n" if self.n else "prompt",
                f"{len(prompts)} prompts with {self.choices_per_prompt} choices each are too many: up to {MAX_CHOICES}",
            )
        requests = [
            frontend_pb2.GenerateRequest(
                prompt=prompt, model=self.model, sampling=sampling, client_request_id=client_request_id
            )
            for prompt in prompts
            for _ in range(self.choices_per_prompt)
        ]
        if self.seed is not None:  # the choices of one prompt would all be the same
            for index, request in enumerate(requests):
                request.sampling.seed = (self.seed + index % self.choices_per_prompt) % 2**64
        return requests

    def _format_json(self) -> str:
        if self.response_format is None or self.response_format["type"] == "text":
            return ""
        return orjson.dumps(self.response_format).decode()


_SAME_IN_BOTH = {
    "query.model": "model",
    "sampling.response_format": "response_format",
    "sampling.max_tokens": "max_tokens",
}


class ChatRequest(OpenAIRequest):
    """The body of /v1/chat/completions."""

    mesh_fields: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("prompt", "prompt.messages", "prompt.messages.messages", "text", "token_ids"), "messages"),
        **_SAME_IN_BOTH,
        "sampling.logprobs": "logprobs",
    }
    messages: list[Message]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def logprob_count(self) -> int | None:
        """See OpenAIRequest. Raises: FixRequestError(INVALID_FIELD) for the one of the two fields without the other."""
        if not self.logprobs:
            if self.top_logprobs:
                raise invalid("top_logprobs", "set logprobs to true as well")
            return None
        return self.top_logprobs or 0

    def prompt_messages(self) -> list[generation_pb2.Prompt]:
        """Return the conversation. Raises: FixRequestError(EMPTY_PROMPT) if none of it has any text."""
        if not any(item.content for item in self.messages):
            raise FixRequestError(Reason.EMPTY_PROMPT, "", field="messages")
        messages = [generation_pb2.ChatMessage(role=item.role, content=item.content) for item in self.messages]
        return [generation_pb2.Prompt(messages=generation_pb2.ChatMessages(messages=messages))]

    def token_limit(self) -> int | None:
        """Return the newer of the API's two names for it where it is set."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(OpenAIRequest):
    """The body of /v1/completions."""

    mesh_fields: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("prompt.text", "prompt.token_ids", "text", "token_ids"), "prompt"),
        **_SAME_IN_BOTH,
        "sampling.logprobs": "logprobs",
    }
    prompt: Annotated[
        list[str | list[Annotated[int, Field(ge=0, lt=2**32)]]], BeforeValidator(_many_prompts), Field(min_length=1)
    ]
    """One or several; each is text or tokens."""
    logprobs: Annotated[int | None, BeforeValidator(_none_if_false)] = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1)

    @property
    def logprob_count(self) -> int | None:
        """See OpenAIRequest."""
        return self.logprobs

    @property
    def echoed(self) -> list[str]:
        """See OpenAIRequest."""
        return [prompt for prompt in self.prompt if isinstance(prompt, str)] if self.echo else []

    def prompt_messages(self) -> list[generation_pb2.Prompt]:
        """Return the texts or the tokens. Raises: FixRequestError(INVALID_FIELD) for fields that do not go together."""
        if self.echo and self.logprobs is not None:
            raise invalid("echo", "not supported with logprobs: the prompt's tokens have none here; leave one out")
        if self.echo and len(self.echoed) < len(self.prompt):
            raise invalid("echo", "not supported for prompts of tokens: send text")
        if self.best_of is not None and self.best_of != self.choices_per_prompt:
            raise invalid("best_of", "not supported: leave it out; n answers are made and all of them returned")
        return [_prompt_of(prompt) for prompt in self.prompt]


def _prompt_of(prompt: str | Sequence[int]) -> generation_pb2.Prompt:
    if not prompt:
        raise FixRequestError(Reason.EMPTY_PROMPT, "", field="prompt")
    if isinstance(prompt, str):
        return generation_pb2.Prompt(text=prompt)
    return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(token_ids=prompt))


Body = TypeVar("Body", bound=OpenAIRequest)


def parse_body(value: Any, kind: type[Body]) -> Body:
    """Return a request of this kind. Raises: FixRequestError naming the field, with its range where it has one."""
    if not isinstance(value, Mapping):
        raise FixRequestError(Reason.INVALID_FIELD, "the body must be a JSON object")
    try:
        return kind.model_validate(without_unserved(value))
    except ValidationError as exc:
        raise _refusal(exc) from exc


def _refusal(exc: ValidationError) -> FixRequestError:
    first = exc.errors(include_url=False, include_input=False)[0]
    # A union's error names the branch that was tried after the field: that is no part of the path.
    field, *rest = first["loc"]
    parts = [field, *(part for part in rest if not (isinstance(part, str) and ("[" in part or part in {"str", "int"})))]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    if field == "prompt" and first["type"] != "missing":  # of the two branches' errors either alone would mislead
        return invalid("prompt", "must be text, a list of token ids (0 to 2^32 - 1), or a list of several such prompts")
    if first["type"] == "extra_forbidden":
        return invalid(path, "not supported: leave it out")
    return invalid(path, first["msg"].removeprefix("Value error, "))
