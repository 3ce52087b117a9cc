"""The simulated engine under a virtual clock: the same batching over the same pool, without a call per token.

A step is grow, decode, prefill, admit, as in the paged batch of the engines. While nothing is prefilled, every step
until the next block begins or output ends is alike but for its length, which the cost model sums in closed form: such
a run of steps is one event here, cut at the step in progress when a request arrives.

    plan(now) -> end of the step or run that begins now, or None: nothing to do
    cut(now)  -> the new end of a run that something came into
    finish()  -> what came of it, at its end

Laws, as of the engine itself: a request holds the blocks of its whole prompt from its admission on; only decoding can
find the pool full, and then the youngest is preempted; nobody overtakes the first in line. Two things differ. The
blocks that output fills enter the cache when the request ends, all at once: nobody could have asked for them before.
And what a request gives back when it ends can be had from the next step on, not in the step that ends it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.core.block_pool import BlockPool
from kvmesh.core.ids import SequenceHash
from kvmesh.core.kv_events import KvEvent
from kvmesh.core.step_cost import StepTimes
from kvmesh.simulate.decoding import Decoding
from kvmesh.simulate.request import VirtualRequest

_SPARE_SHARE = 100
"""One block in so many is left to those that run when another is admitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What one worker has."""

    total_blocks: int
    block_size: int
    max_sequences: int = 256
    max_batched_tokens: int = 8_192


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of a step or a run of steps."""

    prefilled: Sequence[VirtualRequest]
    """Their prompts are computed: the first token, or the whole task of a prefill alone."""
    ended: Sequence[VirtualRequest]
    grown: Sequence[VirtualRequest]
    """They began a block of output."""
    events: Sequence[KvEvent]


@dataclass(slots=True)
class _Run:
    """What the engine is busy with."""

    start_s: float
    steps: int
    end_s: float
    sequences: int
    blocks: int
    tokens: int
    computed: list[VirtualRequest]
    """Those whose prompts it works on; then it is one step."""
    grown: list[VirtualRequest]


@dataclass(slots=True)
class EngineTotals:
    """What an engine has done so far."""

    uncached_tokens: int = 0
    """Prompt tokens computed, each request's first admission."""
    preempted: int = 0
    gaps_s: list[float] = field(default_factory=list)
    """Seconds between tokens, one entry per step or run (its mean) in which anything decoded."""
    gap_counts: list[int] = field(default_factory=list)
    """How many tokens came after each of these gaps."""


