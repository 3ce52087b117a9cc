"""A routing decision as plain data that JSON can hold, and back: enough to take the decision again elsewhere.

A line has no prompt: neither its text nor its tokens nor its blocks' hashes, of which only the number is kept. So a
policy that reads any of these cannot be asked again from the log. Candidates are columns, a list per input, so that a
line of a thousand workers names each input once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any

from kvmesh.core.candidates import Candidate, CostOverrides, RoutingHints, RoutingQuery, Selection
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import AttemptKey, Epoch, WorkerId, WorkerRank
from kvmesh.core.remote_prefill import RemotePrefillDecision, RemotePrefillReason
from kvmesh.core.roster import WorkerRole

VERSION = 1

_CANDIDATE_FIELDS = tuple(item.name for item in fields(Candidate) if item.name != "worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision as the log has it."""

    selection: Selection
    """What was chosen, from what, and why; its query has no blocks and no text."""
    policy_settings: Mapping[str, Any]
    """What the policy was made of; `policy`, at least, names it."""
    at_s: float
    """Seconds since 1970."""
    booking: AttemptKey | None = None
    """None: nothing was booked."""


def start_mapping(*, at_s: float) -> dict[str, Any]:
    """Return the line that a router begins with: its policy remembers nothing of what stands before."""
    return {"version": VERSION, "event": "started", "at_s": at_s}


def is_start(line: Mapping[str, Any]) -> bool:
    """Tell whether a line is that."""
    return isinstance(line, Mapping) and line.get("event") == "started"


def decision_to_mapping(decision: Decision) -> dict[str, Any]:
    """Return the decision in values that JSON has."""
    selection = decision.selection
    query = selection.query
    assert query is not None, "the router fills it in"
    prefill = selection.remote_prefill
    return {
        "version": VERSION,
        "at_s": decision.at_s,
        "request_id": decision.booking.request_id if decision.booking is not None else None,
        "attempt": decision.booking.attempt if decision.booking is not None else None,
        "policy_settings": dict(decision.policy_settings),
        "policy": selection.policy,
        "worker_id": selection.worker.worker_id,
        "rank": selection.worker.rank,
        "epoch": selection.epoch,
        "cost": selection.cost,
        "overlap_blocks": selection.overlap_blocks,
        "knobs": dict(selection.knobs),
        "seed": selection.seed,
        "note": selection.note,
        "fallback": selection.fallback,
        "is_staleness_ignored": selection.is_staleness_ignored,
        "query": _query_to_mapping(query),
        "candidates": _candidates_to_columns(selection.candidates),
        "excluded": _candidates_to_columns([candidate for candidate, _ in selection.excluded]),
        "excluded_because": [reason for _, reason in selection.excluded],
        "prefill": prefill.reason.name.lower() if prefill is not None else None,
    }


def decision_from_mapping(line: Mapping[str, Any]) -> Decision:
    """Return the decision that a line holds. Raises: FixRequestError(INVALID_FIELD) naming what is wrong with it."""
    if not isinstance(line, Mapping) or line.get("version") != VERSION:
        raise FixRequestError(Reason.INVALID_FIELD, f"no decision of version {VERSION}", field="version")
    try:
        return _decision(line)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise FixRequestError(Reason.INVALID_FIELD, f"no whole decision: {type(exc).__name__}: {exc}") from exc


