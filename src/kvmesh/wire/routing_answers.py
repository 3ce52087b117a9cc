"""What routers answer: core -> protobuf. What they are asked is in `kvmesh.wire.routing`."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields

from kvmesh.core.candidates import Candidate, Selection, Terms, Verdict
from kvmesh.core.prefix_index import HeldBlock
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


def explanation_to_proto(selection: Selection) -> router_pb2.Explanation:
    """Return a decision, whole."""
    explanation = router_pb2.Explanation(
        policy=selection.policy,
        worker_id=selection.worker.worker_id,
        rank=selection.worker.rank,
        candidates=[_candidate_to_proto(verdict) for verdict in selection.explain()],
        rejected=[_rejected_to_proto(candidate, reason) for candidate, reason in selection.excluded],
        fallback=selection.fallback,
        prompt_tokens=selection.query.prompt_tokens if selection.query is not None else 0,
        staleness_ignored=selection.is_staleness_ignored,
        knobs=selection.knobs,
        seed=selection.seed,
        note=selection.note,
    )
    if (prefill := selection.remote_prefill) is not None:
        explanation.prefill.remote = prefill.is_remote
        explanation.prefill.reason = prefill.reason.name.lower()
    return explanation


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
        index_degraded=snapshot.is_index_degraded,
    )
    if report is not None:
        worker.waiting_requests = report.waiting_requests
        worker.prefix_hit_rate = report.prefix_hit_rate
        worker.load_age.CopyFrom(duration(snapshot.load_age_s))
    if snapshot.index_age_s is not None:
        worker.kv_age.CopyFrom(duration(snapshot.index_age_s))
    return worker


def potential_load_to_proto(load: PotentialLoad) -> router_pb2.PotentialLoad:
    """Return what one worker rank would carry."""
    return router_pb2.PotentialLoad(
        worker_id=load.worker.worker_id,
        rank=load.worker.rank,
        prefill_tokens=load.prefill_tokens,
        decode_blocks=load.decode_blocks,
    )


def index_entries(held: Iterable[HeldBlock], *, per_message: int = 2_048) -> Iterator[router_pb2.DumpIndexResponse]:
    """Yield an index in messages below 1 MiB."""
    response = router_pb2.DumpIndexResponse()
    for block in held:
        entry = response.entries.add(
            worker_id=block.worker.worker_id, rank=block.worker.rank, block_hash=block.block_hash
        )
        if block.parent is not None:
            entry.parent_hash = block.parent
        if len(response.entries) == per_message:
            yield response
            response = router_pb2.DumpIndexResponse()
    if response.entries:
        yield response


def _candidate_to_proto(verdict: Verdict) -> router_pb2.CandidateExplanation:
    candidate = verdict.candidate
    explained = router_pb2.CandidateExplanation(
        worker_id=candidate.worker.worker_id,
        rank=candidate.worker.rank,
        epoch=candidate.epoch,
        cost=verdict.cost or 0.0,
        terms=_terms(candidate, verdict.terms),
        lost=verdict.lost,
        inputs=_inputs(candidate),
        index_degraded=candidate.is_index_degraded,
    )
    _set_ages(explained, candidate)
    return explained


def _rejected_to_proto(candidate: Candidate, reason: str) -> router_pb2.RejectedWorker:
    rejected = router_pb2.RejectedWorker(
        worker_id=candidate.worker.worker_id, rank=candidate.worker.rank, reason=reason, inputs=_inputs(candidate)
    )
    _set_ages(rejected, candidate)
    return rejected


def _set_ages(message: router_pb2.CandidateExplanation | router_pb2.RejectedWorker, candidate: Candidate) -> None:
    if candidate.is_reported:
        message.load_age.CopyFrom(duration(candidate.load_age_s))
    if candidate.index_age_s is not None:
        message.kv_age.CopyFrom(duration(candidate.index_age_s))


def _inputs(candidate: Candidate) -> dict[str, float]:
    """Return every figure that the router knew of a worker."""
    return {
        name: value
        for name in _FIGURES
        if isinstance(value := getattr(candidate, name), int | float) and not isinstance(value, bool)
    }


_FIGURES = tuple(
    item.name for item in fields(Candidate) if item.name not in ("epoch", "labels", "load_age_s", "index_age_s")
)


def _terms(candidate: Candidate, terms: Terms | None) -> dict[str, float]:
    """Return what decided: the facts, and what the policy made of them."""
    return {
        "overlap_blocks": candidate.overlap_blocks,
        "decode_blocks": candidate.decode_blocks,
        "active_requests": candidate.active_requests,
        **(asdict(terms) if terms is not None else {}),
    }
