"""What routers answer: core -> protobuf. What they are asked is in `kvmesh.wire.routing`."""

import math
from collections.abc import Collection
from dataclasses import asdict

from kvmesh.core.candidates import Candidate, Selection, Terms, Verdict
from kvmesh.core.ids import WorkerRank
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.worker_views import PotentialLoad, WorkerSnapshot
from kvmesh.v1 import router_pb2
from kvmesh.wire.validation import duration


def selected_worker_to_proto(selection: Selection, record: WorkerRecord) -> router_pb2.SelectedWorker:
    """Return the chosen worker, of which `record` is the live one."""
    return router_pb2.SelectedWorker(
        worker_id=selection.worker.worker_id,
        epoch=selection.epoch,
        rank=selection.worker.rank,
        address=record.address,
        overlap_blocks=selection.overlap_blocks,
        block_size=record.block_size,
        cost=selection.cost or 0.0,
    )


def explanation_to_proto(selection: Selection, *, unreported: Collection[WorkerRank] = ()) -> router_pb2.Explanation:
    """Return a decision, whole; `unreported` workers have sent no load yet, so that theirs has no age."""
    candidates = sorted(selection.explain()[: len(selection.candidates)], key=_by_cost)
    return router_pb2.Explanation(
        policy=selection.policy,
        worker_id=selection.worker.worker_id,
        rank=selection.worker.rank,
        candidates=[_candidate_to_proto(verdict, unreported) for verdict in candidates],
        rejected=[
            router_pb2.RejectedWorker(worker_id=candidate.worker.worker_id, reason=reason)
            for candidate, reason in selection.excluded
        ],
        fallback=selection.fallback,
        prompt_tokens=selection.query.prompt_tokens if selection.query is not None else 0,
        staleness_ignored=selection.is_staleness_ignored,
    )


def router_worker_to_proto(snapshot: WorkerSnapshot) -> router_pb2.RouterWorker:
    """Return one worker rank as the router sees it."""
    report = snapshot.report
    worker = router_pb2.RouterWorker(
        worker_id=snapshot.worker.worker_id,
        rank=snapshot.worker.rank,
        epoch=snapshot.record.epoch,
        active_requests=snapshot.load.active_requests,
        active_prefill_tokens=snapshot.load.prefill_tokens,
        active_blocks=snapshot.load.decode_blocks,
        total_blocks=snapshot.record.total_blocks or (report.total_blocks if report is not None else 0),
        indexed_blocks=snapshot.indexed_blocks,
        stale=snapshot.is_stale,
        reservations=snapshot.reservations,
        draining=snapshot.record.draining,
    )
    if report is not None:
        worker.waiting_requests = report.waiting_requests
        worker.prefix_hit_rate = report.prefix_hit_rate
        worker.load_age.CopyFrom(duration(snapshot.load_age_s))
    return worker


def potential_load_to_proto(load: PotentialLoad) -> router_pb2.PotentialLoad:
    """Return what one worker rank would carry."""
    return router_pb2.PotentialLoad(
        worker_id=load.worker.worker_id,
        rank=load.worker.rank,
        prefill_tokens=load.prefill_tokens,
        decode_blocks=load.decode_blocks,
    )


def _candidate_to_proto(verdict: Verdict, unreported: Collection[WorkerRank]) -> router_pb2.CandidateExplanation:
    candidate = verdict.candidate
    explained = router_pb2.CandidateExplanation(
        worker_id=candidate.worker.worker_id,
        rank=candidate.worker.rank,
        epoch=candidate.epoch,
        cost=verdict.cost or 0.0,
        terms=_terms(candidate, verdict.terms),
        lost=verdict.lost,
    )
    if candidate.worker not in unreported:
        explained.load_age.CopyFrom(duration(candidate.load_age_s))
    if candidate.index_age_s is not None:
        explained.kv_age.CopyFrom(duration(candidate.index_age_s))
    return explained


def _terms(candidate: Candidate, terms: Terms | None) -> dict[str, float]:
    """Return what decided: the facts, and what the policy made of them."""
    return {
        "overlap_blocks": candidate.overlap_blocks,
        "decode_blocks": candidate.decode_blocks,
        "active_requests": candidate.active_requests,
        **(asdict(terms) if terms is not None else {}),
    }


def _by_cost(verdict: Verdict) -> tuple[float, bool]:
    """Order by cost, the chosen one first among equals; what was not scored comes last."""
    return (math.inf if verdict.cost is None else verdict.cost, verdict.lost != "")
