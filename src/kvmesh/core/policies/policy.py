"""The port behind which every routing policy stands, and the policies that come with the mesh.

A policy is any object with `select`. The router calls it atomically with the booking, on candidates that may all be
chosen, at least one, ordered by worker. Laws:
    - `select` changes no state of the policy: it also answers "what if"; state changes in the two optional hooks;
    - randomness comes from `rng` alone, so that a decision can be taken again from its explanation;
    - whatever a policy raises or names, the router survives it: it takes the least cost and says so.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from kvmesh.core.candidates import Candidate, RoutingQuery, Selection
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import WorkerId, WorkerRank
from kvmesh.core.policies.kv_aware import KvAware
from kvmesh.core.policies.least_loaded import LeastLoaded
from kvmesh.core.policies.least_work import LeastWork
from kvmesh.core.policies.prompt_similarity import PromptSimilarity
from kvmesh.core.policies.random_choice import RandomChoice
from kvmesh.core.policies.round_robin import RoundRobin
from kvmesh.core.suggestions import suggestion


class Policy(Protocol):
    """Chooses a worker."""

    def select(
        self, query: RoutingQuery, candidates: Sequence[Candidate], rng: random.Random
    ) -> Selection | WorkerRank:
        """Return the worker chosen, bare or with what explains it. Changes no state."""


@runtime_checkable
class LearnsBookings(Protocol):
    """Optional hook of a policy."""

    def booked(self, query: RoutingQuery, worker: WorkerRank) -> None:
        """Learn that this request was booked on this worker."""


@runtime_checkable
class ForgetsWorkers(Protocol):
    """Optional hook of a policy."""

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Forget a worker that is gone or restarted: its caches are empty. Idempotent."""


BUILTIN_POLICIES: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {
        "kv_aware": KvAware,
        "least_work": LeastWork,
        "round_robin": RoundRobin,
        "random": RandomChoice,
        "least_loaded": LeastLoaded,
        "prompt_similarity": PromptSimilarity,
    }
)
"""By name, each with its default settings."""


def build_policy(name: str) -> Policy:
    """Return a new built-in policy. Raises: FixRequestError(INVALID_FIELD) naming a close name, or all."""
    factory = BUILTIN_POLICIES.get(name)
    if factory is None:
        raise FixRequestError(
            Reason.INVALID_FIELD,
            f"no policy is named {name!r}; {suggestion(name, BUILTIN_POLICIES)}",
            field="policy",
        )
    return factory()


def name_of(policy: Policy) -> str:
    """Return what explanations call this policy: its `name`, or its class."""
    return str(getattr(policy, "name", type(policy).__name__))
