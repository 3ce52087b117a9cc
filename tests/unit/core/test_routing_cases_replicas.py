"""Several routers over the same workers, which tell each other nothing: the workers' reports are all they share.

In virtual time, exactly: the workers here are books of what they run.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import pytest

from kvmesh.core.candidates import RoutingQuery
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, WorkerId, WorkerRank
from kvmesh.core.load_report import LoadReport, RouterLoad
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore
from kvmesh.runtime.router_settings import RouterSettings

POLICIES = sorted({"kv_aware", RouterSettings().policy})
"""The default one among them."""
BLOCK_SIZE = 16
EPOCH = Epoch(1)
WORKERS = 8
PREFILL_TOKENS_PER_S = 8_000
PREFIX_GROUPS = 32
WARM_UP_S, END_S = 20.0, 90.0
ARRIVALS_PER_S = 13.0
"""About eight requests run on each worker."""


@dataclass(slots=True)
class Running:
    """One request on a worker."""

    router_id: RouterId
    reservation_id: int
    blocks: tuple[int, ...]
    prefill_tokens: int


@dataclass(eq=False)
class Books:
    """What one worker truly runs, and so what it reports."""

    worker: WorkerRank
    running: dict[AttemptKey, Running] = field(default_factory=dict)
    stored: list[PromptBlocks] = field(default_factory=list)
    sequence: int = 0
    holders: Counter[int] = field(default_factory=Counter)
    """Requests per active block."""
    block_seconds: float = 0.0

    def start(self, key: AttemptKey, request: Running) -> None:
        self.running[key] = request
        self.holders.update(request.blocks)

    def finish(self, key: AttemptKey) -> None:
        self.holders -= Counter(self.running.pop(key).blocks)

    def share(self, router_id: RouterId) -> RouterLoad:
        """What it runs for one router."""
        mine = [request for request in self.running.values() if request.router_id == router_id]
        blocks = {block for request in mine for block in request.blocks}
        return RouterLoad(len(mine), sum(request.prefill_tokens for request in mine), len(blocks))

    def truth(self) -> RouterLoad:
        """What it runs, as the sum over routers: a block that requests of two routers share counts for both."""
        return sum(map(self.share, self.routers()), start=RouterLoad())

    def routers(self) -> list[RouterId]:
        return sorted({request.router_id for request in self.running.values()})

    def report(self, router_id: RouterId, *, now: float) -> LoadReport:
        self.sequence += 1
        routers = self.routers()
        return LoadReport(
            epoch=EPOCH,
            sequence=self.sequence,
            received_at=now,
            active_requests=len(self.running),
            per_router={router: self.share(router) for router in routers},
            reservation_ids=frozenset(
                request.reservation_id for request in self.running.values() if request.router_id == router_id
            ),
        )


class VirtualMesh:
    """Workers that keep books, the routers in front of them, and clients that take the routers in turn."""

    def __init__(self, *, report_every_s: float, seed: int, policy: str = "kv_aware") -> None:
        self.now = 0.0
        self.workers = {worker.worker: worker for worker in map(self._new_worker, range(WORKERS))}
        self._rng = random.Random(seed)
        self._policy = policy
        self._report_every_s = report_every_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._numbers = count()
        self.routers = [self.new_router(), self.new_router()]
        self.reports = 0
        self._in(0, self._arrive)
        for worker in self.workers.values():
            for place in (0, 1):
                self._in(self._rng.random() * report_every_s, partial(self._tell, worker, place))

    @staticmethod
    def _new_worker(number: int) -> Books:
        return Books(WorkerRank(WorkerId(f"node/decode/{number}")))

    def new_router(self) -> RoutingCore:
        """A router that has had the first snapshot of each stream."""
        number = next(self._numbers)
        router = RoutingCore(
            RouterId(f"router-{number}"), policy=build_policy(self._policy), rng=random.Random(1_000 + number)
        )
        for worker in self.workers.values():
            record = WorkerRecord(worker_id=worker.worker.worker_id, epoch=EPOCH, models=("m",), block_size=BLOCK_SIZE)
            router.put_worker(record, now=self.now)
            router.apply_load(worker.worker, worker.report(router.router_id, now=self.now), now=self.now)
            for blocks in worker.stored:
                self._announce(router, worker, blocks)
        return router

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until_s:
            at, _, happen = heapq.heappop(self._events)
            self._pass_to(at)
            happen()
        self._pass_to(until_s)

    def truth(self) -> dict[WorkerRank, RouterLoad]:
        """What every worker truly carries."""
        return {worker.worker: worker.truth() for worker in self.workers.values()}

    def hear_all(self, router: RoutingCore) -> None:
        """Let every worker report to this router now."""
        for worker in self.workers.values():
            router.apply_load(worker.worker, worker.report(router.router_id, now=self.now), now=self.now)

    def reset_averages(self) -> None:
        """Begin the time average anew."""
        for worker in self.workers.values():
            worker.block_seconds = 0.0

    @property
    def imbalance(self) -> float:
        """Time average of active blocks: the fullest worker's over the mean."""
        averages = [worker.block_seconds for worker in self.workers.values()]
        return max(averages) * len(averages) / sum(averages)

    def _pass_to(self, at: float) -> None:
        for worker in self.workers.values():
            worker.block_seconds += len(worker.holders) * (at - self.now)
        self.now = at

    def _in(self, delay_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._order), happen))

    def _arrive(self) -> None:
        number = next(self._numbers)
        router = self.routers[number % 2]
        key = AttemptKey(RequestId(f"request {number}"), 1)
        query = self.query()
        reservation = router.reserve(key, query, now=self.now)
        worker = self.workers[reservation.worker]
        uncached = query.prompt_tokens - reservation.overlap_blocks * BLOCK_SIZE
        blocks = query.block_hashes[BLOCK_SIZE]
        worker.start(key, Running(router.router_id, reservation.reservation_id, tuple(blocks), uncached))
        router.report_progress(key, accepted_load_sequence=worker.sequence, now=self.now)
        self._in(uncached / PREFILL_TOKENS_PER_S, lambda: self._prefilled(router, worker, key, blocks))
        self._in(self._rng.expovariate(ARRIVALS_PER_S), self._arrive)

    def query(self) -> RoutingQuery:
        """A prompt that shares its beginning with others."""
        rng = self._rng
        group = rng.randrange(PREFIX_GROUPS)
        local = [1 + group] * (8 + group % 16) + [rng.getrandbits(64) for _ in range(rng.randint(4, 60))]
        tokens = len(local) * BLOCK_SIZE + rng.randrange(BLOCK_SIZE)
        blocks = PromptBlocks.of_local(local, BLOCK_SIZE)
        return RoutingQuery(model="m", prompt_tokens=tokens, block_hashes={BLOCK_SIZE: blocks})

    def _prefilled(self, router: RoutingCore, worker: Books, key: AttemptKey, blocks: object) -> None:
        assert isinstance(blocks, PromptBlocks)
        worker.running[key].prefill_tokens = 0
        worker.stored.append(blocks)
        for heard in self.routers:
            self._announce(heard, worker, blocks)
        if router in self.routers:
            router.report_progress(key, prefill_complete=True, now=self.now)
        self._in(self._rng.uniform(1.0, 8.0), lambda: self._finished(router, worker, key))

    def _announce(self, router: RoutingCore, worker: Books, blocks: PromptBlocks) -> None:
        router.apply_kv_stored(
            worker.worker, EPOCH, parent=None, block_hashes=tuple(blocks), local_hashes=blocks.local, now=self.now
        )

    def _finished(self, router: RoutingCore, worker: Books, key: AttemptKey) -> None:
        worker.finish(key)
        if router in self.routers:
            assert router.release(key, now=self.now), f"{key} was over before its end"

    def _tell(self, worker: Books, place: int) -> None:
        router = self.routers[place]
        router.apply_load(worker.worker, worker.report(router.router_id, now=self.now), now=self.now)
        self.reports += 1
        self._in(self._report_every_s, partial(self._tell, worker, place))


