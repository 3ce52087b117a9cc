"""Workers churn, break off and restart while a router follows them: does it know in the end what they hold?"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from kvmesh import telemetry
from kvmesh.core.ids import RouterId, WorkerRank
from kvmesh.core.policies.policy import build_policy
from kvmesh.core.routing import RoutingCore
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.services.cache_mirror import RESYNC_S
from kvmesh.services.router_workers import RouterWorkers
from kvmesh.testing.churning_worker import ChurningWorker

_TROUBLE_EVERY_S = (0.5, 6.0)
"""Between two troubles of one worker."""
_RESTARTS, _DISCONNECTS, _BURSTS = 0.4, 0.4, 0.2
"""Shares of the troubles; a burst may come with either, or alone."""
_AWAY_S = 1.0
"""Longest time without a connection."""
_QUIET_S = 30.0
"""What following takes at most once nothing changes, besides a recovery that has to wait its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakPlan:
    """How long and how hard."""

    seconds: float
    workers: int = 16
    blocks: int = 512
    """Per rank."""
    ranks: int = 2
    ring: int = 256
    """Batches a worker keeps: short enough to be overrun while it is away."""
    steps_per_s: float = 100.0
    """Per worker."""
    seed: int = 1
    resync_s: float = RESYNC_S


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakReport:
    """What happened, and whether the index is right."""

    steps: int
    """Prompts that ran through the caches."""
    restarts: int
    disconnects: int
    bursts: int
    """Changes at once that overran the ring."""
    messages: int
    snapshots: int
    recoveries: int
    """Snapshots for a gap: the rank was routed by load meanwhile."""
    blocks: int
    """(rank, block) pairs in the end."""
    missing: int
    """Of them, what the router does not know."""
    extra: int
    """What it believes beyond them."""
    degraded: int
    """Ranks that are still routed by load."""
    quiet_s: float
    """From the last change until the index was right."""
    restarted_missing: int
    """The same for a router that was started in the end."""
    restarted_extra: int

    @property
    def is_exact(self) -> bool:
        """Tell whether both routers know exactly what the workers hold, and that is something."""
        wrong = self.missing + self.extra + self.degraded + self.restarted_missing + self.restarted_extra
        return self.blocks > 0 and not wrong

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {**asdict(self), "is_exact": self.is_exact}


class _Follower:
    """What follows workers in a router: its mind and its subscriptions."""

    def __init__(self, discovery: MemoryDiscovery, router_id: str, *, resync_s: float) -> None:
        self.core = RoutingCore(RouterId(router_id), policy=build_policy("kv_aware"), rng=random.Random(1))
        self.workers = RouterWorkers(
            self.core, discovery=discovery, namespace="default", router_id=RouterId(router_id), resync_s=resync_s
        )

    async def wait_exact(self, churning: Sequence[ChurningWorker], *, within_s: float) -> tuple[int, int, int]:
        """Return (missing, extra) pairs and degraded ranks as soon as all are 0, or when the time is up."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        while any(differences := self._differences(churning)) and loop.time() < until:
            await self.workers.news.wait(min(until, loop.time() + 1.0))
        return differences

    def _differences(self, churning: Sequence[ChurningWorker]) -> tuple[int, int, int]:
        missing = extra = 0
        known: dict[WorkerRank, set[int]] = {}
        for held in self.core.dump_index():
            known.setdefault(held.worker, set()).add(held.block_hash)
        for worker in churning:
            for rank in worker.scripted.record.worker_ranks:
                table, believed = worker.table(rank.rank), known.pop(rank, set())
                missing += len(table - believed)
                extra += len(believed - table)
        degraded = sum(worker.is_index_degraded for worker in self.core.workers(now=asyncio.get_running_loop().time()))
        return missing, extra + sum(map(len, known.values())), degraded


async def soak(plan: SoakPlan) -> SoakReport:
    """Run a plan over real gRPC in this process."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        discovery = MemoryDiscovery()
        before = _counts()
        follower = await stack.enter_async_context(_following(discovery, "soak", resync_s=plan.resync_s))
        churning = []
        for number in range(plan.workers):
            worker = ChurningWorker(
                discovery, number, seed=plan.seed + number, blocks=plan.blocks, ranks=plan.ranks, ring=plan.ring
            )
            stack.push_async_callback(worker.aclose)
            await worker.start()
            churning.append(worker)
        until = loop.time() + plan.seconds
        async with asyncio.TaskGroup() as group:
            for number, worker in enumerate(churning):
                group.create_task(_churn(worker, random.Random(f"{plan.seed}/{number}"), plan, until))
        quiet_since = loop.time()
        within_s = plan.resync_s + _QUIET_S
        missing, extra, degraded = await follower.wait_exact(churning, within_s=within_s)
        quiet_s = loop.time() - quiet_since
        counts = {name: count - before[name] for name, count in _counts().items()}
        restarted = await stack.enter_async_context(_following(discovery, "restarted", resync_s=plan.resync_s))
        restarted_missing, restarted_extra, _ = await restarted.wait_exact(churning, within_s=within_s)
        return SoakReport(
            steps=sum(worker.steps for worker in churning),
            restarts=sum(worker.restarts for worker in churning),
            disconnects=sum(worker.disconnects for worker in churning),
            bursts=sum(worker.bursts for worker in churning),
            blocks=sum(len(worker.table(rank)) for worker in churning for rank in range(plan.ranks)),
            missing=missing,
            extra=extra,
            degraded=degraded,
            quiet_s=round(quiet_s, 3),
            restarted_missing=restarted_missing,
            restarted_extra=restarted_extra,
            **counts,
        )


@asynccontextmanager
async def _following(discovery: MemoryDiscovery, router_id: str, *, resync_s: float) -> AsyncIterator[_Follower]:
    follower = _Follower(discovery, router_id, resync_s=resync_s)
    follower.workers.start()
    try:
        yield follower
    finally:
        await follower.workers.aclose()


async def _churn(worker: ChurningWorker, rng: random.Random, plan: SoakPlan, until: float) -> None:
    """Change the cache steadily and, now and then, break off or restart; connected in the end."""
    now = asyncio.get_running_loop().time
    trouble_at = now() + rng.uniform(*_TROUBLE_EVERY_S)
    back_at = until
    is_away = False
    while now() < until:
        worker.step()
        if is_away and now() >= back_at:
            await worker.connect()
            is_away = False
        elif not is_away and now() >= trouble_at:
            trouble_at = now() + rng.uniform(*_TROUBLE_EVERY_S)
            kind = rng.random()
            if kind < _RESTARTS:
                await worker.restart()
            elif kind < _RESTARTS + _DISCONNECTS:
                await worker.disconnect()
                is_away, back_at = True, now() + rng.uniform(0.0, _AWAY_S)
            if rng.random() < _BURSTS:
                worker.burst()
        await asyncio.sleep(rng.expovariate(plan.steps_per_s))
    await worker.connect()


def _counts() -> dict[str, int]:
    recoveries = sum(
        sample.value
        for metric in telemetry.INDEX_GAPS.collect()
        for sample in metric.samples
        if "_total" in sample.name
    )
    return {
        "messages": int(telemetry.KV_EVENTS._value.get()),
        "snapshots": int(telemetry.KV_SNAPSHOTS._value.get()),
        "recoveries": int(recoveries),
    }
