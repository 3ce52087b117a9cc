"""Who may be chosen at all: the steps before the policy, in order. Each names who it excludes and why.

    draining -> pin, allowed and excluded workers -> required labels -> saturated -> session -> preferred labels

The first four are hard: if nobody is left the request fails with the reason of that step. The last two only narrow.
A worker that is pinned meets the same steps: it is an error if it fails one, and it is never rerouted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import overload

import numpy as np

from kvmesh.core.candidate_columns import CandidateColumns, Field
from kvmesh.core.candidates import Candidate, RoutingHints, RoutingQuery
from kvmesh.core.errors import BackOffError, FixRequestError, Reason, TryElsewhereError
from kvmesh.core.ids import WorkerRank
from kvmesh.core.lineup import Flags, Positions

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OverloadRules:
    """When a worker counts as overloaded; None = that rule is off."""

    max_block_usage: float | None = None
    """Blocks active with this request over its total blocks."""
    max_prefill_tokens: int | None = None
    """Prompt tokens still to be computed there, without this request."""
    max_requests_per_slot: float | None = None
    """Active requests with this one, over the requests it runs at once."""
    max_waiting_requests: int | None = None
    """Requests that wait inside its engine."""

    def __post_init__(self) -> None:
        for name in ("max_block_usage", "max_prefill_tokens", "max_requests_per_slot", "max_waiting_requests"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise FixRequestError(Reason.INVALID_FIELD, f"{name} is {value}, below 0", field=name)

    def broken_by(
        self, *, decode_blocks: int, total_blocks: int, prefill_tokens: int, requests: int, slots: int, waiting: int
    ) -> str:
        """Return the first rule broken, for people, or ""; `total_blocks` or `slots` 0 = not said, its rule is off."""
        if self.max_block_usage is not None and total_blocks and decode_blocks > self.max_block_usage * total_blocks:
            return f"{decode_blocks} of {total_blocks} blocks active"
        if self.max_prefill_tokens is not None and prefill_tokens > self.max_prefill_tokens:
            return f"{prefill_tokens} prompt tokens to compute"
        if self.max_requests_per_slot is not None and slots and requests + 1 > self.max_requests_per_slot * slots:
            return f"{requests} requests on {slots} slots"
        if self.max_waiting_requests is not None and waiting > self.max_waiting_requests:
            return f"{waiting} requests wait inside it"
        return ""

    def flags_of(self, field: Field) -> Flags | None:
        """Return True at everyone who breaks a rule, by the same rules; None while all are off."""
        broken = []
        if self.max_block_usage is not None:
            total = field.total_blocks
            broken.append((total > 0) & (field.active_blocks + field.new_blocks > self.max_block_usage * total))
        if self.max_prefill_tokens is not None:
            broken.append(field.active_prefill_tokens > self.max_prefill_tokens)
        if self.max_requests_per_slot is not None:
            slots = field.max_requests
            broken.append((slots > 0) & (field.active_requests + 1 > self.max_requests_per_slot * slots))
        if self.max_waiting_requests is not None:
            broken.append(field.waiting_requests > self.max_waiting_requests)
        return reduce(np.logical_or, broken) if broken else None


@dataclass(frozen=True, slots=True)
class Excluded(Sequence[tuple[Candidate, str]]):
    """Those who may not be chosen, step by step, each with the reason, made when somebody looks."""

    field: Field
    steps: tuple[tuple[Positions, Callable[[Candidate], str]], ...] = ()
    """Whom a step excluded, and how it says why."""

    def __len__(self) -> int:
        return sum(len(positions) for positions, _ in self.steps)

    @overload
    def __getitem__(self, index: int) -> tuple[Candidate, str]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[Candidate, str], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[Candidate, str] | tuple[tuple[Candidate, str], ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(len(self))[index])
        at = range(len(self))[index]
        for positions, why in self.steps:
            if at < len(positions):
                candidate = self.field.candidate(int(positions[at]))
                return candidate, why(candidate)
            at -= len(positions)
        raise AssertionError("the range was checked")


@dataclass(frozen=True, slots=True)
class Eligible:
    """Who may be chosen, and who not and why."""

    candidates: CandidateColumns
    """At least one."""
    excluded: Sequence[tuple[Candidate, str]]


class _Sieve:
    """Who is left after each step."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.positions: Positions | None = None  # None = everybody
        self.steps: list[tuple[Positions, Callable[[Candidate], str]]] = []

    @property
    def left(self) -> CandidateColumns:
        return CandidateColumns(self.field, self.positions)

    def drop(self, flags: Flags, why: Callable[[Candidate], str]) -> bool:
        """Exclude those flagged; False if nobody is left."""
        if not np.count_nonzero(flags):
            return True
        if self.positions is None:
            dropped, kept = flags.nonzero()[0], (~flags).nonzero()[0]
        else:
            is_dropped = flags[self.positions]
            dropped, kept = self.positions[is_dropped], self.positions[~is_dropped]
        if len(dropped):
            self.positions = kept
            self.steps.append((dropped, why))
        return len(kept) > 0


