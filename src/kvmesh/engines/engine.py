"""The port behind which every engine stands.

An engine is synchronous and single-threaded. Its worker owns ONE thread for it and makes every call on that thread,
so an engine needs no locks and its steps never run on the event loop:

    submit / cancel  ->  step  ->  submit / cancel  ->  step ...        (one turn = the pending commands, then one step)

Who owns which blocks:
    - blocks of a running request belong to the engine until the request finishes; its full blocks then stay as
      prefix cache until evicted, leaf first;
    - a `Pin` belongs to whoever asked for it and is given back by `unpin`, exactly once;
    - an `Import` belongs to whoever began it, is invisible to prefix matching, and ends in `commit_import` (its blocks
      become prefix cache, pinned by the returned pin) or `abort_import` (its blocks are free again).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvmesh.core.block_claims import Import, Pin
from kvmesh.core.errors import MeshError
from kvmesh.core.ids import AttemptKey, SequenceHash
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent

__all__ = [
    "BlocksRemoved",
    "BlocksStored",
    "CacheCleared",
    "Engine",
    "EngineHandoff",
    "EngineInfo",
    "EngineLoad",
    "EngineRequest",
    "FinishReason",
    "Import",
    "KvEvent",
    "KvLayout",
    "Output",
    "Pin",
    "PoolStats",
    "PromptForm",
    "Sampling",
    "StepResult",
    "TokenLogprobs",
]


class PromptForm(Enum):
    """What form of prompt an engine reads; it is advertised in the worker's record."""

    TEXT = "text"
    TOKENS = "tokens"


class FinishReason(Enum):
    """Why a request ended well."""

    STOP = "stop"
    """The engine ended it, or a stop string matched."""
    LENGTH = "length"
    """max_tokens, or the context, is used up."""
    PREFILLED = "prefilled"
    """A prefill-only request: its full prompt blocks are computed and pinned."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of the KV cache. Two workers may exchange blocks only if their layouts are equal."""

    dtype: str
    layers: int
    block_size: int
    """Tokens in a block."""
    kv_heads: int
    head_dim: int
    order: str
    """Order of the axes within a block, e.g. `layer,kv,token,head,dim`."""
    model_fingerprint: str
    bytes_per_block: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is; fixed for its life."""

    name: str
    accepts: frozenset[PromptForm]
    block_size: int
    total_blocks: int
    """Blocks in its KV pool; 0 when it keeps no KV cache."""
    max_sequences: int
    """Requests it runs at once; further ones wait inside it."""
    max_context_tokens: int
    vocab_size: int
    """0 when it is a TEXT engine."""
    layout: KvLayout | None
    """None when it has no KV to hand over: its prefill hand-offs then carry no blocks."""
    eos_token_ids: tuple[int, ...] = ()
    is_brief: bool = False
    """No call takes longer than a hop to a thread and back would (about 0.1 ms): it is called on the event loop."""
    has_logprobs: bool = False
    """It serves `Sampling.logprobs`."""
    keeps_formats: bool = False
    """It serves `Sampling.response_format`."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters with every default resolved (by the processor, once)."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 = off."""
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the likeliest tokens are told with each output token's own log probability; None = nothing is.
    Never set for an engine without `EngineInfo.has_logprobs`."""
    response_format: str = ""
    """JSON, the OpenAI API's `response_format`; "" = any. Never set for an engine without `keeps_formats`."""


class TokenLogprobs(NamedTuple):
    """How likely one output token was by the model's own distribution, before temperature, top_k and top_p."""

    logprob: float
    """Natural logarithm of the token's probability."""
    top_token_ids: tuple[int, ...] = ()
    """The likeliest tokens in its place, likeliest first; as many as `Sampling.logprobs` asked for."""
    top_logprobs: tuple[float, ...] = ()
    """Theirs."""


@dataclass(frozen=True, slots=True)
class EngineHandoff:
    """A finished prefill of an engine that moves its own KV: another instance goes on from it."""

    state: bytes
    """Opaque to the mesh; `engine_state` of a KvHandoff."""
    first_tokens: tuple[int, ...]
    """What the prefill sampled."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as an engine sees it. Exactly one of `text` and `token_ids` is set."""

    key: AttemptKey
    sampling: Sampling
    text: str | None = None
    token_ids: npt.NDArray[np.uint32] | None = None
    """Shape (prompt_tokens,)."""
    block_hashes: tuple[SequenceHash, ...] = ()
    """Sequence hashes of the prompt's full blocks; () for TEXT."""
    local_hashes: tuple[int, ...] = ()
    """Local hashes of the same blocks; () for TEXT."""
    prefill_only: bool = False
    """Compute and pin the blocks [0, (prompt_tokens - 1) // block_size), sample nothing."""
    lora: str | None = None
    """With `cache_namespace`: part of the identity of the blocks that generated tokens fill."""
    cache_namespace: str | None = None
    handoff: EngineHandoff | None = None
    """What another instance has computed of the prompt, all of it; only engines whose outputs have one read it."""
    imported_tokens: int = 0
    """Prompt tokens whose blocks were imported for this very request: found in the cache, and yet no cache hits."""


