"""The echo engine: the prompt comes back with the name of the node that answered, word by word. No model, no KV."""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmesh.core.errors import ConflictError, FixRequestError, Reason
from kvmesh.core.hashing import text_tokens
from kvmesh.core.ids import AttemptKey, SequenceHash
from kvmesh.core.kv_events import KvEvent
from kvmesh.engines.engine import (
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    Output,
    PromptForm,
    StepResult,
)
from kvmesh.engines.options import check_ranges, number, parse_options
from kvmesh.engines.without_pool import WithoutPool

_WORD = re.compile(r"\s*\S+\s*")


@dataclass(frozen=True, slots=True)
class EchoOptions:
    """What an echo engine can be told. Raises: FixRequestError(INVALID_FIELD), naming the option and its range."""

    max_sequences: int = number(256, 1, 65_536)
    """Requests that run at once."""
    max_context_tokens: int = number(1_048_576, 2, 2**31)
    """Bytes of the prompt and words of the output together."""
    block_size: int = number(16, 1, 65_536)
    """Bytes of prompt in what routers count as a block; no KV stands behind it."""
    step_s: float = number(0.0, 0.0, 60.0)
    """Seconds that a step, one word of every request, pretends to take."""

    def __post_init__(self) -> None:
        """Check every range."""
        check_ranges(self)


def parse(options: Mapping[str, str]) -> EchoOptions:
    """Read options from text. Raises: FixRequestError(INVALID_FIELD) as `parse_options`."""
    return parse_options(EchoOptions, options, engine="echo")


@dataclass(slots=True)
class _Request:
    key: AttemptKey
    words: list[str]
    """Up to max_tokens of them; empty for a prefill-only request."""
    finish: FinishReason
    prompt_tokens: int
    produced: int = 0


class EchoEngine(WithoutPool):
    """Answers `<prompt>_GeneratedBy_<node name>`, one word with its white space per step and request."""

    def __init__(self, *, node_name: str, options: EchoOptions | None = None) -> None:
        """Answer in the name of `node_name`."""
        self._options = options or EchoOptions()
        self._suffix = f"_GeneratedBy_{node_name}"
        self._info = EngineInfo(
            name="echo",
            accepts=frozenset({PromptForm.TEXT}),
            block_size=self._options.block_size,
            total_blocks=0,
            max_sequences=self._options.max_sequences,
            max_context_tokens=self._options.max_context_tokens,
            vocab_size=0,
            layout=None,
            is_brief=True,
        )
        self._requests: dict[AttemptKey, _Request] = {}
        self._running: list[_Request] = []
        self._waiting: deque[_Request] = deque()
        super().__init__()

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    def submit(self, request: EngineRequest) -> None:
        """Take a request in; a prompt counts its UTF-8 bytes as tokens."""
        if request.text is None:
            raise FixRequestError(Reason.INVALID_FIELD, "token_ids: this engine accepts TEXT", field="token_ids")
        if not request.text:
            raise FixRequestError(Reason.EMPTY_PROMPT, "text: is empty", field="text")
        if request.sampling.max_tokens < 1:
            raise FixRequestError(Reason.INVALID_FIELD, "sampling.max_tokens: below 1", field="sampling.max_tokens")
        prompt_tokens = len(text_tokens(request.text))
        room = self._options.max_context_tokens - prompt_tokens
        if room < 1:
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"text: {prompt_tokens} bytes leave no room in a context of {self._options.max_context_tokens}",
                field="text",
            )
        if request.key in self._requests:
            raise ConflictError(Reason.ALREADY_EXISTS, f"{request.key}: here already")
        words, finish = self._answer(request, limit=min(request.sampling.max_tokens, room))
        taken = self._requests[request.key] = _Request(request.key, words, finish, prompt_tokens)
        self._waiting.append(taken)

    def cancel(self, key: AttemptKey) -> bool:
        """Drop a request."""
        request = self._requests.pop(key, None)
        if request is None:
            return False
        (self._waiting if request in self._waiting else self._running).remove(request)
        return True

    def has_work(self) -> bool:
        """Tell whether any request is here."""
        return bool(self._requests)

    def step(self) -> StepResult:
        """Produce the next word of every running request."""
        while self._waiting and len(self._running) < self._options.max_sequences:
            self._running.append(self._waiting.popleft())
        if not self._running:
            return StepResult()
        outputs = tuple(self._next(request) for request in self._running)
        self._running = [request for request in self._running if request.key in self._requests]
        return StepResult(outputs=outputs, duration_s=self._options.step_s)

    def drain_kv_events(self) -> tuple[KvEvent, ...]:
        """Return (): it has no KV."""
        return ()

    def load(self) -> EngineLoad:
        """Return the current figures."""
        return EngineLoad(
            active_requests=len(self._running),
            max_requests=self._options.max_sequences,
            waiting_requests=len(self._waiting),
        )

    def cached_blocks(self, block_hashes: Sequence[SequenceHash]) -> int:
        """Return 0."""
        return 0

    def close(self) -> None:
        """Forget every request."""
        self._requests.clear()
        self._running.clear()
        self._waiting.clear()

    def _answer(self, request: EngineRequest, *, limit: int) -> tuple[list[str], FinishReason]:
        if request.prefill_only:
            return [], FinishReason.PREFILLED
        words = _WORD.findall(f"{request.text}{self._suffix}")
        return words[:limit], FinishReason.STOP if len(words) <= limit else FinishReason.LENGTH

    def _next(self, request: _Request) -> Output:
        is_first = request.produced == 0
        words = tuple(request.words[request.produced : request.produced + 1])
        request.produced += 1
        is_last = request.produced >= len(request.words)
        if is_last:
            del self._requests[request.key]
        return Output(
            request.key,
            words=words,
            prefill_done=is_first,
            prompt_tokens=request.prompt_tokens if is_first else 0,
            finish=request.finish if is_last else None,
        )
