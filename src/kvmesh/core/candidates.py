"""The nouns of one routing decision: what is asked, who could serve it, who was chosen and why the others were not.

A `Selection` holds everything the policy saw, its random seed too, so that the decision can be taken again offline:
`policy.select(selection.query, selection.candidates, random.Random(selection.seed))` chooses the same worker.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import Epoch, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.remote_prefill import RemotePrefillDecision
from kvmesh.core.roster import WorkerRole

_NO_EPOCH = Epoch(0)
MAX_WEIGHT = 1e6
"""Of a knob: far beyond sense, and products of it stay finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostOverrides:
    """Knobs of the cost for one request; None = the policy's own."""

    overlap_credit: float | None = None
    prefill_scale: float | None = None
    request_weight: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("overlap_credit", "prefill_scale", "request_weight", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_WEIGHT:
                raise FixRequestError(
                    Reason.INVALID_FIELD,
                    f"{name} is {value}, not in 0..{MAX_WEIGHT:g}",
                    field=f"query.hints.cost.{name}",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingHints:
    """What the caller asks of the choice."""

    pinned_worker: WorkerId | None = None
    """This worker or an error; never rerouted."""
    pinned_rank: int | None = None
    """With `pinned_worker`: this rank of it; None = any."""
    allowed_workers: frozenset[WorkerId] = frozenset()
    """Only these; empty = all."""
    excluded_workers: frozenset[WorkerId] = frozenset()
    """None of these: those that failed earlier attempts."""
    required_labels: Mapping[str, str] = field(default_factory=dict)
    """Only workers with all of these."""
    preferred_labels: Mapping[str, str] = field(default_factory=dict)
    """Of the workers that are not saturated, those with the most of these."""
    session_id: str | None = None
    """The worker that served this session last, unless it is saturated."""
    priority: int = 0
    overrides: CostOverrides = CostOverrides()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingQuery:
    """One request, as far as choosing a worker goes."""

    model: str
    prompt_tokens: int
    block_hashes: Mapping[int, Sequence[SequenceHash]] = field(default_factory=dict)
    """By block size: the sequence hashes of the prompt's full blocks, which LoRA, cache namespace and what else a block
    shows are part of. A worker whose block size is absent is cold."""
    prompt_text: str | None = field(default=None, repr=False)
    """For policies that compare text; it is in no log and no explanation."""
    lora: str | None = None
    cache_namespace: str | None = None
    role: WorkerRole = WorkerRole.DECODE
    hints: RoutingHints = RoutingHints()
    expected_output_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0:
            raise FixRequestError(
                Reason.INVALID_FIELD, f"prompt_tokens is {self.prompt_tokens}, below 0", field="prompt_tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One worker rank that serves the model, with every input of the decision."""

    worker: WorkerRank
    epoch: Epoch = _NO_EPOCH
    block_size: int
    overlap_blocks: int = 0
    """Leading prompt blocks cached there, at most (prompt_tokens - 1) // block_size."""
    active_prefill_tokens: int = 0
    active_blocks: int = 0
    new_blocks: int = 0
    """Prompt blocks not already active there."""
    active_requests: int = 0
    waiting_requests: int = 0
    total_blocks: int = 0
    """0 = not said."""
    max_requests: int = 0
    """0 = not said."""
    labels: Mapping[str, str] = field(default_factory=dict)
    load_age_s: float = 0.0
    """Since its last load report or, before the first, since it is followed."""
    is_reported: bool = False
    """It has sent a load report."""
    index_age_s: float | None = None
    """Seconds since its last KV event; None before the first."""
    is_draining: bool = False
    is_stale: bool = False
    """Its load report is too old."""
    is_index_degraded: bool = False
    """Its part of the index is not to be trusted: overlap counts as 0."""
    overload: str = ""
    """The overload rule it breaks, for people; "" = none."""
    is_saturated: bool = False
    """It gets nothing: overloaded, or stale while staleness counts."""

    @property
    def decode_blocks(self) -> int:
        """Blocks active there with this request."""
        return self.active_blocks + self.new_blocks

    def uncached_tokens(self, prompt_tokens: int) -> int:
        """Count the prompt's tokens that would have to be computed there."""
        return max(prompt_tokens - self.overlap_blocks * self.block_size, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The terms of the cost of one candidate, in blocks: `cost` is the sum of the three that are named `*_cost`."""

    prefill_blocks: float
    """(active_prefill_tokens + prompt_tokens) / block_size, before the credit."""
    credit_blocks: float
    """overlap_credit * overlap_blocks."""
    prefill_cost: float
    """prefill_scale * max(prefill_blocks - credit_blocks, 0)."""
    decode_cost: float
    """active_blocks + new_blocks."""
    request_cost: float
    """request_weight * active_requests."""

    @property
    def cost(self) -> float:
        """Lowest wins."""
        return self.prefill_cost + self.decode_cost + self.request_cost


@dataclass(frozen=True, slots=True)
class Scored:
    """What a policy made of one candidate."""

    worker: WorkerRank
    cost: float
    """In the policy's own unit; lowest wins."""
    terms: Terms | None = None
    note: str = ""
    """Anything beside the cost that decided against it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of an explanation."""

    candidate: Candidate
    cost: float | None
    """None if it was not scored."""
    terms: Terms | None
    lost: str
    """Why it was not chosen; "" for the chosen one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A choice. A policy fills the first block; the router adds the facts and what it had excluded before."""

    worker: WorkerRank
    policy: str
    scores: Sequence[Scored] = field(default=(), compare=False)
    """One per candidate; () from a policy that does not score."""
    knobs: Mapping[str, float] = field(default_factory=dict)
    """The policy's settings that were in force, overrides applied."""
    note: str = ""
    """What the policy has to say of its choice."""

    query: RoutingQuery | None = None
    epoch: Epoch = _NO_EPOCH
    overlap_blocks: int = 0
    cost: float | None = None
    candidates: Sequence[Candidate] = field(default=(), compare=False)
    """Those the policy could choose from, by worker."""
    excluded: Sequence[tuple[Candidate, str]] = field(default=(), compare=False)
    """Those it could not, each with the reason."""
    seed: int = 0
    """Of the random.Random that the policy was given."""
    is_staleness_ignored: bool = False
    """Over half of the workers were stale: the fault is the router's, and nobody was saturated for it."""
    fallback: str = ""
    """Why the policy's word did not count and the least cost won instead; "" = it counted."""
    remote_prefill: RemotePrefillDecision | None = None
    """The estimate by which the prefill was booked; None if the router has no rule."""

    def without_candidates(self) -> "Selection":
        """Return the same choice without what is large of its explanation."""
        return Selection(
            worker=self.worker,
            policy=self.policy,
            knobs=self.knobs,
            note=self.note,
            query=self.query,
            epoch=self.epoch,
            overlap_blocks=self.overlap_blocks,
            cost=self.cost,
            seed=self.seed,
            is_staleness_ignored=self.is_staleness_ignored,
            fallback=self.fallback,
            remote_prefill=self.remote_prefill,
        )

    def explain(self) -> tuple[Verdict, ...]:
        """Return every candidate by ascending cost, of equals the chosen one first; `excluded` has the others."""
        scores = {scored.worker: scored for scored in self.scores}
        verdicts = []
        for candidate in self.candidates:
            scored = scores.get(candidate.worker)
            cost, terms = (scored.cost, scored.terms) if scored is not None else (None, None)
            verdicts.append(Verdict(candidate, cost, terms, self._why_lost(candidate.worker, scored)))
        verdicts.sort(key=lambda verdict: (math.inf if verdict.cost is None else verdict.cost, verdict.lost != ""))
        return tuple(verdicts)

    def _why_lost(self, worker: WorkerRank, scored: Scored | None) -> str:
        if worker == self.worker:
            return ""
        if scored is None or self.cost is None:
            return f"not chosen by {self.policy}"
        if scored.note:
            return scored.note
        if scored.cost > self.cost:
            return f"cost {scored.cost:g} is above {self.cost:g}"
        return "tie, not drawn" if scored.cost == self.cost else f"costs less, passed over: {self.note}"


def by_worker(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return candidates by worker_id and rank, so that no choice depends on the order of some map."""
    return sorted(candidates, key=lambda candidate: (candidate.worker.worker_id, candidate.worker.rank))
