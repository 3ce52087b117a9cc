"""Route to the worker that costs least, counted in blocks it must compute and hold.

    cost = scale * max(prefill_blocks - credit * overlap_blocks, 0) + decode_blocks + request_weight * active_requests

    prefill_blocks = (active_prefill_tokens + prompt_tokens) / block_size
    decode_blocks  = active blocks + the request's blocks not already active there

The form is that of the KV router of NVIDIA Dynamo (github.com/ai-dynamo/dynamo).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kvmesh.core.candidate_columns import CandidateColumns, Column, ScoreColumns
from kvmesh.core.candidates import Candidate, CostOverrides, RoutingQuery, Selection, Terms
from kvmesh.core.policies.cost_choice import ImbalanceGuard, choose


@dataclass(frozen=True, slots=True, kw_only=True)
class CostKnobs:
    """Weights of the cost."""

    overlap_credit: float = 1.0
    prefill_scale: float = 1.0
    request_weight: float = 0.0
    """Blocks that one active request counts as."""
    temperature: float = 0.0

    def __post_init__(self) -> None:
        CostOverrides(**self.as_mapping())  # the same ranges

    def overridden_by(self, overrides: CostOverrides) -> "CostKnobs":
        """Return these knobs with those the request sets in their place."""
        changes = {name: getattr(overrides, name) for name in self.as_mapping() if getattr(overrides, name) is not None}
        return replace(self, **changes) if changes else self

    def as_mapping(self) -> dict[str, float]:
        """Return the knobs by name."""
        return {
            "overlap_credit": self.overlap_credit,
            "prefill_scale": self.prefill_scale,
            "request_weight": self.request_weight,
            "temperature": self.temperature,
        }


class CostColumns(NamedTuple):
    """Every term of the cost, in blocks, one column each; see `Terms`."""

    prefill_blocks: Column
    credit_blocks: Column
    prefill_cost: Column
    decode_cost: Column
    request_cost: Column
    cost: Column

    @classmethod
    def of(cls, candidates: CandidateColumns, *, prompt_tokens: int, knobs: CostKnobs) -> "CostColumns":
        """Compute all of them."""
        prefill_blocks = (candidates.active_prefill_tokens + prompt_tokens) / candidates.block_size
        credit_blocks = _weigh(knobs.overlap_credit, candidates.overlap_blocks)
        prefill_cost = _weigh(knobs.prefill_scale, np.maximum(prefill_blocks - credit_blocks, 0.0))
        decode_cost = candidates.active_blocks + candidates.new_blocks
        request_cost = _weigh(knobs.request_weight, candidates.active_requests)
        cost = prefill_cost + decode_cost + request_cost
        return cls(prefill_blocks, credit_blocks, prefill_cost, decode_cost, request_cost, cost)

    def terms(self, index: int) -> Terms:
        """Return the terms of one candidate."""
        return Terms(
            prefill_blocks=float(self.prefill_blocks[index]),
            credit_blocks=float(self.credit_blocks[index]),
            prefill_cost=float(self.prefill_cost[index]),
            decode_cost=float(self.decode_cost[index]),
            request_cost=float(self.request_cost[index]),
        )


def _weigh(weight: float, column: Column) -> Column:
    """Return their product; most weights are 1 or 0 most of the time."""
    if weight == 1:
        return column
    return weight * column if weight else np.zeros(len(column))


class KvAware:
    """Cached prefix against load, both in blocks. Stateless."""

    name = "kv_aware"

    def __init__(self, knobs: CostKnobs | None = None, *, imbalance_guard: ImbalanceGuard | None = None) -> None:
        """Use the anchor's weights and no guard unless told otherwise."""
        self._knobs = knobs or CostKnobs()
        self._guard = imbalance_guard

    def select(self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random) -> Selection:
        """Return the candidate of least cost, or drawn by temperature."""
        knobs = self._knobs.overridden_by(query.hints.overrides)
        columns = CandidateColumns.of(candidates)
        terms = CostColumns.of(columns, prompt_tokens=query.prompt_tokens, knobs=knobs)
        choice = choose(columns, terms.cost, temperature=knobs.temperature, guard=self._guard, rng=rng)
        return Selection(
            worker=choice.worker,
            policy=self.name,
            scores=ScoreColumns(columns, terms.cost, terms.terms, choice.why_barred),
            knobs=knobs.as_mapping(),
            note=choice.note,
        )
