"""Who a worker is, for all of its services."""

import time
from dataclasses import dataclass

from kvmesh.core.ids import Epoch, WorkerId


@dataclass(slots=True)
class WorkerIdentity:
    """One incarnation of a worker and where it is reached."""

    worker_id: WorkerId
    epoch: Epoch
    address: str = ""
    """host:port of its gRPC server: set when it listens, before anybody hears of the worker."""

    @property
    def agent_name(self) -> str:
        """Of what transports make public names: unique per epoch, so that a restarted worker is not its predecessor."""
        return f"{self.worker_id}@{self.epoch}"


def new_epoch() -> Epoch:
    """Return the epoch of an incarnation that starts now."""
    return Epoch(time.time_ns())
