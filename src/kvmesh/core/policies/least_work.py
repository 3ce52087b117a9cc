"""Route to where the request adds least work: what it must compute comes first, what others wait for comes second.

    cost = scale * max(crowding * (prompt_blocks - credit * shared_blocks) + backlog_weight * backlog_blocks, 0)
         + held_weight * active_blocks + (request_weight + busy_blocks) * active_requests

    prompt_blocks  = prompt_tokens / block_size
    shared_blocks  = leading prompt blocks cached there or, if more, held there by requests in flight: whoever comes
                     behind them finds them cached
    crowding       = 1 + crowd_weight * min(active_requests, 256)
    backlog_blocks = active_prefill_tokens / block_size: prompts in line before this one
    busy_blocks    = busy_tokens / block_size while at least half of the candidates run nothing, else 0

Why these weights. A block computed twice takes the worker's time and, for as long as its copy stands in the cache, the
place of another block: it counts in full, and more where many others are held up by it, which keeps prefixes together
when every line is long. A backlog delays this request alone, and drains while caches stay: a third. Blocks held by
running requests cost each of their steps microseconds: they decide between workers that are otherwise alike. While
most workers idle there is room to keep a prefix twice, and every request that runs beside this one delays it and is
delayed by it: each counts as what a step of prefill costs beside its tokens. Without that, a prefix that all requests
begin with keeps them on the one worker that has it, for nothing else weighs as much. Where more are busy it counts not
at all: there it would spread prefixes for the sake of a moment, and leave workers unevenly filled.
`kv_aware` weighs backlog and held blocks as heavily as blocks to compute, and so drives conversations away from their
caches.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvmesh.core.candidate_columns import CandidateColumns, Column, ScoreColumns
from kvmesh.core.candidates import Candidate, CostOverrides, RoutingQuery, Selection, Terms
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.policies.cost_choice import ImbalanceGuard, choose

_OVERRIDDEN = ("overlap_credit", "prefill_scale", "request_weight", "temperature")
_OWN = ("backlog_weight", "crowd_weight", "held_weight")
_MAX_BUSY_TOKENS = 1e6
_MAX_CROWD = 256
"""Requests beyond these wait rather than run; in a longer line prefixes would matter more and more, and load less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastWorkKnobs:
    """Weights of the cost; the first four can be set per request.

    Raises: FixRequestError(INVALID_FIELD) for a weight below 0 or beyond sense.
    """

    overlap_credit: float = 1.0
    prefill_scale: float = 1.0
    request_weight: float = 0.0
    """Blocks that one active request counts as."""
    temperature: float = 0.0
    backlog_weight: float = 0.3
    """Of a block in line before this request, against one that it needs itself."""
    crowd_weight: float = 0.01
    """By how much each active request makes a block to compute count for more."""
    held_weight: float = 0.02
    """Of a block held by running requests."""
    busy_tokens: float = 1024.0
    """Tokens to compute that each active request counts as, while at least half of the candidates have none."""

    def __post_init__(self) -> None:
        CostOverrides(**{name: getattr(self, name) for name in _OVERRIDDEN})  # the same ranges
        for name in _OWN:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise FixRequestError(Reason.INVALID_FIELD, f"{name} is {value}, not in 0..1", field=name)
        if not 0 <= self.busy_tokens <= _MAX_BUSY_TOKENS:
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"busy_tokens is {self.busy_tokens}, not in 0..{_MAX_BUSY_TOKENS:g}",
                field="busy_tokens",
            )

    def overridden_by(self, overrides: CostOverrides) -> "LeastWorkKnobs":
        """Return these knobs with those the request sets in their place."""
        changes = {name: getattr(overrides, name) for name in _OVERRIDDEN if getattr(overrides, name) is not None}
        return replace(self, **changes) if changes else self

    def as_mapping(self) -> dict[str, float]:
        """Return the knobs by name."""
        return {name: getattr(self, name) for name in (*_OVERRIDDEN, *_OWN, "busy_tokens")}


@dataclass(frozen=True, slots=True)
class _Columns:
    """What the cost is made of, in blocks, one column each."""

    candidates: CandidateColumns
    knobs: LeastWorkKnobs
    prompt_blocks: Column
    shared_blocks: Column
    crowding: Column
    backlog_cost: Column
    request_cost: Column | None
    """None: requests do not count."""
    cost: Column

    @classmethod
    def of(cls, candidates: CandidateColumns, *, prompt_tokens: int, knobs: LeastWorkKnobs) -> "_Columns":
        block_size, requests = candidates.block_size, candidates.active_requests
        prompt_blocks = prompt_tokens / block_size
        in_flight = np.floor(prompt_blocks) - candidates.new_blocks
        in_flight = np.minimum(in_flight, np.ceil(prompt_blocks) - 1)  # at least one token is computed
        shared_blocks = np.maximum(candidates.overlap_blocks, in_flight)
        crowding = 1 + knobs.crowd_weight * np.minimum(requests, _MAX_CROWD)
        backlog_cost = knobs.backlog_weight * candidates.active_prefill_tokens / block_size
        cost = crowding * (prompt_blocks - knobs.overlap_credit * shared_blocks) + backlog_cost
        if knobs.overlap_credit > 1:
            cost = np.maximum(cost, 0.0)
        cost = knobs.prefill_scale * cost + knobs.held_weight * candidates.active_blocks
        request_cost = None
        is_calm = knobs.busy_tokens > 0 and 2 * np.count_nonzero(requests) <= len(requests)
        if is_calm or knobs.request_weight:
            busy_blocks = knobs.busy_tokens / block_size if is_calm else 0.0
            request_cost = (knobs.request_weight + busy_blocks) * requests
            cost += request_cost
        return cls(candidates, knobs, prompt_blocks, shared_blocks, crowding, backlog_cost, request_cost, cost)

    def terms(self, index: int) -> Terms:
        """Return the terms of one candidate; crowding is in the first two, the backlog in `prefill_blocks` alone."""
        knobs, crowding = self.knobs, float(self.crowding[index])
        prefill_blocks = crowding * float(self.prompt_blocks[index]) + float(self.backlog_cost[index])
        credit_blocks = crowding * knobs.overlap_credit * float(self.shared_blocks[index])
        return Terms(
            prefill_blocks=prefill_blocks,
            credit_blocks=credit_blocks,
            prefill_cost=knobs.prefill_scale * max(prefill_blocks - credit_blocks, 0.0),
            decode_cost=knobs.held_weight * float(self.candidates.active_blocks[index]),
            request_cost=0.0 if self.request_cost is None else float(self.request_cost[index]),
        )


class LeastWork:
    """The default policy: cached prefix first, load second; see the formula above. Stateless."""

    name = "least_work"

    def __init__(self, knobs: LeastWorkKnobs | None = None, *, imbalance_guard: ImbalanceGuard | None = None) -> None:
        """Use the default weights and no guard unless told otherwise."""
        self._knobs = knobs or LeastWorkKnobs()
        self._guard = imbalance_guard

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return the candidate of least cost, ties uniformly, or drawn by temperature."""
        knobs = self._knobs.overridden_by(query.hints.overrides)
        columns = CandidateColumns.of(candidates)
        terms = _Columns.of(columns, prompt_tokens=query.prompt_tokens, knobs=knobs)
        choice = choose(columns, terms.cost, temperature=knobs.temperature, guard=self._guard, rng=rng)
        return Selection(
            worker=choice.worker,
            policy=self.name,
            scores=ScoreColumns(columns, terms.cost, terms.terms, choice.why_barred),
            knobs=knobs.as_mapping(),
            note=choice.note,
        )
