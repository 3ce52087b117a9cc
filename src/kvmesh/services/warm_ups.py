"""Connects a worker to those it will pull from, before the first pull needs it.

A first pull over NIXL connects and registers, which takes a tenth of a second that its request would wait. Nothing
depends on a warm-up: what fails here is tried again by the pull itself.
"""

import asyncio

import numpy as np
import numpy.typing as npt

from kvmesh import telemetry
from kvmesh.core.errors import MeshError
from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.worker_transports import WorkerTransports

log = telemetry.logger(__name__)

_MOST = 64
"""Connections held for no pull: where there are more sources, the rest connect when they are needed."""


class WarmUps:
    """The warm-ups of one worker, one after the other."""

    def __init__(self, *, peers: Peers, sources: WorkerRole, transports: WorkerTransports, waits: Waits) -> None:
        """Connect to the workers of the role `sources`, as `peers` come to know them, from `start` on."""
        self._peers = peers
        self._sources = sources
        self._transports = transports
        self._waits = waits
        self._done: dict[WorkerId, int] = {}
        self._tasks = OwnedTasks()

    def start(self, target: npt.NDArray[np.uint8]) -> None:
        """Begin, if any transport is the better for it; pulls will go into `target`."""
        if self._transports.can_warm_up:
            self._tasks.start(self._follow(target), name="warm-ups")

    async def aclose(self) -> None:
        """Stop."""
        await self._tasks.aclose()

    async def _follow(self, target: npt.NDArray[np.uint8]) -> None:
        while True:
            record = self._next()
            if record is None:
                await self._peers.changed()
                continue
            self._done[record.worker_id] = record.epoch
            await self._warm_up(record, target)

    def _next(self) -> WorkerRecord | None:
        """Return a source that is not connected to yet, and forget those that are gone."""
        records = self._peers.roster.records(self._sources)
        live = {record.worker_id for record in records}
        self._done = {worker_id: epoch for worker_id, epoch in self._done.items() if worker_id in live}
        if len(self._done) >= _MOST:
            return None
        return next((record for record in records if self._done.get(record.worker_id) != record.epoch), None)

    async def _warm_up(self, record: WorkerRecord, target: npt.NDArray[np.uint8]) -> None:
        try:
            async with asyncio.timeout(self._waits.connect_s):
                await self._transports.warm_up(record.metadata, target)
        except (MeshError, TimeoutError) as error:
            telemetry.KV_WARM_UPS.labels(outcome="failed").inc()
            log.debug("transport.not_warm", worker_id=record.worker_id, error=str(error))
        except Exception:  # a transport's fault with one source: the others' turns still come
            telemetry.KV_WARM_UPS.labels(outcome="failed").inc()
            log.exception("transport.warm_up_failed", worker_id=record.worker_id)
        else:
            telemetry.KV_WARM_UPS.labels(outcome="done").inc()