def estimates(router: RoutingCore, *, now: float) -> dict[WorkerRank, RouterLoad]:
    return {seen.worker: seen.load for seen in router.workers(now=now)}


@pytest.mark.parametrize("report_every_s", [0.1, 1.0])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_routers_keep_the_active_blocks_of_workers_balanced(policy: str, report_every_s: float, seed: int) -> None:
    mesh = VirtualMesh(report_every_s=report_every_s, seed=seed, policy=policy)

    mesh.run(until_s=WARM_UP_S)
    mesh.reset_averages()
    mesh.run(until_s=END_S)

    assert mesh.imbalance <= 1.15
    assert sum(len(worker.running) for worker in mesh.workers.values()) >= 4 * WORKERS
    assert all(router.index_stats.pairs > 10_000 for router in mesh.routers)


def test_no_request_is_counted_twice_or_missed_by_any_router() -> None:
    mesh = VirtualMesh(report_every_s=0.5, seed=3)

    for _ in range(20):
        mesh.run(until_s=mesh.now + 1.7)
        for router in mesh.routers:
            mesh.hear_all(router)

            assert estimates(router, now=mesh.now) == mesh.truth()

    assert mesh.reports > 20 * 1.7 * WORKERS * 2
    bookings = [sum(seen.reservations for seen in router.workers(now=mesh.now)) for router in mesh.routers]
    assert sum(bookings) == sum(len(worker.running) for worker in mesh.workers.values())
    assert min(bookings) > 10


def test_a_restarted_router_is_exact_after_its_first_snapshots() -> None:
    mesh = VirtualMesh(report_every_s=0.5, seed=4)
    mesh.run(until_s=30.0)
    survivor = mesh.routers[1]
    mesh.hear_all(survivor)

    restarted = mesh.routers[0] = mesh.new_router()

    assert estimates(restarted, now=mesh.now) == estimates(survivor, now=mesh.now) == mesh.truth()
    assert set(restarted.dump_index()) == set(survivor.dump_index())
    queries = [mesh.query() for _ in range(50)]
    costs = [
        [{scored.worker: scored.cost for scored in router.select(query, now=mesh.now).scores} for query in queries]
        for router in (restarted, survivor)
    ]
    # A block that the survivor's own bookings and another's share both have counts twice in sums, and a restarted
    # router has no bookings to tell which blocks of a prompt are active: that alone may differ.
    for exact, other in zip(*costs, strict=True):
        assert exact.keys() == other.keys()
        assert all(exact[worker] >= other[worker] for worker in exact)

    mesh.reset_averages()
    mesh.run(until_s=90.0)
    assert mesh.imbalance <= 1.15
