"""An engine with a paged KV cache: the port of `engine.py` over a block pool, a batch and a model."""

from collections.abc import Sequence
from typing import Generic

import numpy as np
import numpy.typing as npt

from kvmesh.core.block_claims import BlockClaims, Import, Pin
from kvmesh.core.block_pool import BlockPool
from kvmesh.core.errors import ConflictError, FixRequestError, Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey, SequenceHash
from kvmesh.core.kv_events import KvEvent
from kvmesh.engines.engine import EngineInfo, EngineLoad, EngineRequest, PoolStats, PromptForm, StepResult
from kvmesh.engines.paged_batch import SPARE_SHARE, PagedBatch
from kvmesh.engines.paged_model import PagedModel, PagedOptions, R


class PagedEngine(Generic[R]):
    """Everything of an engine but its model; see the port for what each method owes."""

    def __init__(
        self,
        name: str,
        options: PagedOptions,
        *,
        model: PagedModel[R],
        is_brief: bool = False,
        has_logprobs: bool = False,
    ) -> None:
        """Start with an empty cache over the memory of `model`; `is_brief` and `has_logprobs` as in `EngineInfo`."""
        self._model = model
        self._pool = BlockPool(options.total_blocks)
        self._claims = BlockClaims(self._pool, reserved_blocks=max(options.total_blocks // SPARE_SHARE, 1))
        self._batch = PagedBatch(options, pool=self._pool, model=model, pin_prefix=self._claims.pin_prefix)
        self._info = EngineInfo(
            name=name,
            accepts=frozenset({PromptForm.TOKENS}),
            block_size=options.block_size,
            total_blocks=options.total_blocks,
            max_sequences=self._batch.max_sequences,
            max_context_tokens=self._batch.max_context_tokens,
            vocab_size=model.vocab_size,
            layout=model.layout,
            eos_token_ids=model.eos_token_ids,
            is_brief=is_brief,
            has_logprobs=has_logprobs,
        )

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    def submit(self, request: EngineRequest) -> None:
        """Take a request in."""
        self._check(request)
        if request.key in self._batch:
            raise ConflictError(Reason.ALREADY_EXISTS, f"{request.key}: here already")
        self._batch.add(request)

    def cancel(self, key: AttemptKey) -> bool:
        """Drop a request; what it computed in full blocks stays cached."""
        return self._batch.remove(key)

    def has_work(self) -> bool:
        """Tell whether a step would do anything."""
        return self._batch.has_work()

    def step(self) -> StepResult:
        """Run one batch step."""
        return self._batch.step()

    def drain_kv_events(self) -> tuple[KvEvent, ...]:
        """Return and forget the KV events since the last step or drain."""
        return self._pool.drain_events()

    def load(self) -> EngineLoad:
        """Return the current figures."""
        batch, active, total = self._batch, self._pool.active_blocks, self._pool.total_blocks
        return EngineLoad(
            active_requests=batch.running,
            max_requests=batch.max_sequences,
            active_blocks=active,
            total_blocks=total,
            waiting_requests=batch.waiting,
            cache_usage=active / total,
            prefix_hit_rate=batch.cached_tokens / batch.prompt_tokens if batch.prompt_tokens else 0.0,
        )

    def cached_blocks(self, block_hashes: Sequence[SequenceHash]) -> int:
        """Count the leading blocks that are cached."""
        return self._pool.cached_prefix(block_hashes)

    def pin_prefix(self, block_hashes: Sequence[SequenceHash]) -> Pin:
        """Pin the longest cached prefix."""
        return self._claims.pin_prefix(block_hashes)

    def unpin(self, pin_id: int) -> None:
        """Give a pin back."""
        self._claims.unpin(pin_id)

    def begin_import(self, block_hashes: Sequence[SequenceHash], *, first_block: int) -> Import:
        """Allocate room for blocks from elsewhere, blank, so that old content cannot pass for what should arrive."""
        opened = self._claims.begin_import(block_hashes, first_block=first_block)
        self._model.blank(opened.block_ids)
        return opened

    def commit_import(
        self, import_id: int, *, block_hashes: Sequence[SequenceHash], local_hashes: Sequence[int]
    ) -> Pin:
        """Make imported blocks prefix cache, unless one of them is found not to be what was asked for."""
        opened = self._claims.open_import(import_id)
        wrong = self._model.find_wrong(opened.block_ids, opened.block_hashes)
        if wrong:
            self._claims.abort_import(import_id)
            raise TryElsewhereError(
                Reason.KV_TRANSFER_FAILED,
                f"{len(wrong)} of {len(opened.block_ids)} imported blocks hold other bytes than theirs, "
                f"first {wrong[0]}",
            )
        return self._claims.commit_import(import_id, block_hashes, local_hashes=local_hashes)

    def abort_import(self, import_id: int) -> None:
        """Free an import's blocks."""
        self._claims.abort_import(import_id)

    def kv_memory(self) -> npt.NDArray[np.uint8] | None:
        """Return the pool as bytes, shape (total_blocks, bytes_per_block)."""
        return self._model.memory

    def pool_stats(self) -> PoolStats:
        """Return the counts for the leak check."""
        return PoolStats(
            used_blocks=self._pool.active_blocks,
            pinned_blocks=self._claims.pinned_blocks,
            pins=self._claims.pins,
            imports=self._claims.imports,
            cached_blocks=self._pool.cached_blocks,
        )

    def clear_cache(self) -> None:
        """Forget every cached block that nobody holds, as after a change of weights."""
        self._pool.clear()

    def check_integrity(self) -> None:
        """Assert the laws of the pool and of its claims; O(total_blocks), for tests and idle moments."""
        self._claims.check_integrity()

    def close(self) -> None:
        """Drop every request."""
        self._batch.clear()

    def _check(self, request: EngineRequest) -> None:
        tokens = request.token_ids
        if tokens is None:
            raise _invalid("text", "this engine accepts TOKENS")
        if not len(tokens):
            raise FixRequestError(Reason.EMPTY_PROMPT, "token_ids: is empty", field="token_ids")
        if (highest := int(tokens.max())) >= self._info.vocab_size:
            raise _invalid("token_ids", f"{highest} is not in 0..{self._info.vocab_size - 1}")
        if len(tokens) >= self._info.max_context_tokens:
            raise _invalid(
                "token_ids", f"{len(tokens)} leave no room in a context of {self._info.max_context_tokens} tokens"
            )
        if request.sampling.max_tokens < 1:
            raise _invalid("sampling.max_tokens", f"{request.sampling.max_tokens} is below 1")
        full_blocks = len(tokens) // self._info.block_size
        for name, hashes in (("block_hashes", request.block_hashes), ("local_hashes", request.local_hashes)):
            if len(hashes) != full_blocks:
                raise _invalid(name, f"{len(hashes)} given, and the prompt has {full_blocks} full blocks")


def _invalid(name: str, why: str) -> FixRequestError:
    return FixRequestError(Reason.INVALID_FIELD, f"{name}: {why}", field=name)
