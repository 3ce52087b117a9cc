"""The router's mind: which worker a request goes to, and what is booked there. No streams, no clock, no tasks.

Laws:
    - the policy runs atomically with the booking: nothing comes between;
    - a choice without a booking changes nothing but the state of the rng;
    - no policy can break the router: it falls back to the least cost, and the selection says why.
"""

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvmesh.core.candidates import Candidate, RoutingQuery, Selection
from kvmesh.core.eligibility import OverloadRules, filter_candidates
from kvmesh.core.ids import AttemptKey, Epoch, RouterId, WorkerId, WorkerRank
from kvmesh.core.load_report import LoadReport, ReportResult
from kvmesh.core.load_table import LoadTable
from kvmesh.core.policies.kv_aware import KvAware
from kvmesh.core.policies.policy import ForgetsWorkers, LearnsBookings, Policy, name_of
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.core.remote_prefill import RemotePrefillDecision, RemotePrefillRules, decide
from kvmesh.core.reservations import Reservation, Reservations
from kvmesh.core.roster import RosterOutcome, WorkerRecord, WorkerRole
from kvmesh.core.worker_states import WorkerStates
from kvmesh.core.worker_views import WorkerChange

_SEED_BITS = 64
_Session = tuple[WorkerRole, str, str]
"""Role, model and session_id: one session may use several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRules:
    """Settings of a router besides its policy."""

    overload: OverloadRules = OverloadRules()
    remote_prefill: RemotePrefillRules | None = None
    """By which a booking's prefill is estimated to run elsewhere; None = it always runs where it is booked."""
    stale_after_s: float = 3.0
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
        index: PrefixIndex | None = None,
    ) -> None:
        """Start with no workers; `rng`, `loads` and `index` are this object's from now on."""
        self._rules = rules or RoutingRules()
        super().__init__(
            loads=loads if loads is not None else LoadTable(router_id),
            index=index if index is not None else PrefixIndex(),
            overload=self._rules.overload,
            stale_after_s=self._rules.stale_after_s,
        )
        self._policy = policy
        self._learns = policy if isinstance(policy, LearnsBookings) else None
        self._forgets = policy if isinstance(policy, ForgetsWorkers) else None
        self._rng = rng
        self._reservations = Reservations(max_explained=self._rules.max_explained)
        self._sessions: OrderedDict[_Session, WorkerRank] = OrderedDict()

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
        everyone = self.field(query, now=now)
        session = _session_of(query)
        eligible = filter_candidates(
            query, everyone.candidates, session_worker=self._sessions.get(session) if session is not None else None
        )
        seed = self._rng.getrandbits(_SEED_BITS)
        selection = self._ask_policy(query, eligible.candidates, seed=seed)
        chosen = next(candidate for candidate in eligible.candidates if candidate.worker == selection.worker)
        return replace(
            selection,
            query=query,
            epoch=chosen.epoch,
            overlap_blocks=chosen.overlap_blocks,
            cost=_cost_of(chosen.worker, selection),
            candidates=eligible.candidates,
            excluded=eligible.excluded,
            seed=seed,
            is_staleness_ignored=everyone.is_staleness_ignored,
            remote_prefill=self._estimate_remote_prefill(query, chosen),
        )

    def reserve(self, key: AttemptKey, query: RoutingQuery, *, now: float) -> Reservation:
        """Choose a worker and book the request on it; the same again gives the same answer.

        Raises: what `select` raises, and ConflictError(ALREADY_EXISTS) if the key is booked for another query or its
        booking has ended.
        """
        held = self._reservations.find(key, query)
        if held is not None:
            return held
        self._loads.require_unused(key, now=now)
        selection = self.select(query, now=now)
        chosen = next(candidate for candidate in selection.candidates if candidate.worker == selection.worker)
        is_remote = selection.remote_prefill is not None and selection.remote_prefill.is_remote
        block_hashes = query.block_hashes.get(chosen.block_size, ())
        reservation_id = self._loads.reserve(
            key,
            chosen.worker,
            block_hashes=block_hashes,
            unhashed_blocks=max(query.prompt_tokens // chosen.block_size - len(block_hashes), 0),
            prefill_tokens=0 if is_remote else chosen.uncached_tokens(query.prompt_tokens),
            now=now,
        )
        session = _session_of(query)
        if session is not None:
            self._note_session(session, chosen.worker)
        fault = self._tell_booked(query, chosen.worker)
        if fault:
            selection = replace(selection, note=f"{selection.note}; {fault}")
        reservation = Reservation(key, reservation_id, selection)
        self._reservations.put(reservation)
        return reservation

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
        """End the bookings that no report showed in time, and return them; call it about once a second."""
        expired = self._loads.expire(now=now)
        self._reservations.forget(expired)
        return expired

    def explain(self, key: AttemptKey) -> Selection:
        """Return the full selection behind a lately booked reservation. Raises: NotKnownError(NOT_FOUND)."""
        return self._reservations.explain(key)

    def _ask_policy(self, query: RoutingQuery, candidates: Sequence[Candidate], *, seed: int) -> Selection:
        name = name_of(self._policy)
        try:
            answer = self._policy.select(query, candidates, random.Random(seed))
            selection = answer if isinstance(answer, Selection) else Selection(worker=answer, policy=name)
            _cost_of(selection.worker, selection)  # its scores can be read
        except Exception as error:  # a policy is anybody's code
            return self._fall_back(query, candidates, seed=seed, why=f"{name} raised {error!r}")
        worker = selection.worker
        if not any(candidate.worker == worker for candidate in candidates):
            return self._fall_back(query, candidates, seed=seed, why=f"{name} named {worker!r}, which is no candidate")
        return selection

    def _fall_back(self, query: RoutingQuery, candidates: Sequence[Candidate], *, seed: int, why: str) -> Selection:
        return replace(KvAware().select(query, candidates, random.Random(seed)), fallback=why)

    def _estimate_remote_prefill(self, query: RoutingQuery, chosen: Candidate) -> RemotePrefillDecision | None:
        """Apply the worker's own rule as far as a router can: the queue's depth is not known here."""
        if self._rules.remote_prefill is None or query.role is not WorkerRole.DECODE:
            return None
        prefill_workers = self._roster.of(WorkerRole.PREFILL, query.model)
        return decide(
            self._rules.remote_prefill,
            prompt_tokens=query.prompt_tokens,
            cached_tokens=chosen.overlap_blocks * chosen.block_size,
            queue_depth=0,
            capable_workers=sum(
                not record.draining and record.block_size == chosen.block_size for record in prefill_workers
            ),
        )

    def _note_session(self, session: _Session, worker: WorkerRank) -> None:
        self._sessions[session] = worker
        self._sessions.move_to_end(session)
        if len(self._sessions) > self._rules.max_sessions:
            self._sessions.popitem(last=False)

    def _tell_booked(self, query: RoutingQuery, worker: WorkerRank) -> str:
        if self._learns is None:
            return ""
        try:
            self._learns.booked(query, worker)
        except Exception as error:  # a policy is anybody's code
            return f"booked raised {error!r}"
        return ""

    def _after(self, change: WorkerChange, worker_id: WorkerId) -> WorkerChange:
        """Drop what answers and policy hold of an incarnation that has ended."""
        self._reservations.forget(change.released)
        if self._forgets is None or change.outcome not in (RosterOutcome.RESTARTED, RosterOutcome.REMOVED):
            return change
        try:
            self._forgets.forget_worker(worker_id)
        except Exception as error:  # a policy is anybody's code
            return replace(change, policy_fault=f"forget_worker raised {error!r}")
        return change


def _session_of(query: RoutingQuery) -> _Session | None:
    session_id = query.hints.session_id
    return None if session_id is None else (query.role, query.model, session_id)


def _cost_of(worker: WorkerRank, selection: Selection) -> float | None:
    return next((scored.cost for scored in selection.scores if scored.worker == worker), None)
