"""Continuous batching over one block pool: who runs in the next step, and what it computes.

A step, in this order:
    1. grow     every decoding request whose block is full gets another; when none is left the youngest is preempted
    2. decode   one token of every decoding request
    3. prefill  chunks of admitted prompts, oldest first, within the rest of `max_batched_tokens`
    4. admit    waiting requests in order of arrival, while a slot, budget and all blocks of the prompt can be had

Laws:
    - a request holds the blocks of its whole prompt from its admission on: only decoding can find the pool full;
    - the oldest running request is the last to be preempted, and none needs more than the pool: it gets to its end;
    - nobody overtakes the first in line, except when nothing runs and the first in line has to wait for an unpin.
"""

from collections import deque
from collections.abc import Callable
from typing import Generic

from kvmesh.core.block_claims import Pin
from kvmesh.core.block_pool import BlockPool
from kvmesh.core.ids import AttemptKey, SequenceHash
from kvmesh.engines.engine import EngineRequest, FinishReason, Output, StepResult
from kvmesh.engines.paged_model import PagedModel, PagedOptions, R

SPARE_SHARE = 100
"""One block in so many is left to those that run when another request is admitted, so that they have room to grow."""


class PagedBatch(Generic[R]):
    """Every request of one engine; it holds their blocks and gives them back."""

    def __init__(
        self,
        options: PagedOptions,
        *,
        pool: BlockPool,
        model: PagedModel[R],
        pin_prefix: Callable[[tuple[SequenceHash, ...]], Pin],
    ) -> None:
        """Run `model` on the blocks of `pool`."""
        self.max_sequences = min(options.max_sequences, options.max_batched_tokens)
        self.max_context_tokens = min(
            options.max_context_tokens, model.max_context_tokens, options.total_blocks * options.block_size
        )
        self.prompt_tokens = 0
        """Of all requests admitted so far."""
        self.cached_tokens = 0
        """Of those, what their caches held: what was imported for the request itself is no hit."""
        self._options = options
        self._pool = pool
        self._model = model
        self._pin_prefix = pin_prefix
        self._requests: dict[AttemptKey, R] = {}
        self._waiting: deque[R] = deque()
        self._prefilling: list[R] = []
        self._decoding: list[R] = []
        self._decode_blocks = 0
        """Blocks of the decoding requests, a shared one counted once for each."""
        self._arrivals = 0

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._requests

    @property
    def running(self) -> int:
        """Requests that are prefilling or decoding."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Requests not admitted yet, or preempted."""
        return len(self._waiting)

    def add(self, request: EngineRequest) -> None:
        """Take in a request whose key is not here."""
        assert request.token_ids is not None
        limit = min(request.sampling.max_tokens, self.max_context_tokens - len(request.token_ids))
        self._arrivals += 1
        added = self._model.open(request, limit=limit, arrival=self._arrivals)
        self._requests[request.key] = added
        self._waiting.append(added)

    def remove(self, key: AttemptKey) -> bool:
        """Drop a request, whatever it is doing, and give its blocks back; False if it is not here."""
        request = self._requests.pop(key, None)
        if request is None:
            return False
        if request in self._decoding:
            self._stop_decoding(request)
        elif request in self._prefilling:
            self._prefilling.remove(request)
        else:
            self._waiting.remove(request)
        self._pool.give_back(request.blocks)
        return True

    def clear(self) -> None:
        """Drop every request."""
        for key in tuple(self._requests):
            self.remove(key)

    def has_work(self) -> bool:
        """Tell whether a step would do anything."""
        return bool(self._decoding or self._prefilling) or self._next_admissible() is not None

    def step(self) -> StepResult:
        """Run one step."""
        preempted = self._grow()
        decode_sequences, decode_blocks = len(self._decoding), self._decode_blocks
        outputs = self._decode()
        budget = self._options.max_batched_tokens - decode_sequences
        left = self._admit(self._prefill(budget, outputs), outputs)
        duration_s = self._model.step_s(
            decode_sequences=decode_sequences, decode_blocks=decode_blocks, prefill_tokens=budget - left
        )
        return StepResult(tuple(outputs), duration_s, self._pool.drain_events(), preempted)

    def _grow(self) -> int:
        """Give a block to every decoding request that begins one; return how many were preempted for it."""
        preempted = 0
        size = self._options.block_size
        for request in [request for request in self._decoding if not request.quiet]:
            if (request.prompt_tokens + request.produced - 1) % size or not request.blocks:
                continue  # within a block, or just preempted
            while (taken := self._pool.allocate(1)) is None:
                victim = max(self._decoding + self._prefilling, key=lambda running: running.arrival)
                self._preempt(victim)
                preempted += 1
                if victim is request:
                    break
            else:
                request.blocks += taken
                self._decode_blocks += 1
        return preempted

    def _preempt(self, request: R) -> None:
        if request in self._decoding:
            self._stop_decoding(request)
        else:
            self._prefilling.remove(request)
        self._pool.give_back(request.blocks)
        request.blocks = []
        request.sealed = request.computed = 0
        self._waiting.appendleft(request)

    def _decode(self) -> list[Output]:
        outputs: list[Output] = []
        ended: list[R] = []
        if self._decoding:
            self._model.compute_decode(self._decoding)
        for request in self._decoding:  # the hot loop: a quiet step of a request costs its Output and little else
            if request.quiet:
                request.quiet -= 1
                produced = request.produced
                request.produced = produced + 1
                outputs.append(Output(request.key, (request.drawn[produced],)))
                continue
            self._seal(request, request.prompt_tokens + request.produced)
            token = request.next_token()
            finish = request.finish
            outputs.append(Output(request.key, (token,), finish=finish, logprobs=request.logprobs))
            if finish is None:
                request.plan_quiet_steps()
            else:
                ended.append(request)
        for request in ended:
            self._decode_blocks -= len(request.blocks)
            self._forget(request)
        if ended:
            self._decoding = [request for request in self._decoding if request.finish is None]
        return outputs

    def _prefill(self, budget: int, outputs: list[Output]) -> int:
        """Go on with the admitted prompts; return the budget that is left."""
        for request in tuple(self._prefilling):
            if not budget:
                break
            budget -= self._compute(request, budget, outputs)
        return budget

    def _admit(self, budget: int, outputs: list[Output]) -> int:
        """Begin with waiting prompts; return the budget that is left."""
        while budget and self._waiting and self.running < self.max_sequences:
            request = self._next_admissible()
            if request is None:
                break
            self._waiting.remove(request)
            self._take_blocks(request)
            self._prefilling.append(request)
            budget -= self._compute(request, budget, outputs)
        return budget

    def _next_admissible(self) -> R | None:
        """Return the request to admit next, if the pool has room; O(blocks of its prompt), of all when nothing runs."""
        if not self._waiting:
            return None
        if self.running:
            first = self._waiting[0]
            return first if self._has_room(first, spare=self._options.total_blocks // SPARE_SHARE) else None
        return next((request for request in self._waiting if self._has_room(request, spare=0)), None)

    def _has_room(self, request: R, *, spare: int) -> bool:
        return self._pool.has_room(request.reusable_hashes, self._blocks_for(request.target), spare=spare)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._options.block_size)

    def _take_blocks(self, request: R) -> None:
        held = self._pool.hold_prefix(request.reusable_hashes)
        request.sealed = len(held)
        request.computed = len(held) * self._options.block_size
        taken = self._pool.allocate(self._blocks_for(request.target) - len(held))
        assert taken is not None, "has_room said that there was room"
        request.blocks = held + taken
        if request.cached_tokens is None:
            request.cached_tokens = max(request.computed - request.request.imported_tokens, 0)
            self.cached_tokens += request.cached_tokens
            self.prompt_tokens += request.prompt_tokens

    def _compute(self, request: R, budget: int, outputs: list[Output]) -> int:
        """Compute the next chunk of a prompt and, with its last token, sample the first one; return the tokens used."""
        chunk = min(budget, request.target - request.computed)
        if chunk:
            self._model.compute_prompt(request, stop=request.computed + chunk)
        request.computed += chunk
        self._seal(request, request.computed)
        if request.computed < request.target:
            return chunk
        self._prefilling.remove(request)
        if request.request.prefill_only:
            outputs.append(self._hand_over(request))
            return chunk
        is_resumed = request.produced > 0
        token = request.next_token()
        finish = request.finish
        if is_resumed:
            outputs.append(Output(request.key, (token,), finish=finish, logprobs=request.logprobs))
        else:
            outputs.append(request.first_output(token))
        if finish is None:
            request.plan_quiet_steps()
            self._decoding.append(request)
            self._decode_blocks += len(request.blocks)
        else:
            self._forget(request)
        return chunk

    def _hand_over(self, request: R) -> Output:
        pin = self._pin_prefix(tuple(request.reusable_hashes))
        self._forget(request)
        return request.first_output(None)._replace(finish=FinishReason.PREFILLED, pin=pin)

    def _forget(self, request: R) -> None:
        del self._requests[request.key]
        self._pool.give_back(request.blocks)

    def _stop_decoding(self, request: R) -> None:
        self._decoding.remove(request)
        self._decode_blocks -= len(request.blocks)

    def _seal(self, request: R, computed: int) -> None:
        """Put the blocks that `computed` tokens fill, their content written, into the prefix cache."""
        blocks = request.blocks
        for index in range(request.sealed, computed // self._options.block_size):
            block_hash, local_hash, parent = request.name_block(index)
            self._model.seal(blocks[index], block_hash)
            blocks[index] = self._pool.seal(blocks[index], block_hash, parent=parent, local_hash=local_hash)
            request.sealed = index + 1
