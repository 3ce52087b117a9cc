"""An engine whose work is done elsewhere and comes back as streams, each followed on a thread with an event loop.

    the engine's thread   submit -> waiting -> (step) running -> step hands over what has arrived -> finish | error
    the streams' thread                        one task per running request; its pieces go into one queue

Laws: what is waiting has not been sent; at most `max_sequences` requests are sent at once; a request that goes takes
its task with it, and what the task still brings is dropped; a stream that ends without a finish has failed.

Where the other side tells of its prefix cache, this engine knows it as far as it was told: that is what a request is
said to have found there, until the other side itself says it. Such an engine always has work: events come at any time.
So has one whose other side is out of service, until it is back.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import takewhile

from kvmesh.core.errors import ConflictError, FixRequestError, MeshError, Reason
from kvmesh.core.hashing import max_overlap_blocks, text_tokens
from kvmesh.core.ids import AttemptKey, SequenceHash
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent
from kvmesh.engines.engine import (
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Output,
    PromptForm,
    StepResult,
)
from kvmesh.engines.stream_thread import Piece, Streams, StreamThread
from kvmesh.engines.without_pool import WithoutPool

_STEP_WAIT_S = 0.005
"""How long a step waits for something to arrive: so long may a command that comes meanwhile have to wait."""
_IDLE_WAIT_S = 0.02
"""The same where no request runs, and only events may come."""


@dataclass(slots=True, eq=False)
class _Request:
    request: EngineRequest
    prompt_tokens: int
    """As counted here."""
    cached_tokens: int = 0
    """Of the prompt, in the other side's cache when it was sent, as far as events tell."""
    task: "Future[None] | None" = None
    has_output: bool = False


