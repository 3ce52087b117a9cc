"""The loads and the caches of one component's instances, followed as a router follows workers."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import uuid_utils

from kvmesh.core.ids import RouterId
from kvmesh.core.policies.random_choice import RandomChoice
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.routing import RoutingCore
from kvmesh.core.worker_views import WorkerSnapshot
from kvmesh.discovery.discovery import Deleted, Discovery, DiscoveryEvent, Put, Registration, Snapshot
from kvmesh.sdk.records import address_of, says_events
from kvmesh.services.router_workers import RouterWorkers

_MODEL = "component"
"""A router tells workers apart by model; here all of them are wanted."""


class ComponentWatch:
    """What the instances of one component say of themselves."""

    def __init__(self, discovery: Discovery, *, mesh_namespace: str, namespace: str, component: str) -> None:
        """Follow from `start` on; `discovery` stays the caller's to close."""
        self.index = PrefixIndex()
        """Who holds which blocks."""
        router_id = RouterId(f"sdk/{uuid_utils.uuid7()}")
        self._core = RoutingCore(router_id, policy=RandomChoice(), rng=random.Random(), index=self.index)
        self._workers = RouterWorkers(
            self._core,
            discovery=_OneComponent(discovery, mesh_namespace, (namespace, component)),
            namespace=mesh_namespace,
            router_id=router_id,
        )

    def start(self) -> None:
        """Begin to follow."""
        self._workers.start()

    async def aclose(self) -> None:
        """Stop following."""
        await self._workers.aclose()

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        """Return what is known of every instance."""
        return self._core.workers(now=asyncio.get_running_loop().time())

    async def wait_reported(self, until: float) -> None:
        """Wait until somebody is there and everybody has said its load, or until this time of the loop."""
        while asyncio.get_running_loop().time() < until:
            known = self.workers()
            if known and all(worker.report is not None for worker in known):
                return
            await self._workers.news.wait(until)


class _OneComponent:
    """A Discovery in which one component's instances are all there is, as decode workers of one model."""

    def __init__(self, discovery: Discovery, mesh_namespace: str, address: tuple[str, str]) -> None:
        self._discovery = discovery
        self._mesh_namespace = mesh_namespace
        self._address = address

    async def register(self, record: WorkerRecord) -> Registration:
        return await self._discovery.register(record)

    async def watch(self, namespace: str) -> AsyncGenerator[DiscoveryEvent, None]:
        async with aclosing(self._discovery.watch(namespace)) as events:
            async for event in events:
                match event:
                    case Snapshot(records):
                        yield Snapshot(tuple(map(_as_worker, filter(self._is_wanted, records))))
                    case Put(record):
                        if self._is_wanted(record):
                            yield Put(_as_worker(record))
                    case Deleted():
                        yield event

    async def aclose(self) -> None:
        return

    def _is_wanted(self, record: WorkerRecord) -> bool:
        return address_of(record) == self._address and says_events(record)


def _as_worker(record: WorkerRecord) -> WorkerRecord:
    return replace(record, role=WorkerRole.DECODE, models=(_MODEL,))
