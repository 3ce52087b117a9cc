"""The router's mind: which worker a request goes to, and what is booked there. No streams, no clock, no tasks.

Laws:
    - the policy runs atomically with the booking: nothing comes between;
    - a choice without a booking changes nothing but the state of the rng;
    - no policy can break the router: it falls back to the least cost, and the selection says why.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never

from kvmesh.core.approximate_index import ApproximateIndex
from kvmesh.core.candidate_columns import CandidateColumns, ScoreColumns
from kvmesh.core.candidates import RoutingQuery, Selection
from kvmesh.core.eligibility import OverloadRules, filter_candidates
from kvmesh.core.ids import AttemptKey, Epoch, RouterId, WorkerId, WorkerRank
from kvmesh.core.index_port import CacheIndex, IndexMode, LearnsRoutes, NoIndex
from kvmesh.core.late_random import LateRandom
from kvmesh.core.load_report import LoadReport, ReportResult
from kvmesh.core.load_table import LoadTable
from kvmesh.core.policies.kv_aware import KvAware
from kvmesh.core.policies.policy import ForgetsWorkers, LearnsBookings, Policy, name_of
from kvmesh.core.policy_costs import fault_of_costs
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.core.remote_prefill import RemotePrefillDecision, RemotePrefillRules, decide
from kvmesh.core.reservations import Reservation, Reservations
from kvmesh.core.roster import RosterOutcome, WorkerRecord, WorkerRole
from kvmesh.core.sessions import Sessions
from kvmesh.core.stage_times import StageTimes
from kvmesh.core.worker_states import WorkerStates
from kvmesh.core.worker_views import WorkerChange

_SEED_BITS = 64

OnFault = Callable[[str, str, BaseException | None], None]
"""Hears which method of a policy failed, what happened, and what it raised, None = it answered what is of no use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRules:
    """Settings of a router besides its policy."""

    overload: OverloadRules = OverloadRules()
    remote_prefill: RemotePrefillRules | None = None
    """By which a booking's prefill is estimated to run elsewhere; None = it always runs where it is booked."""
    stale_after_s: float = 3.0
    index_mode: IndexMode = IndexMode.EVENTS
    """Which kind of index is made where none is given."""
    session_ttl_s: float = 600.0
    """A session is bound to its worker for so long after its last booking."""
    max_sessions: int = 10_000
    """Sessions remembered; the least recently booked is forgotten first."""
    max_explained: int = 20_000
    """Candidates, in all, of the booked selections that `explain` still shows in full."""