def filter_candidates(query: RoutingQuery, field: Field, *, session_worker: WorkerRank | None = None) -> Eligible:
    """Keep those that may be chosen, in their order. O(1) array operations where there are no hints.

    Raises:
        TryElsewhereError: NO_WORKERS if all drain, NO_MATCHING_WORKER naming the hint that excludes all.
        BackOffError: OVERLOADED if all that match are saturated.
    """
    hints = query.hints
    sieve = _Sieve(field)
    if field.draining is not None and not sieve.drop(field.draining, lambda candidate: "draining"):
        raise TryElsewhereError(Reason.NO_WORKERS, f"every worker of {query.model} is draining")
    if _names_workers(hints) and not sieve.drop(
        _flags_of_mismatch(field, hints), lambda candidate: _name_mismatch(candidate.worker, hints)
    ):
        raise _no_named_worker(query)
    matching = sieve.positions
    if hints.required_labels and not sieve.drop(
        _flags_of_missing_labels(field, hints), lambda candidate: _missing_labels(candidate, hints)
    ):
        raise _no_labelled_worker(query, CandidateColumns(field, matching))
    matching = sieve.positions
    saturated = field.saturated
    if saturated is not None and not sieve.drop(saturated, _saturation):
        raise _all_saturated(query, CandidateColumns(field, matching))
    if session_worker is not None and (index := sieve.left.index_of(session_worker)) is not None:
        others = np.ones(len(field), np.bool_)
        others[index if sieve.positions is None else sieve.positions[index]] = False
        sieve.drop(others, lambda candidate: "another holds the session")
    if hints.preferred_labels:
        counts = np.zeros(len(field), np.intp)
        for label in hints.preferred_labels.items():
            counts += field.lineup.flags_of_label(*label)
        most = (counts if sieve.positions is None else counts[sieve.positions]).max()
        sieve.drop(counts < most, lambda candidate: "another has more preferred labels")
    return Eligible(sieve.left, Excluded(field, tuple(sieve.steps)) if sieve.steps else ())


def _names_workers(hints: RoutingHints) -> bool:
    return hints.pinned_worker is not None or bool(hints.allowed_workers or hints.excluded_workers)


def _name_mismatch(worker: WorkerRank, hints: RoutingHints) -> str:
    if hints.pinned_worker is not None and worker.worker_id != hints.pinned_worker:
        return f"{hints.pinned_worker} is pinned"
    if hints.pinned_worker is not None and hints.pinned_rank not in (None, worker.rank):
        return f"rank {hints.pinned_rank} is pinned"
    if worker.worker_id in hints.excluded_workers:
        return "excluded by the request, or failed an earlier attempt"
    if hints.allowed_workers and worker.worker_id not in hints.allowed_workers:
        return "not among the allowed workers"
    return ""


def _flags_of_mismatch(field: Field, hints: RoutingHints) -> Flags:
    """Return True wherever `_name_mismatch` has something to say."""
    lineup = field.lineup
    flags = np.zeros(len(field), np.bool_)
    if hints.pinned_worker is not None:
        flags = ~lineup.flags_of([hints.pinned_worker])
        if hints.pinned_rank is not None:
            pinned = lineup.position_of(WorkerRank(hints.pinned_worker, hints.pinned_rank))
            flags[:] = True
            if pinned is not None:
                flags[pinned] = False
    if hints.excluded_workers:
        flags |= lineup.flags_of(hints.excluded_workers)
    if hints.allowed_workers:
        flags |= ~lineup.flags_of(hints.allowed_workers)
    return flags


def _flags_of_missing_labels(field: Field, hints: RoutingHints) -> Flags:
    flags = np.zeros(len(field), np.bool_)
    for label in hints.required_labels.items():
        flags |= ~field.lineup.flags_of_label(*label)
    return flags


def _missing_labels(candidate: Candidate, hints: RoutingHints) -> str:
    missing = [f"{k}={v}" for k, v in sorted(hints.required_labels.items()) if candidate.labels.get(k) != v]
    return f"lacks label {', '.join(missing)}" if missing else ""


def _saturation(candidate: Candidate) -> str:
    if not candidate.is_saturated:
        return ""
    return f"overloaded: {candidate.overload}" if candidate.overload else f"stale: {candidate.load_age_s:.1f} s old"


def _no_named_worker(query: RoutingQuery) -> TryElsewhereError:
    hints = query.hints
    if hints.pinned_worker is not None:
        rank = "" if hints.pinned_rank is None else f" rank {hints.pinned_rank}"
        return TryElsewhereError(
            Reason.NO_MATCHING_WORKER,
            f"pinned worker {hints.pinned_worker}{rank} cannot take a request for {query.model}",
            field="query.hints.pinned_worker_id",
            metadata={"pinned_worker": hints.pinned_worker},
        )
    allowed, barred = (", ".join(sorted(names)) for names in (hints.allowed_workers, hints.excluded_workers))
    return TryElsewhereError(
        Reason.NO_MATCHING_WORKER,
        f"no worker of {query.model} is left: allowed [{allowed or 'all'}], excluded [{barred}]",
        field="query.hints.allowed_worker_ids" if allowed else "query.hints.excluded_worker_ids",
        metadata={"allowed_workers": allowed, "excluded_workers": barred},
    )


def _no_labelled_worker(query: RoutingQuery, candidates: Sequence[Candidate]) -> TryElsewhereError:
    """Name the labels that nobody has; if each is had by somebody, all: no one worker has them together."""
    required = query.hints.required_labels
    held_by_none = [k for k, v in required.items() if not any(c.labels.get(k) == v for c in candidates)]
    named = ", ".join(f"{key}={required[key]}" for key in sorted(held_by_none or required))
    return TryElsewhereError(
        Reason.NO_MATCHING_WORKER,
        f"no worker of {query.model} has label {named}",
        field="query.hints.required_labels",
        metadata={"label": named},
    )


def _all_saturated(query: RoutingQuery, candidates: Sequence[Candidate]) -> BackOffError:
    named = ", ".join(f"{candidate.worker.worker_id} ({_saturation(candidate)})" for candidate in candidates[:5])
    pinned = query.hints.pinned_worker
    what = f"pinned worker {pinned}" if pinned is not None else f"every worker of {query.model}"
    return BackOffError(
        Reason.OVERLOADED,
        f"{what} is saturated: {named}",
        retry_after_s=_RETRY_AFTER_S,
        metadata={"pinned_worker": pinned} if pinned is not None else None,
    )
