"""Local or remote prefill: remote exactly if enough of a long enough prompt is uncached and the queue can take it.

remote  <=>  min_uncached_tokens > 0
         and prompt_tokens >= min_prompt_tokens
         and prompt_tokens - cached_tokens >= min_uncached_tokens
         and capable_workers > 0
         and queue_depth <= max_queue_depth
"""

from dataclasses import dataclass
from enum import Enum

from kvmesh.core.errors import FixRequestError, Reason


class RemotePrefillReason(Enum):
    """Why a prefill runs where it runs; the value is the text for people."""

    REMOTE = "enough of the prompt is uncached"
    SWITCHED_OFF = "remote prefill is switched off"
    SHORT_PROMPT = "the prompt is shorter than the minimum"
    FEW_UNCACHED_TOKENS = "too little of the prompt is uncached"
    NO_CAPABLE_WORKER = "no capable prefill worker is alive"
    DEEP_QUEUE = "the prefill queue is deeper than the limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePrefillRules:
    """When a prefill goes remote."""

    min_uncached_tokens: int = 256
    """Remote from this many uncached prompt tokens on; 0 = never remote."""
    min_prompt_tokens: int | None = None
    """Prompts shorter than this stay local whatever is cached; None or 0 = no minimum."""
    max_queue_depth: int | None = None
    """Local while more tasks than this are queued; None = no limit."""

    def __post_init__(self) -> None:
        for name in ("min_uncached_tokens", "min_prompt_tokens", "max_queue_depth"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise FixRequestError(Reason.INVALID_FIELD, f"{name} is {value}, below 0", field=name)


@dataclass(frozen=True, slots=True)
class RemotePrefillDecision:
    """Where a prefill runs, and why."""

    reason: RemotePrefillReason

    @property
    def is_remote(self) -> bool:
        """True if a prefill worker shall do it."""
        return self.reason is RemotePrefillReason.REMOTE

    @property
    def text(self) -> str:
        """The reason for people."""
        return self.reason.value


def decide(
    rules: RemotePrefillRules, *, prompt_tokens: int, cached_tokens: int, queue_depth: int, capable_workers: int
) -> RemotePrefillDecision:
    """Decide where the prefill of a prompt runs; the first rule that keeps it local is the reason given."""
    return RemotePrefillDecision(
        _reason(
            rules,
            prompt_tokens=prompt_tokens,
            uncached_tokens=max(prompt_tokens - cached_tokens, 0),
            queue_depth=queue_depth,
            capable_workers=capable_workers,
        )
    )


def _reason(
    rules: RemotePrefillRules, *, prompt_tokens: int, uncached_tokens: int, queue_depth: int, capable_workers: int
) -> RemotePrefillReason:
    if rules.min_uncached_tokens == 0:
        return RemotePrefillReason.SWITCHED_OFF
    if prompt_tokens < (rules.min_prompt_tokens or 0):
        return RemotePrefillReason.SHORT_PROMPT
    if uncached_tokens < rules.min_uncached_tokens:
        return RemotePrefillReason.FEW_UNCACHED_TOKENS
    if capable_workers < 1:
        return RemotePrefillReason.NO_CAPABLE_WORKER
    if rules.max_queue_depth is not None and queue_depth > rules.max_queue_depth:
        return RemotePrefillReason.DEEP_QUEUE
    return RemotePrefillReason.REMOTE