class RoutingCore(WorkerStates):
    """What a router knows of its workers, and how it chooses and books; not thread-safe."""

    def __init__(
        self,
        router_id: RouterId,
        *,
        policy: Policy,
        rng: random.Random,
        rules: RoutingRules | None = None,
        loads: LoadTable | None = None,
        index: CacheIndex | None = None,
        timer: Callable[[], float] | None = None,
        observe_stages: Callable[[str, float], None] | None = None,
        on_fault: OnFault | None = None,
    ) -> None:
        """Start with no workers; `rng`, `loads` and `index` are this object's from now on.

        With a `timer`, in seconds, each decision tells `observe_stages` its stages: match, load, select, and total.
        `on_fault` hears when the policy fails to select, or to learn what was booked.
        """
        self._on_fault = on_fault
        self._rules = rules or RoutingRules()
        self._stages = StageTimes(timer, observe_stages)
        super().__init__(
            loads=loads if loads is not None else LoadTable(router_id),
            index=index if index is not None else _new_index(self._rules.index_mode),
            overload=self._rules.overload,
            stale_after_s=self._rules.stale_after_s,
            stages=self._stages,
        )
        self._policy, self._policy_name = policy, name_of(policy)
        self._learns = policy if isinstance(policy, LearnsBookings) else None
        self._forgets = policy if isinstance(policy, ForgetsWorkers) else None
        self._routes = self._index if isinstance(self._index, LearnsRoutes) else None
        self._rng = rng
        self._policy_rng = LateRandom()
        self._reservations = Reservations(max_explained=self._rules.max_explained)
        self._sessions = Sessions(ttl_s=self._rules.session_ttl_s, max_sessions=self._rules.max_sessions)

    def put_worker(self, record: WorkerRecord, *, now: float) -> WorkerChange:
        """Take a worker's record in; a higher epoch voids what is known of the one before, a lower one is ignored."""
        return self._after(super().put_worker(record, now=now), record.worker_id)

    def remove_worker(self, worker_id: WorkerId, epoch: Epoch, *, now: float) -> WorkerChange:
        """Forget a worker; an epoch that is not the live one changes nothing."""
        return self._after(super().remove_worker(worker_id, epoch, now=now), worker_id)

    def apply_load(self, worker: WorkerRank, report: LoadReport, *, now: float) -> ReportResult:
        """Take a load report in; the bookings that it ends are returned."""
        result = super().apply_load(worker, report, now=now)
        self._reservations.forget(result.released)
        return result

    def select(self, query: RoutingQuery, *, now: float) -> Selection:
        """Choose a worker and book nothing.

        Raises:
            NotKnownError: UNKNOWN_MODEL.
            TryElsewhereError: NO_WORKERS, or NO_MATCHING_WORKER naming the hint that excludes all.
            BackOffError: OVERLOADED if all that match are saturated; a pinned worker is never rerouted.
        """
        self._stages.begin()
        field = self._fields.field(query, now=now)
        eligible = filter_candidates(query, field, session_worker=self._sessions.worker_of(query, now=now))
        seed = self._rng.getrandbits(_SEED_BITS)
        answer, index, cost = self._ask_policy(query, eligible.candidates, seed=seed)
        position = eligible.candidates.position(index)
        record = field.lineup.records[position]
        overlap_blocks = int(field.overlap_blocks[position])
        selection = Selection(
            worker=answer.worker,
            policy=answer.policy,
            scores=answer.scores,
            knobs=answer.knobs,
            note=answer.note,
            query=query,
            epoch=record.epoch,
            overlap_blocks=overlap_blocks,
            cost=cost,
            candidates=eligible.candidates,
            excluded=eligible.excluded,
            seed=seed,
            is_staleness_ignored=field.is_staleness_ignored,
            fallback=answer.fallback,
            remote_prefill=self._estimate_remote_prefill(
                query, cached_tokens=overlap_blocks * record.block_size, block_size=record.block_size
            ),
        )
        self._stages.end("select")
        self._stages.end_all()
        return selection

    def reserve(self, key: AttemptKey, query: RoutingQuery, *, now: float) -> Reservation:
        """Choose a worker and book the request on it; the same again gives the same answer.

        Raises: what `select` raises, and as `find_booked`.
        """
        held = self.find_booked(key, query, now=now)
        if held is not None:
            return held
        selection = self.select(query, now=now)
        record = self._roster.get(selection.worker.worker_id)
        assert record is not None, "who was chosen is alive"
        size = record.block_size
        block_hashes = query.block_hashes.get(size, ())
        is_remote = selection.remote_prefill is not None and selection.remote_prefill.is_remote
        reservation_id = self._loads.reserve(
            key,
            selection.worker,
            block_hashes=block_hashes,
            unhashed_blocks=max(query.prompt_tokens // size - len(block_hashes), 0),
            prefill_tokens=0 if is_remote else max(query.prompt_tokens - selection.overlap_blocks * size, 0),
            expected_output_blocks=query.expected_output_tokens / size if query.expected_output_tokens else None,
            now=now,
        )
        self._sessions.note(query, selection.worker, now=now)
        if self._routes is not None:
            self._routes.record(selection.worker, block_hashes, now)
        fault = self._tell_booked(query, selection.worker)
        if fault:
            selection = replace(selection, note="; ".join(filter(None, (selection.note, fault))))
        reservation = Reservation(key, reservation_id, selection)
        self._reservations.put(reservation)
        return reservation

    def find_booked(self, key: AttemptKey, query: RoutingQuery, *, now: float) -> Reservation | None:
        """Return the answer that `reserve` gave before; None while the key is free. O(1) but for the prompt's hashes.

        Raises: ConflictError(ALREADY_EXISTS) if the key is booked for another query or its booking has ended.
        """
        held = self._reservations.find(key, query)
        if held is None:
            self._loads.require_unused(key, now=now)
        return held

    def report_progress(
        self,
        key: AttemptKey,
        *,
        accepted_load_sequence: int | None = None,
        prefill_complete: bool = False,
        output_blocks: int = 0,
        now: float,
    ) -> None:
        """Note what a booked request did; nothing happens if it has ended. Raises: NotKnownError(NOT_FOUND).

        `accepted_load_sequence` is the worker's, from its acknowledgement. `output_blocks` are added: not idempotent.
        """
        self._loads.add_output_blocks(key, output_blocks, now=now)
        if prefill_complete:
            self._loads.complete_prefill(key, now=now)
        if accepted_load_sequence is not None and self._loads.acknowledge(key, accepted_load_sequence, now=now):
            self._reservations.forget((key,))

    def release(self, key: AttemptKey, *, now: float) -> bool:
        """End a booking; False if it had ended before. Raises: NotKnownError(NOT_FOUND) if it was never seen."""
        was_booked = self._loads.release(key, now=now)
        self._reservations.forget((key,))
        return was_booked

    def expire(self, *, now: float) -> tuple[AttemptKey, ...]:
        """End the bookings that no report showed in time, and return them; call it about once a second.

        An index of what was routed forgets what is too old, too.
        """
        if self._routes is not None:
            self._routes.expire(now)
        expired = self._loads.expire(now=now)
        self._reservations.forget(expired)
        return expired

    def explain(self, key: AttemptKey) -> Selection:
        """Return the full selection behind a lately booked reservation. Raises: NotKnownError(NOT_FOUND)."""
        return self._reservations.explain(key)

    def _ask_policy(
        self, query: RoutingQuery, candidates: CandidateColumns, *, seed: int
    ) -> tuple[Selection, int, float | None]:
        """Return what the policy says, which candidate that is, and what it says that it costs.

        Its draws are those of `random.Random(seed)`. If its word is of no use, that of the least cost counts.
        """
        name = self._policy_name
        self._policy_rng.seed_late(seed)
        try:
            answer = self._policy.select(query, candidates, self._policy_rng)
            selection = answer if isinstance(answer, Selection) else Selection(worker=answer, policy=name)
            index = candidates.index_of(selection.worker)
            cost, fault = _cost_of(selection, candidates, index), fault_of_costs(selection)
        except (Exception, SystemExit) as error:  # a policy is anybody's code
            return self._fall_back(query, candidates, seed=seed, why=f"{name} raised {error!r}", error=error)
        if index is None or fault:
            fault = fault or f"named {selection.worker!r}, which is no candidate"
            return self._fall_back(query, candidates, seed=seed, why=f"{name} {fault}")
        return selection, index, cost

    def _fall_back(
        self,
        query: RoutingQuery,
        candidates: CandidateColumns,
        *,
        seed: int,
        why: str,
        error: BaseException | None = None,
    ) -> tuple[Selection, int, float | None]:
        if self._on_fault is not None:
            self._on_fault("select", why, error)
        selection = KvAware().select(query, candidates, random.Random(seed))
        index = candidates.index_of(selection.worker)
        assert index is not None, "it was chosen from them"
        return replace(selection, fallback=why), index, _cost_of(selection, candidates, index)

    def _estimate_remote_prefill(
        self, query: RoutingQuery, *, cached_tokens: int, block_size: int
    ) -> RemotePrefillDecision | None:
        """Apply the worker's own rule as far as a router can: the queue's depth is not known here."""
        if self._rules.remote_prefill is None or query.role is not WorkerRole.DECODE:
            return None
        return decide(
            self._rules.remote_prefill,
            prompt_tokens=query.prompt_tokens,
            cached_tokens=cached_tokens,
            queue_depth=0,
            capable_workers=self._fields.count_open_workers(WorkerRole.PREFILL, query.model, block_size=block_size),
        )

    def _tell_booked(self, query: RoutingQuery, worker: WorkerRank) -> str:
        if self._learns is None:
            return ""
        try:
            self._learns.booked(query, worker)
        except (Exception, SystemExit) as error:  # a policy is anybody's code
            fault = f"booked raised {error!r}"
            if self._on_fault is not None:
                self._on_fault("booked", fault, error)
            return fault
        return ""

    def _after(self, change: WorkerChange, worker_id: WorkerId) -> WorkerChange:
        """Drop what answers and policy hold of an incarnation that has ended."""
        self._reservations.forget(change.released)
        if self._forgets is None or change.outcome not in (RosterOutcome.RESTARTED, RosterOutcome.REMOVED):
            return change
        try:
            self._forgets.forget_worker(worker_id)
        except (Exception, SystemExit) as error:  # a policy is anybody's code
            return replace(change, policy_fault=f"forget_worker raised {error!r}")
        return change


def _new_index(mode: IndexMode) -> CacheIndex:
    match mode:
        case IndexMode.EVENTS:
            return PrefixIndex()
        case IndexMode.APPROXIMATE:
            return ApproximateIndex()
        case IndexMode.OFF:
            return NoIndex()
    assert_never(mode)


def _cost_of(answer: Selection, candidates: CandidateColumns, index: int | None) -> float | None:
    """Return what the policy says that its choice, the candidate at an index, costs."""
    scores = answer.scores
    if isinstance(scores, ScoreColumns) and scores.candidates is candidates and index is not None:
        return float(scores.costs[index])
    return next((scored.cost for scored in scores if scored.worker == answer.worker), None)
