"""What every simulation has: a router of the core's own parts over workers of one kind, told all they do at once."""

import math
import random
from collections.abc import Iterable

from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, KvEvent
from kvmesh.core.load_table import LoadTable
from kvmesh.core.policies.policy import Policy
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.routing import RoutingCore, RoutingRules
from kvmesh.simulate.options import SimulationOptions

MODEL = "trace"
EPOCH = Epoch(1)


def worker_rank(role: WorkerRole, number: int) -> WorkerRank:
    """Return the name of a simulated worker."""
    return WorkerRank(WorkerId(f"sim/{role.value}/{number:04}"))


def attempt_key(row: int) -> AttemptKey:
    """Return the key of the request of a row."""
    return AttemptKey(RequestId(str(row)), 1)


def new_router(options: SimulationOptions, policy: Policy) -> RoutingCore:
    """Return a router that knows the workers, and to which bookings end by release alone."""
    router_id = RouterId("simulated")
    router = RoutingCore(
        router_id,
        policy=policy,
        rng=random.Random(options.seed),
        rules=RoutingRules(
            stale_after_s=math.inf,  # nothing here reports but by what it does
            max_explained=0,
            remote_prefill=options.remote_prefill if options.prefill_workers else None,
        ),
        loads=LoadTable(router_id, booking_ttl_s=math.inf),
    )
    for role, count in ((WorkerRole.DECODE, options.workers), (WorkerRole.PREFILL, options.prefill_workers)):
        for number in range(count):
            router.put_worker(
                WorkerRecord(
                    worker_id=worker_rank(role, number).worker_id,
                    epoch=EPOCH,
                    role=role,
                    models=(MODEL,),
                    block_size=options.block_size,
                    total_blocks=options.total_blocks or 0,
                ),
                now=0.0,
            )
    return router


def place(router: RoutingCore, row: int, query: RoutingQuery, *, now: float, fallbacks: list[str]) -> WorkerRank:
    """Book a request and return where; if the policy's word did not count, why not is added to `fallbacks`."""
    selection = router.reserve(attempt_key(row), query, now=now).selection
    if selection.fallback:
        fallbacks.append(selection.fallback)
    return selection.worker


def query_for(prompt_tokens: int, blocks: tuple[SequenceHash, ...], *, block_size: int) -> RoutingQuery:
    """Return the question that a request puts to the router."""
    return RoutingQuery(model=MODEL, prompt_tokens=prompt_tokens, block_hashes={block_size: blocks})


def tell_router(router: RoutingCore, worker: WorkerRank, events: Iterable[KvEvent], *, now: float) -> None:
    """Apply what a worker's pool says of its cache."""
    for event in events:
        match event:
            case BlocksStored(parent, block_hashes):
                router.apply_kv_stored(worker, EPOCH, parent=parent, block_hashes=block_hashes, now=now)
            case BlocksRemoved(block_hashes):
                router.apply_kv_removed(worker, EPOCH, block_hashes=block_hashes, now=now)
            case _:
                router.apply_kv_cleared(worker, EPOCH, now=now)
