"""What a client's message must satisfy. Every refusal names the field by its path, and the range."""

import orjson
from google.protobuf import duration_pb2

from kvmesh.core.candidates import MAX_WEIGHT
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.v1 import frontend_pb2, generation_pb2

DEFAULT_MAX_TOKENS = 128
MAX_STOPS = 4
MAX_STOP_BYTES = 1024
MAX_LOGPROBS = 20
MAX_FORMAT_BYTES = 64 * 1024
MAX_CLIENT_ID_BYTES = 256
_MAX_TEMPERATURE = 2.0


def invalid(field: str, message: str) -> FixRequestError:
    """Return the error of one bad field."""
    return FixRequestError(Reason.INVALID_FIELD, f"{field}: {message}", field=field)


def check_generate_request(request: frontend_pb2.GenerateRequest) -> None:
    """Refuse a request that no worker could serve. Raises: FixRequestError(EMPTY_PROMPT or INVALID_FIELD)."""
    check_prompt(request.prompt)
    check_sampling(request.sampling)
    check_hints(request.routing)
    if len(request.client_request_id.encode()) > MAX_CLIENT_ID_BYTES:
        raise invalid("client_request_id", f"at most {MAX_CLIENT_ID_BYTES} bytes")


def check_prompt(prompt: generation_pb2.Prompt) -> None:
    """Raises: FixRequestError(EMPTY_PROMPT) naming the form that is empty, or `prompt` when none is set."""
    form = prompt.WhichOneof("input")
    if form is None:
        raise FixRequestError(Reason.EMPTY_PROMPT, "prompt: set one of text, token_ids, messages", field="prompt")
    if form == "text" and not prompt.text:
        raise FixRequestError(Reason.EMPTY_PROMPT, "", field="prompt.text")
    if form == "token_ids" and not prompt.token_ids.token_ids:
        raise FixRequestError(Reason.EMPTY_PROMPT, "", field="prompt.token_ids")
    if form == "messages":
        if not prompt.messages.messages:
            raise FixRequestError(Reason.EMPTY_PROMPT, "", field="prompt.messages")
        for index, message in enumerate(prompt.messages.messages):
            if not message.role:
                raise invalid(f"prompt.messages.messages[{index}].role", "required, e.g. user")


def check_sampling(sampling: generation_pb2.SamplingParams, *, path: str = "sampling") -> None:
    """Raises: FixRequestError(INVALID_FIELD) naming the field under `path` and its range."""
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise invalid(f"{path}.max_tokens", "0 is out of range: 1 or more")
    if sampling.HasField("temperature") and not 0 <= sampling.temperature <= _MAX_TEMPERATURE:
        raise invalid(f"{path}.temperature", f"{sampling.temperature:g} is out of range: 0 to {_MAX_TEMPERATURE:g}")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise invalid(f"{path}.top_p", f"{sampling.top_p:g} is out of range: above 0 and up to 1")
    if len(sampling.stop) > MAX_STOPS:
        raise invalid(f"{path}.stop", f"{len(sampling.stop)} entries are too many: up to {MAX_STOPS}")
    for index, stop in enumerate(sampling.stop):
        if not stop:
            raise invalid(f"{path}.stop[{index}]", "must not be empty")
        if (size := len(stop.encode())) > MAX_STOP_BYTES:
            raise invalid(f"{path}.stop[{index}]", f"{size} bytes are too many: up to {MAX_STOP_BYTES}")
    if sampling.logprobs > MAX_LOGPROBS:
        raise invalid(f"{path}.logprobs", f"{sampling.logprobs} is out of range: 0 to {MAX_LOGPROBS}")
    if sampling.response_format:
        _check_format(sampling.response_format, path=f"{path}.response_format")


def _check_format(response_format: str, *, path: str) -> None:
    if (size := len(response_format.encode())) > MAX_FORMAT_BYTES:
        raise invalid(path, f"{size} bytes are too many: up to {MAX_FORMAT_BYTES}")
    try:
        value = orjson.loads(response_format)
    except orjson.JSONDecodeError as exc:
        raise invalid(path, f"no JSON: {exc}") from exc
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise invalid(path, 'must be an object with a type, as in {"type": "json_object"}')


def check_hints(hints: generation_pb2.RoutingHints, *, path: str = "routing") -> None:
    """Raises: FixRequestError(INVALID_FIELD) naming the field under `path` and its range."""
    for name in ("overlap_credit", "prefill_scale", "request_weight", "temperature"):
        value = getattr(hints.cost, name)
        if not 0 <= value <= MAX_WEIGHT:
            raise invalid(f"{path}.cost.{name}", f"{value:g} is out of range: 0 to {MAX_WEIGHT:,.0f}")
    if len(hints.session_id.encode()) > MAX_CLIENT_ID_BYTES:
        raise invalid(f"{path}.session_id", f"at most {MAX_CLIENT_ID_BYTES} bytes")
    if hints.HasField("pinned_rank") and not hints.pinned_worker_id:
        raise invalid(f"{path}.pinned_rank", "names a rank of pinned_worker_id, which is not set")


def resolve_sampling(
    sampling: generation_pb2.SamplingParams, *, prompt_tokens: int, max_context_tokens: int
) -> generation_pb2.SamplingParams:
    """Return a copy with every default set; `max_tokens` is cut to what the context leaves.

    `max_context_tokens` 0 = no limit. Raises: FixRequestError(INVALID_FIELD) when the prompt leaves no room.
    """
    wanted = sampling.max_tokens if sampling.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    room = max_context_tokens - prompt_tokens if max_context_tokens else wanted
    if room < 1:
        raise invalid(
            "prompt", f"{prompt_tokens} tokens leave no room in a context of {max_context_tokens}: shorten it"
        )
    resolved = generation_pb2.SamplingParams(
        max_tokens=min(wanted, room),
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        stop=sampling.stop,
        ignore_eos=sampling.ignore_eos,
        response_format=sampling.response_format,
    )
    if sampling.HasField("seed"):
        resolved.seed = sampling.seed
    if sampling.HasField("logprobs"):
        resolved.logprobs = sampling.logprobs
    return resolved


def seconds(duration: duration_pb2.Duration, *, path: str, low: float = 0.0, high: float = 86_400.0) -> float:
    """Return a span in seconds. Raises: FixRequestError(INVALID_FIELD) when it is outside [low, high]."""
    value = duration.seconds + duration.nanos / 1e9
    if not low <= value <= high:
        raise invalid(path, f"{value:g} s is out of range: {low:g} to {high:g} s")
    return value


def duration(value_s: float) -> duration_pb2.Duration:
    """Return a span of seconds as the contract's Duration."""
    whole = int(value_s)
    return duration_pb2.Duration(seconds=whole, nanos=int((value_s - whole) * 1e9))