class VirtualEngine:
    """One worker's engine; `now` is in seconds and never goes back."""

    def __init__(self, limits: EngineLimits, cost: StepTimes, *, new_hash: Callable[[], SequenceHash]) -> None:
        """Start with an empty cache; `new_hash` names blocks that output fills."""
        self.pool = BlockPool(limits.total_blocks)
        self.limits = limits
        self.totals = EngineTotals()
        self._max_sequences = min(limits.max_sequences, limits.max_batched_tokens)
        self._cost = cost
        self._new_hash = new_hash
        self._waiting: deque[VirtualRequest] = deque()
        self._prefilling: list[VirtualRequest] = []
        self._decoding = Decoding(limits.block_size)
        self._arrivals = 0
        self._run: _Run | None = None

    @property
    def requests(self) -> int:
        """Requests that are here."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    @property
    def is_busy(self) -> bool:
        """Tell whether a step or run is in progress."""
        return self._run is not None

    def add(self, request: VirtualRequest) -> None:
        """Take a request in."""
        self._arrivals += 1
        request.arrival = self._arrivals
        self._waiting.append(request)

    def plan(self, now: float) -> float | None:
        """Begin the next step, or run of steps, and return its end; None if there is nothing to do."""
        assert self._run is None
        grown = self._grow()
        sequences, blocks, tokens = len(self._decoding), self._decoding.blocks, self._decoding.tokens
        computed, prefill_tokens = self._prefill(self.limits.max_batched_tokens - sequences)
        if computed:
            steps = 1
            duration_s = self._cost.step_s(
                decode_sequences=sequences, decode_blocks=blocks, decode_tokens=tokens, prefill_tokens=prefill_tokens
            )
        elif sequences:
            steps = self._decoding.quiet_steps
            duration_s = self._run_s(steps, sequences, blocks, tokens)
        else:
            return None
        self._run = _Run(now, steps, now + duration_s, sequences, blocks, tokens, computed, grown)
        return self._run.end_s

    def cut(self, now: float) -> float:
        """End a run with the step in progress, so that what came in can join the next; return the new end."""
        run = self._run
        assert run is not None
        if run.steps == 1:
            return run.end_s
        past, enough = 0, run.steps
        while enough - past > 1:
            middle = (past + enough) // 2
            if run.start_s + self._run_s(middle, run.sequences, run.blocks, run.tokens) < now:
                past = middle
            else:
                enough = middle
        run.steps = enough
        run.end_s = run.start_s + self._run_s(enough, run.sequences, run.blocks, run.tokens)
        return run.end_s

    def finish(self) -> Finished:
        """Let the step or run end, and return what came of it."""
        run = self._run
        assert run is not None
        self._run = None
        if run.sequences:
            self.totals.gaps_s.append((run.end_s - run.start_s) / run.steps)
            self.totals.gap_counts.append(run.sequences * run.steps)
        ended = self._decoding.advance(run.steps)
        for request in ended:
            self._leave(request)
        prefilled = [request for request in run.computed if request.computed == self._target(request)]
        for request in prefilled:
            self._prefilling.remove(request)
            if self._begin_output(request):
                ended.append(request)
        return Finished(prefilled, ended, run.grown, self.pool.drain_events())

    def bring(self, request: VirtualRequest, hashes: Sequence[SequenceHash]) -> bool:
        """Put blocks computed elsewhere into the cache and hold them for a request; False if there is no room."""
        held = self.pool.hold_prefix(hashes)
        taken = self.pool.allocate(len(hashes) - len(held))
        if taken is None:
            self.pool.give_back(held)
            return False
        for index, block in enumerate(taken, start=len(held)):
            parent = hashes[index - 1] if index else None
            held.append(self.pool.seal(block, hashes[index], parent=parent, local_hash=hashes[index]))
        request.pinned = held
        return True

    def _run_s(self, steps: int, sequences: int, blocks: int, tokens: int) -> float:
        return self._cost.decode_run_s(steps, decode_sequences=sequences, decode_blocks=blocks, decode_tokens=tokens)

    # Decoding.

    def _begin_output(self, request: VirtualRequest) -> bool:
        """Count the token that ends a prefill; True if it was the last."""
        if request.is_prefill_only:
            self.pool.give_back(request.blocks)
            return True
        request.produced += 1
        if request.produced == request.output_tokens:
            self._leave(request)
            return True
        self._decoding.add(request)
        return False

    def _grow(self) -> list[VirtualRequest]:
        """Give a block to every decoding request that begins one."""
        grown = []
        for request in self._decoding.beginning_blocks():
            while request in self._decoding:
                taken = self.pool.allocate(1)
                if taken is not None:
                    self._decoding.grow(request, taken)
                    grown.append(request)
                    break
                self._preempt_youngest()
        return grown

    def _preempt_youngest(self) -> None:
        victim = max(filter(None, (self._decoding.youngest, *self._prefilling)), key=lambda request: request.arrival)
        if victim in self._decoding:
            self._decoding.remove(victim)
            self._leave(victim)
        else:
            self._prefilling.remove(victim)
            self.pool.give_back(victim.blocks)
        victim.blocks, victim.sealed, victim.computed = [], 0, 0
        self._waiting.appendleft(victim)
        self.totals.preempted += 1

    def _leave(self, request: VirtualRequest) -> None:
        """Put the full blocks of the output into the cache too, and give all back."""
        if request.produced:
            self._seal(request, request.prompt_tokens + request.produced - 1)
        self.pool.give_back(request.blocks)

    # Prefilling.

    def _prefill(self, budget: int) -> tuple[list[VirtualRequest], int]:
        """Hand out the budget: to admitted prompts, oldest first, then to waiting ones; return who got some."""
        computed = []
        left = budget
        for request in self._prefilling:
            if not left:
                break
            left -= self._compute(request, left)
            computed.append(request)
        while left and (admitted := self._next_admissible()) is not None:
            self._waiting.remove(admitted)
            self._admit(admitted)
            self._prefilling.append(admitted)
            left -= self._compute(admitted, left)
            computed.append(admitted)
        return computed, budget - left

    def _compute(self, request: VirtualRequest, budget: int) -> int:
        chunk = min(self._target(request) - request.computed, budget)
        request.computed += chunk
        self._seal(request, request.computed)
        return chunk

    def _next_admissible(self) -> VirtualRequest | None:
        if not self._waiting:
            return None
        if self._prefilling or self._decoding:
            return self._waiting[0] if self._can_admit(self._waiting[0]) else None
        found = next(filter(self._can_admit, self._waiting), None)
        if found is None:
            for request in self._waiting:  # what was brought for some takes the room of all
                self.pool.give_back(request.pinned)
                request.pinned = []
            found = self._waiting[0]
        return found

    def _can_admit(self, request: VirtualRequest) -> bool:
        running = len(self._prefilling) + len(self._decoding)
        if running >= self._max_sequences:
            return False
        size = self.limits.block_size
        return self.pool.has_room(
            request.reusable(size),
            -(-self._target(request) // size),
            spare=self.limits.total_blocks // _SPARE_SHARE if running else 0,
        )

    def _admit(self, request: VirtualRequest) -> None:
        size = self.limits.block_size
        held = self.pool.hold_prefix(request.reusable(size))
        taken = self.pool.allocate(-(-self._target(request) // size) - len(held))
        assert taken is not None, "has_room said that there was room"
        request.blocks = held + taken
        request.sealed = len(held)
        request.computed = len(held) * size
        if request.cached_tokens is None:
            request.cached_tokens = request.computed
            self.totals.uncached_tokens += self._target(request) - request.computed
        self.pool.give_back(request.pinned)
        request.pinned = []

    def _target(self, request: VirtualRequest) -> int:
        return request.target(self.limits.block_size)

    def _seal(self, request: VirtualRequest, computed: int) -> None:
        """Put the blocks that `computed` tokens fill into the cache; as in the engine, before the step is over."""
        blocks, hashes = request.blocks, request.hashes
        for index in range(request.sealed, computed // self.limits.block_size):
            if index == len(hashes):
                hashes.append(self._new_hash())
            parent = hashes[index - 1] if index else None
            blocks[index] = self.pool.seal(blocks[index], hashes[index], parent=parent, local_hash=hashes[index])
            request.sealed = index + 1
