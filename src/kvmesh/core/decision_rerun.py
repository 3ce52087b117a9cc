"""Logged decisions taken again, in their order, so that a policy with a memory knows what it knew then.

What a policy is told while it routes, it is told here: `booked` after each decision that was booked, `forget_worker`
when a worker of the decision before is gone or has another epoch; and it is made anew where a router started.
"""

import json
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from kvmesh.core.candidates import Selection
from kvmesh.core.decision_log import Decision
from kvmesh.core.ids import Epoch, WorkerId, WorkerRank
from kvmesh.core.policies.kv_aware import KvAware
from kvmesh.core.policies.policy import ForgetsWorkers, LearnsBookings, Policy, name_of
from kvmesh.core.policy_costs import fault_of_costs
from kvmesh.core.roster import WorkerRole

MakePolicy = Callable[[Mapping[str, Any]], Policy]
"""Makes a policy from the settings that a decision names."""

_IGNORED = suppress(Exception, SystemExit)
"""What a policy raises when it is told something: the router goes on, too."""


@dataclass(frozen=True, slots=True)
class Retaken:
    """A decision taken again."""

    decision: Decision
    selection: Selection
    """What the policy says now or, where it failed, what the least cost says."""
    fault: str = ""
    """What the policy raised, or what is wrong with its answer; "" = nothing."""

    @property
    def worker(self) -> WorkerRank:
        """Chosen now."""
        return self.selection.worker

    @property
    def is_same(self) -> bool:
        """Tell whether the same worker was chosen, and by the policy."""
        return not self.fault and self.worker == self.decision.selection.worker

    def explained(self) -> Selection:
        """Return the new choice with all that it was made from."""
        logged, chosen = self.decision.selection, self.selection
        candidate = next(each for each in logged.candidates if each.worker == chosen.worker)
        return replace(
            chosen,
            query=logged.query,
            epoch=candidate.epoch,
            overlap_blocks=candidate.overlap_blocks,
            candidates=logged.candidates,
            excluded=logged.excluded,
            seed=logged.seed,
            cost=next((scored.cost for scored in chosen.scores if scored.worker == chosen.worker), None),
            remote_prefill=logged.remote_prefill,
            is_staleness_ignored=logged.is_staleness_ignored,
        )


class DecisionRerun:
    """Takes the decisions of one log again."""

    def __init__(self, make_policy: MakePolicy, *, asks_another: bool = False) -> None:
        """Use one policy for all decisions that name the same settings.

        With `asks_another` it is not the one that decided, so that it is asked even where that one had failed.
        """
        self._make_policy = make_policy
        self._asks_another = asks_another
        self._policies: dict[str, Policy] = {}
        self._seen: dict[tuple[WorkerRole, str], dict[WorkerId, Epoch]] = {}

    def start_anew(self) -> None:
        """Forget everything: the router started here."""
        self._policies.clear()
        self._seen.clear()

    def take(self, decision: Decision) -> Retaken:
        """Let the policy choose again among the same candidates with the same randomness.

        Where it had failed, so that the least cost was taken, that is done again. Raises: what `make_policy` raises.
        """
        policy = self._policy(decision.policy_settings)
        self._forget_gone(decision)
        logged_fallback = "" if self._asks_another else decision.selection.fallback
        retaken = _choose(decision, KvAware() if logged_fallback else policy)
        if logged_fallback:
            retaken = replace(retaken, selection=replace(retaken.selection, fallback=logged_fallback))
        query = decision.selection.query
        if decision.booking is not None and query is not None and isinstance(policy, LearnsBookings):
            with _IGNORED:
                policy.booked(query, decision.selection.worker)
        return retaken

    def _policy(self, settings: Mapping[str, Any]) -> Policy:
        key = json.dumps(settings, sort_keys=True, default=str)
        if key not in self._policies:
            self._policies[key] = self._make_policy(settings)
        return self._policies[key]

    def _forget_gone(self, decision: Decision) -> None:
        selection = decision.selection
        assert selection.query is not None
        everybody = [*selection.candidates, *(candidate for candidate, _ in selection.excluded)]
        now = {candidate.worker.worker_id: candidate.epoch for candidate in everybody}
        served = (selection.query.role, selection.query.model)
        before, self._seen[served] = self._seen.get(served, {}), now
        gone = [worker_id for worker_id, epoch in before.items() if now.get(worker_id) != epoch]
        for policy in self._policies.values():
            if isinstance(policy, ForgetsWorkers):
                for worker_id in gone:
                    with _IGNORED:
                        policy.forget_worker(worker_id)


def _choose(decision: Decision, policy: Policy) -> Retaken:
    logged = decision.selection
    assert logged.query is not None
    try:
        answer = policy.select(logged.query, logged.candidates, random.Random(logged.seed))
        selection = answer if isinstance(answer, Selection) else Selection(worker=answer, policy=name_of(policy))
        fault = fault_of_costs(selection)
        if all(candidate.worker != selection.worker for candidate in logged.candidates):
            fault = f"named {selection.worker!r}, which is no candidate"
    except (Exception, SystemExit) as error:  # a policy is anybody's code
        fault = f"raised {error!r}"
    if fault:
        selection = KvAware().select(logged.query, logged.candidates, random.Random(logged.seed))
        selection = replace(selection, fallback=f"{name_of(policy)} {fault}")
    return Retaken(decision, selection, fault)