class StreamedEngine(WithoutPool):
    """An `Engine` without a KV pool of its own. Not thread-safe, as the port has it."""

    def __init__(
        self, info: EngineInfo, streams: Streams, *, open_s: float = 10.0, has_events: bool = False, where: str = ""
    ) -> None:
        """Own `streams` from now on and open them, within `open_s`; `has_events`: they publish KV events.

        `where` names the other side to the operator. Raises: MeshError.
        """
        self._info = info
        self._where = where
        self._streams = streams
        self._has_events = has_events
        self._waiting: dict[AttemptKey, _Request] = {}
        self._running: dict[AttemptKey, _Request] = {}
        super().__init__()
        self._cached: set[SequenceHash] = set()
        """What the other side's cache holds, by the events drained so far."""
        self._thread: StreamThread[_Request] = StreamThread(streams, name=info.name, open_s=open_s)

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    def submit(self, request: EngineRequest) -> None:
        """Take a request in; a text prompt counts its UTF-8 bytes as tokens."""
        prompt_tokens = self._check(request)
        if request.key in self._waiting or request.key in self._running:
            raise ConflictError(Reason.ALREADY_EXISTS, f"{request.key}: here already")
        self._waiting[request.key] = _Request(request, prompt_tokens)

    def cancel(self, key: AttemptKey) -> bool:
        """Drop a request, and end what is done for it elsewhere."""
        if self._waiting.pop(key, None) is not None:
            return True
        running = self._running.pop(key, None)
        if running is None:
            return False
        assert running.task is not None
        running.task.cancel()
        return True

    def has_work(self) -> bool:
        """Tell whether any request is here, KV events may come, or the other side may come back."""
        return self._has_events or bool(self._waiting or self._running or self.load().out_of_service)

    def step(self) -> StepResult:
        """Hand over what has arrived, waiting a moment if nothing has, and send what there is room for."""
        if not self.has_work():
            return StepResult()
        can_send = bool(self._waiting) and len(self._running) < self._info.max_sequences
        wait_s = 0.0 if can_send else _STEP_WAIT_S if self._running else _IDLE_WAIT_S
        outputs = self._outputs(self._thread.take(wait_s=wait_s))
        kv_events = self.drain_kv_events()
        self._send_waiting()
        return StepResult(outputs=tuple(outputs), kv_events=kv_events)

    def drain_kv_events(self) -> tuple[KvEvent, ...]:
        """Return and forget what the other side's cache has told."""
        events = self._thread.take_kv_events()
        for event in events:
            match event:
                case BlocksStored():
                    self._cached.update(event.block_hashes)
                case BlocksRemoved():
                    self._cached.difference_update(event.block_hashes)
                case CacheCleared():
                    self._cached.clear()
        return events

    def load(self) -> EngineLoad:
        """Return the current figures."""
        return self._streams.figures(
            EngineLoad(
                active_requests=len(self._running),
                max_requests=self._info.max_sequences,
                waiting_requests=len(self._waiting),
                total_blocks=self._info.total_blocks,
            )
        )

    def cached_blocks(self, block_hashes: Sequence[SequenceHash]) -> int:
        """Count the leading blocks that the other side has told of; none of them can be handed over."""
        return sum(1 for _ in takewhile(self._cached.__contains__, block_hashes))

    def close(self) -> None:
        """End every stream and the thread that follows them. Idempotent."""
        for key in (*self._waiting, *self._running):
            self.cancel(key)
        self._thread.close()

    def _check(self, request: EngineRequest) -> int:
        """Return the prompt's tokens. Raises: FixRequestError."""
        field, wrong = ("text", "token_ids") if PromptForm.TEXT in self._info.accepts else ("token_ids", "text")
        if getattr(request, wrong) is not None or getattr(request, field) is None:
            raise FixRequestError(Reason.INVALID_FIELD, f"{wrong}: this engine reads {field}", field=wrong)
        prompt_tokens = (
            len(request.token_ids) if request.token_ids is not None else len(text_tokens(request.text or ""))
        )
        if not prompt_tokens:
            raise FixRequestError(Reason.EMPTY_PROMPT, f"{field}: is empty", field=field)
        if request.sampling.max_tokens < 1:
            raise FixRequestError(Reason.INVALID_FIELD, "sampling.max_tokens: below 1", field="sampling.max_tokens")
        if self._info.max_context_tokens and prompt_tokens >= self._info.max_context_tokens:
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"{field}: {prompt_tokens} tokens leave no room in a context of {self._info.max_context_tokens}",
                field=field,
            )
        return prompt_tokens

    def _send_waiting(self) -> None:
        while self._waiting and len(self._running) < self._info.max_sequences:
            key = next(iter(self._waiting))
            request = self._running[key] = self._waiting.pop(key)
            full = request.request.block_hashes[: max_overlap_blocks(request.prompt_tokens, self._info.block_size)]
            request.cached_tokens = self.cached_blocks(full) * self._info.block_size
            request.task = self._thread.follow(request.request, under=request)

    def _outputs(self, arrived: Iterable[tuple[_Request, Piece | MeshError]]) -> list[Output]:
        outputs: dict[AttemptKey, Output] = {}
        for running, news in arrived:
            key = running.request.key
            if self._running.get(key) is not running:
                continue  # cancelled, or its key is another's by now
            if isinstance(news, MeshError) and key in outputs:
                self._thread.bring(running, news)  # what was said before is handed over first
                continue
            so_far = outputs.get(key) or Output(key)
            outputs[key] = self._failed(key, news) if isinstance(news, MeshError) else _joined(so_far, news, running)
            if outputs[key].finish is not None or outputs[key].error is not None:
                del self._running[key]
        return list(outputs.values())

    def _failed(self, key: AttemptKey, error: MeshError) -> Output:
        """Return the end of a request; the operator reads where it failed, whether or not strangers may."""
        where = f" ({self._where})" if self._where and self._where not in error.message else ""
        return Output(key, error=f"{error.reason.value}: {error.message}{where}", failure=error)


def _joined(so_far: Output, piece: Piece, running: _Request) -> Output:
    """Return the output with one more piece; the prompt is computed once something comes of it."""
    is_first = not running.has_output and bool(piece.words or piece.token_ids or piece.finish)
    running.has_output |= is_first
    output = so_far._replace(
        words=so_far.words + piece.words,
        token_ids=so_far.token_ids + piece.token_ids,
        prefill_done=so_far.prefill_done or is_first,
        finish=piece.finish,
        handoff=piece.handoff,
    )
    if is_first:
        output = output._replace(prompt_tokens=running.prompt_tokens, cached_tokens=running.cached_tokens)
    if piece.usage is None:
        return output
    cached_tokens = running.cached_tokens if piece.usage.cached_tokens is None else piece.usage.cached_tokens
    return output._replace(
        prompt_tokens=piece.usage.prompt_tokens,
        cached_tokens=cached_tokens,
        completion_tokens=piece.usage.completion_tokens,
    )