def _decision(line: Mapping[str, Any]) -> Decision:
    excluded = _candidates_from_columns(line["excluded"])
    selection = Selection(
        worker=WorkerRank(WorkerId(str(line["worker_id"])), int(line["rank"])),
        policy=str(line["policy"]),
        epoch=Epoch(int(line["epoch"])),
        cost=line["cost"],
        overlap_blocks=int(line["overlap_blocks"]),
        knobs={str(name): float(value) for name, value in line["knobs"].items()},
        seed=int(line["seed"]),
        note=str(line["note"]),
        fallback=str(line["fallback"]),
        is_staleness_ignored=bool(line["is_staleness_ignored"]),
        query=_query_from_mapping(line["query"]),
        candidates=tuple(_candidates_from_columns(line["candidates"])),
        excluded=tuple(zip(excluded, map(str, line["excluded_because"]), strict=True)),
        remote_prefill=_prefill(line["prefill"]),
    )
    if not selection.candidates:
        raise ValueError("it has no candidates")
    request_id = line["request_id"]
    return Decision(
        selection=selection,
        policy_settings={"policy": line["policy_settings"]["policy"], **line["policy_settings"]},
        at_s=float(line["at_s"]),
        booking=AttemptKey(request_id, int(line["attempt"])) if request_id is not None else None,
    )


def _prefill(reason: str | None) -> RemotePrefillDecision | None:
    return RemotePrefillDecision(RemotePrefillReason[reason.upper()]) if reason is not None else None


def _query_to_mapping(query: RoutingQuery) -> dict[str, Any]:
    hints = query.hints
    return {
        "model": query.model,
        "role": query.role.value,
        "prompt_tokens": query.prompt_tokens,
        "expected_output_tokens": query.expected_output_tokens,
        "lora": query.lora,
        "cache_namespace": query.cache_namespace,
        "hashed_blocks": {str(size): len(blocks) for size, blocks in query.block_hashes.items()},
        "pinned_worker": hints.pinned_worker,
        "pinned_rank": hints.pinned_rank,
        "allowed_workers": sorted(hints.allowed_workers),
        "excluded_workers": sorted(hints.excluded_workers),
        "required_labels": dict(hints.required_labels),
        "preferred_labels": dict(hints.preferred_labels),
        "session_id": hints.session_id,
        "priority": hints.priority,
        "overrides": {name: value for name, value in asdict(hints.overrides).items() if value is not None},
    }


def _query_from_mapping(query: Mapping[str, Any]) -> RoutingQuery:
    return RoutingQuery(
        model=str(query["model"]),
        role=WorkerRole(query["role"]),
        prompt_tokens=int(query["prompt_tokens"]),
        expected_output_tokens=query["expected_output_tokens"],
        lora=query["lora"],
        cache_namespace=query["cache_namespace"],
        hints=RoutingHints(
            pinned_worker=query["pinned_worker"],
            pinned_rank=query["pinned_rank"],
            allowed_workers=frozenset(query["allowed_workers"]),
            excluded_workers=frozenset(query["excluded_workers"]),
            required_labels=dict(query["required_labels"]),
            preferred_labels=dict(query["preferred_labels"]),
            session_id=query["session_id"],
            priority=int(query["priority"]),
            overrides=CostOverrides(**query["overrides"]),
        ),
    )


def _candidates_to_columns(candidates: Iterable[Candidate]) -> dict[str, list[Any]]:
    listed = list(candidates)  # each is made when it is looked at
    columns: dict[str, list[Any]] = {
        "worker_id": [candidate.worker.worker_id for candidate in listed],
        "rank": [candidate.worker.rank for candidate in listed],
    }
    for name in _CANDIDATE_FIELDS:
        columns[name] = list(map(attrgetter(name), listed))
    columns["labels"] = [dict(candidate.labels) for candidate in listed]
    return columns


def _candidates_from_columns(columns: Mapping[str, Sequence[Any]]) -> list[Candidate]:
    """Return candidates; an input that the line has not, or that is not known any more, is left out."""
    columns = {
        **columns,
        "load_age_s": [math.inf if age is None else age for age in columns["load_age_s"]],
    }  # JSON has none
    known = [name for name in _CANDIDATE_FIELDS if name in columns]
    workers = zip(columns["worker_id"], columns["rank"], strict=True)
    rows = zip(*(columns[name] for name in known), strict=True)
    return [
        Candidate(worker=WorkerRank(WorkerId(str(worker_id)), int(rank)), **dict(zip(known, row, strict=True)))
        for (worker_id, rank), row in zip(workers, rows, strict=True)
    ]
