"""Whether a worker can move KV, told to its readiness.

It cannot while the last transfer from every worker that it pulls from has failed: that of one of several is the other
side's trouble. A source that is gone does not count any more, nor does an epoch that has ended.
"""

from kvmesh.core.ids import WorkerId
from kvmesh.core.roster import WorkerRole
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.readiness import Part, Readiness


class KvPlane:
    """The transfers of one worker, by their ends."""

    def __init__(self, *, peers: Peers, sources: WorkerRole, readiness: Readiness) -> None:
        """Tell `readiness`, from `start` on; `sources` is the role that it pulls from."""
        self._peers = peers
        self._sources = sources
        self._readiness = readiness
        self._unserved = ""
        self._failed: dict[tuple[WorkerId, int], str] = {}
        """Why the last transfer failed, by source and epoch."""
        self._tasks = OwnedTasks()

    def start(self, *, unserved: str = "") -> None:
        """Begin; `unserved` says why nobody can pull from this worker, where that is what it is for."""
        self._unserved = unserved
        self._tasks.start(self._follow(), name="kv-plane")

    async def aclose(self) -> None:
        """Stop."""
        await self._tasks.aclose()

    def moved(self, worker_id: str, epoch: int) -> None:
        """Note a transfer from a worker that succeeded."""
        if self._failed.pop((WorkerId(worker_id), epoch), None) is not None:
            self._judge()

    def failed(self, worker_id: str, epoch: int, detail: str) -> None:
        """Note one that failed by every transport."""
        self._failed[WorkerId(worker_id), epoch] = detail
        self._judge()

    async def _follow(self) -> None:
        while True:
            self._judge()
            await self._peers.changed()

    def _judge(self) -> None:
        live = {(record.worker_id, int(record.epoch)) for record in self._peers.roster.records(self._sources)}
        self._failed = {source: detail for source, detail in self._failed.items() if source in live}
        is_lost = bool(live) and self._failed.keys() >= live
        detail = f"no blocks came from {', '.join(f'{name}: {why}' for (name, _), why in self._failed.items())}"
        self._readiness.set_lack(Part.KV_PLANE, self._unserved or (detail if is_lost else ""))
