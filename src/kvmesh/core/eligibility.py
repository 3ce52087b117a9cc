"""Who may be chosen at all: the steps before the policy, in order. Each names who it excludes and why.

    draining -> pin, allowed and excluded workers -> required labels -> saturated -> session -> preferred labels

The first four are hard: if nobody is left the request fails with the reason of that step. The last two only narrow.
A worker that is pinned meets the same steps: it is an error if it fails one, and it is never rerouted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvmesh.core.candidates import Candidate, RoutingHints, RoutingQuery
from kvmesh.core.errors import BackOffError, FixRequestError, Reason, TryElsewhereError
from kvmesh.core.ids import WorkerRank

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


@dataclass(frozen=True, slots=True)
class Eligible:
    """Who may be chosen, and who not and why."""

    candidates: tuple[Candidate, ...]
    """At least one."""
    excluded: tuple[tuple[Candidate, str], ...]


def filter_candidates(
    query: RoutingQuery, candidates: Iterable[Candidate], *, session_worker: WorkerRank | None = None
) -> Eligible:
    """Keep those that may be chosen; their order is kept.

    Raises:
        TryElsewhereError: NO_WORKERS if all drain, NO_MATCHING_WORKER naming the hint that excludes all.
        BackOffError: OVERLOADED if all that match are saturated.
    """
    hints = query.hints
    kept = list(candidates)
    excluded: list[tuple[Candidate, str]] = []

    def drop(why: Callable[[Candidate], str]) -> list[Candidate]:
        reasons = [(candidate, why(candidate)) for candidate in kept]
        excluded.extend((candidate, reason) for candidate, reason in reasons if reason)
        return [candidate for candidate, reason in reasons if not reason]

    kept = drop(lambda candidate: "draining" if candidate.is_draining else "")
    if not kept:
        raise TryElsewhereError(Reason.NO_WORKERS, f"every worker of {query.model} is draining")
    if _names_workers(hints):
        kept = drop(lambda candidate: _name_mismatch(candidate.worker, hints))
        if not kept:
            raise _no_named_worker(query)
    if hints.required_labels:
        matching = drop(lambda candidate: _missing_labels(candidate, hints))
        if not matching:
            raise _no_labelled_worker(query, kept)
        kept = matching
    matching, kept = kept, drop(_saturation)
    if not kept:
        raise _all_saturated(query, matching)

    if session_worker is not None and any(candidate.worker == session_worker for candidate in kept):
        kept = drop(lambda candidate: "" if candidate.worker == session_worker else "another holds the session")
    if hints.preferred_labels:
        most = max(_preferred_count(candidate, hints) for candidate in kept)
        kept = drop(
            lambda candidate: "" if _preferred_count(candidate, hints) == most else "another has more preferred labels"
        )
    return Eligible(tuple(kept), tuple(excluded))


def _names_workers(hints: RoutingHints) -> bool:
    return hints.pinned_worker is not None or bool(hints.allowed_workers or hints.excluded_workers)


def _name_mismatch(worker: WorkerRank, hints: RoutingHints) -> str:
    if hints.pinned_worker is not None and worker.worker_id != hints.pinned_worker:
        return f"{hints.pinned_worker} is pinned"
    if hints.pinned_worker is not None and hints.pinned_rank not in (None, worker.rank):
        return f"rank {hints.pinned_rank} is pinned"
    if worker.worker_id in hints.excluded_workers:
        return "excluded by the request"
    if hints.allowed_workers and worker.worker_id not in hints.allowed_workers:
        return "not among the allowed workers"
    return ""


def _missing_labels(candidate: Candidate, hints: RoutingHints) -> str:
    missing = [f"{k}={v}" for k, v in sorted(hints.required_labels.items()) if candidate.labels.get(k) != v]
    return f"lacks label {', '.join(missing)}" if missing else ""


def _saturation(candidate: Candidate) -> str:
    if not candidate.is_saturated:
        return ""
    return f"overloaded: {candidate.overload}" if candidate.overload else f"stale: {candidate.load_age_s:.1f} s old"


def _preferred_count(candidate: Candidate, hints: RoutingHints) -> int:
    return sum(candidate.labels.get(key) == value for key, value in hints.preferred_labels.items())


def _no_named_worker(query: RoutingQuery) -> TryElsewhereError:
    hints = query.hints
    if hints.pinned_worker is not None:
        rank = "" if hints.pinned_rank is None else f" rank {hints.pinned_rank}"
        return TryElsewhereError(
            Reason.NO_MATCHING_WORKER,
            f"pinned worker {hints.pinned_worker}{rank} cannot take a request for {query.model}",
            field="hints.pinned_worker_id",
            metadata={"pinned_worker": hints.pinned_worker},
        )
    allowed, barred = (", ".join(sorted(names)) for names in (hints.allowed_workers, hints.excluded_workers))
    return TryElsewhereError(
        Reason.NO_MATCHING_WORKER,
        f"no worker of {query.model} is left: allowed [{allowed or 'all'}], excluded [{barred}]",
        field="hints.allowed_worker_ids" if allowed else "hints.excluded_worker_ids",
        metadata={"allowed_workers": allowed, "excluded_workers": barred},
    )


def _no_labelled_worker(query: RoutingQuery, candidates: list[Candidate]) -> TryElsewhereError:
    """Name the labels that nobody has; if each is had by somebody, all: no one worker has them together."""
    required = query.hints.required_labels
    held_by_none = [k for k, v in required.items() if not any(c.labels.get(k) == v for c in candidates)]
    named = ", ".join(f"{key}={required[key]}" for key in sorted(held_by_none or required))
    return TryElsewhereError(
        Reason.NO_MATCHING_WORKER,
        f"no worker of {query.model} has label {named}",
        field="hints.required_labels",
        metadata={"label": named},
    )


def _all_saturated(query: RoutingQuery, candidates: list[Candidate]) -> BackOffError:
    named = ", ".join(f"{candidate.worker.worker_id} ({_saturation(candidate)})" for candidate in candidates[:5])
    pinned = query.hints.pinned_worker
    what = f"pinned worker {pinned}" if pinned is not None else f"every worker of {query.model}"
    return BackOffError(
        Reason.OVERLOADED,
        f"{what} is saturated: {named}",
        retry_after_s=_RETRY_AFTER_S,
        metadata={"pinned_worker": pinned} if pinned is not None else None,
    )
