"""What a worker needs to know of the others: where the queue is, and who could prefill. Learned from discovery.

As for the router, a record that goes without a word takes nobody away while its server answers: see `Suspects`.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing

from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import Roster, RosterOutcome, WorkerRecord, WorkerRole
from kvmesh.discovery.discovery import Deleted, Discovery, DiscoveryEvent, Put, Snapshot
from kvmesh.services.channels import Channels
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.suspects import Suspects

_SWEEP_S = 60.0
"""Between two looks for channels to those who are gone; far beyond any wait for a connection."""


class Peers:
    """Follows discovery into a roster."""

    def __init__(
        self, discovery: Discovery, *, namespace: str, channels: Channels | None = None, sweep_s: float = _SWEEP_S
    ) -> None:
        """Follow one namespace, from `start` on; of `channels` drop, every `sweep_s`, those that lead to nobody in it.

        A fleet that grows and shrinks for weeks would otherwise leave a channel behind with each worker.
        """
        self.roster = Roster()
        self._discovery = discovery
        self._namespace = namespace
        self._channels = channels
        self._sweep_s = sweep_s
        self._tasks = OwnedTasks()
        self._changed = asyncio.Event()
        self._suspects = Suspects(on_gone=self._lose)
        self._on_lost: list[Callable[[WorkerRecord], None]] = []

    def start(self) -> None:
        """Begin to follow."""
        self._tasks.start(self._follow(), name="peers")
        if self._channels is not None:
            self._tasks.start(self._sweep(self._channels), name="channel-sweep")

    def on_lost(self, hear: Callable[[WorkerRecord], None]) -> None:
        """Have `hear` told of each record whose worker went without a word and does not answer any more."""
        self._on_lost.append(hear)

    async def aclose(self) -> None:
        """Stop following."""
        await self._tasks.aclose()
        await self._suspects.aclose()

    def prefill_workers(self, model: str) -> int:
        """Count the prefill workers that take new work for `model` ("" = any)."""
        return len(self.prefill_records(model))

    def prefill_records(self, model: str) -> tuple[WorkerRecord, ...]:
        """Return the prefill workers that take new work for `model` ("" = any)."""
        records = self.roster.of(WorkerRole.PREFILL, model) if model else self.roster.records(WorkerRole.PREFILL)
        return tuple(record for record in records if not record.draining)

    def metadata(self, worker_id: str, epoch: int) -> Mapping[str, str]:
        """Return what the record of a worker's epoch says beside the contract's fields; empty where none is known."""
        record = self.roster.get(WorkerId(worker_id))
        return record.metadata if record is not None and record.epoch == epoch else {}

    def queue_addresses(self) -> tuple[str, ...]:
        """Return where prefill queues are served, the longest-running one first."""
        records = self.roster.records(WorkerRole.QUEUE)
        return tuple(record.address for record in sorted(records, key=lambda record: record.epoch))

    def router_address(self) -> str | None:
        """Return where a router is served, or None while none is known."""
        return self._address(WorkerRole.ROUTER)

    def processor_addresses(self) -> tuple[str, ...]:
        """Return where processors are served that take new requests, by their ids."""
        records = self.roster.records(WorkerRole.PROCESSOR)
        return tuple(record.address for record in records if not record.draining)

    async def changed(self) -> None:
        """Wait for the next change of the roster."""
        await self._changed.wait()

    def _address(self, role: WorkerRole) -> str | None:
        records = self.roster.records(role)
        return records[0].address if records else None

    async def _follow(self) -> None:
        async with aclosing(self._discovery.watch(self._namespace)) as events:
            async for event in events:
                self._apply(event)
                self._roster_changed()

    async def _sweep(self, channels: Channels) -> None:
        while True:
            await asyncio.sleep(self._sweep_s)
            await channels.drop_unlisted({record.address for record in self.roster.records()})

    def _apply(self, event: DiscoveryEvent) -> None:
        match event:
            case Snapshot(records):
                for record in records:
                    self._put(record)
                listed = {record.worker_id for record in records}
                for record in self.roster.records():
                    if record.worker_id not in listed:
                        self._suspects.suspect(record)
            case Put(record):
                self._put(record)
            case Deleted(worker_id, epoch, graceful):
                live = self.roster.get(worker_id)
                if live is None or live.epoch != epoch:
                    return
                if graceful:
                    self._remove(live)
                else:
                    self._suspects.suspect(live)

    def _put(self, record: WorkerRecord) -> None:
        if self.roster.put(record) is not RosterOutcome.STALE_EPOCH:
            self._suspects.trust(record.worker_id)

    def _lose(self, record: WorkerRecord) -> None:
        self._remove(record)
        for hear in self._on_lost:
            hear(record)

    def _remove(self, record: WorkerRecord) -> None:
        self._suspects.trust(record.worker_id)
        self.roster.remove(record.worker_id, record.epoch)
        self._roster_changed()

    def _roster_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