class Output(NamedTuple):
    """What one step produced for one request, tokens or words in order.

    A tuple and no dataclass: one is made per running request and step, and a frozen dataclass takes four times as long.
    """

    key: AttemptKey
    token_ids: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    """TEXT engines: one entry per produced word, with its white space."""
    prefill_done: bool = False
    """True in the step in which the prompt's last uncached token was computed."""
    cached_tokens: int = 0
    """With `prompt_tokens`: those that came from the prefix cache, not counting what was imported for it."""
    prompt_tokens: int = 0
    """With `prefill_done`; and again with `finish`, of an engine that learns the true count only then."""
    finish: FinishReason | None = None
    pin: Pin | None = None
    """With PREFILLED: owned by the receiver."""
    error: str | None = None
    """The request failed inside the engine; nothing follows. For the operator's log."""
    failure: MeshError | None = None
    """With `error`, where the engine knows what the caller should do; None: INTERNAL."""
    completion_tokens: int = 0
    """With `finish`, of an engine whose words are no tokens: how many it produced; 0 = it does not say."""
    handoff: EngineHandoff | None = None
    """With PREFILLED, of an engine that moves its own KV: what a decode engine goes on from."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """With `Sampling.logprobs`: one for each of `token_ids`."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The engine's own seven figures (the ones a KV metrics publisher reports), and whether it takes requests."""

    active_requests: int = 0
    """Running, not counting waiting ones."""
    max_requests: int = 0
    active_blocks: int = 0
    """Blocks held by running requests, pins and imports; cached-only blocks do not count."""
    total_blocks: int = 0
    waiting_requests: int = 0
    cache_usage: float = 0.0
    """active_blocks / total_blocks, 0..1; 0 without a pool."""
    prefix_hit_rate: float = 0.0
    """Cached prompt tokens over prompt tokens since the start, 0..1."""
    out_of_service: str = ""
    """Why it takes nothing now, for the operator's log; empty while it does. Such an engine has work: it may be back
    at any time, and only a step tells."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did."""

    outputs: tuple[Output, ...] = ()
    duration_s: float = 0.0
    """Modelled time the worker still has to let pass before it hands these outputs on; 0 for engines that compute."""
    kv_events: tuple[KvEvent, ...] = ()
    preempted: int = 0
    """Requests put back to waiting in this step because the pool was full."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts that must return to their baseline when nothing runs: the leak check."""

    used_blocks: int
    pinned_blocks: int
    pins: int
    imports: int
    cached_blocks: int = field(default=0)


@runtime_checkable
class Engine(Protocol):
    """What a worker drives. Every method is called on the engine's one thread, never on the event loop."""

    @property
    def info(self) -> EngineInfo:
        """What this engine is; constant, and safe to read on any thread."""

    def submit(self, request: EngineRequest) -> None:
        """Take a request in.

        Raises:
            FixRequestError: EMPTY_PROMPT, or INVALID_FIELD naming the field, if it can never run here.
            ConflictError: ALREADY_EXISTS if its key is here.
        """

    def cancel(self, key: AttemptKey) -> bool:
        """Drop a request and free its blocks; False if it is not here (already finished). Idempotent."""

    def has_work(self) -> bool:
        """Tell whether a step would do anything: False too while all that waits has to wait for an unpin."""

    def step(self) -> StepResult:
        """Run one batch step. `outputs` holds at most one entry per request."""

    def drain_kv_events(self) -> tuple[KvEvent, ...]:
        """Return and forget the KV events since the last step or drain: those of submit, cancel, pins and imports."""

    def load(self) -> EngineLoad:
        """Return the current figures; O(1)."""

    def cached_blocks(self, block_hashes: Sequence[SequenceHash]) -> int:
        """Count the leading blocks of this sequence that are in the prefix cache."""

    def pin_prefix(self, block_hashes: Sequence[SequenceHash]) -> Pin:
        """Pin the longest cached prefix of this sequence; an empty pin is valid and must be unpinned too."""

    def unpin(self, pin_id: int) -> None:
        """Give a pin back. Raises: NotKnownError if it is not held."""

    def begin_import(self, block_hashes: Sequence[SequenceHash], *, first_block: int) -> Import:
        """Allocate room for blocks `first_block` and on of this sequence.

        `block_hashes` are those of the whole sequence from block 0, as in `commit_import`.

        Raises:
            FixRequestError: INVALID_FIELD `first_block` if it lies outside of the sequence.
            BackOffError: OVERLOADED if the pool is full.
        """

    def commit_import(
        self, import_id: int, *, block_hashes: Sequence[SequenceHash], local_hashes: Sequence[int]
    ) -> Pin:
        """Make imported blocks prefix cache and pin the whole sequence [0, len(block_hashes)).

        `block_hashes` and `local_hashes` are those of the whole sequence from block 0. Blocks before `first_block` must
        still be cached (the caller holds their pin). Emits BlocksStored.

        Raises:
            NotKnownError: NOT_FOUND if it is not open.
            TryElsewhereError: KV_TRANSFER_FAILED if what arrived is not what was asked for, where the engine can tell;
                the import is aborted then.
        """

    def abort_import(self, import_id: int) -> None:
        """Free an import's blocks. Raises: NotKnownError if it is not open."""

    def kv_memory(self) -> npt.NDArray[np.uint8] | None:
        """Return the pool as bytes, shape (total_blocks, bytes_per_block), shared and not copied; None without KV."""

    def pool_stats(self) -> PoolStats:
        """Return the counts for the leak check."""

    def close(self) -> None:
        """Free everything; nothing is called afterwards."""
