"""The port behind which every discovery store stands.

Laws:
    - a worker_id has at most one live record per namespace, that of its highest live epoch;
    - a watch begins with a snapshot and misses nothing after it: what does not fit into a watcher's buffer is replaced
      by a fresh snapshot, so a slow watcher neither blocks a registrant nor grows without bound;
    - a graceful stop is told apart from every other end: only the former means that the worker is gone. Any other
      delete may be the store's own trouble, and makes the worker suspect.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord

__all__ = ["Deleted", "Discovery", "DiscoveryEvent", "Put", "Registration", "Snapshot", "WorkerRecord"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every live record of the namespace; it replaces all that was known."""

    records: tuple[WorkerRecord, ...]
    """Sorted by worker_id."""


@dataclass(frozen=True, slots=True)
class Put:
    """A record came or changed."""

    record: WorkerRecord


@dataclass(frozen=True, slots=True)
class Deleted:
    """A record went."""

    worker_id: WorkerId
    epoch: Epoch
    graceful: bool
    """True: the worker stopped in good order and is gone. False: only its record is; it is suspect."""


DiscoveryEvent = Snapshot | Put | Deleted


class Registration(Protocol):
    """One incarnation's record in the store; whoever registered owns it and must `stop` it."""

    async def update(self, record: WorkerRecord) -> None:
        """Replace the record, or put it back if the store lost it.

        Raises: FixRequestError(INVALID_FIELD) if it is of another worker, epoch or namespace;
        ConflictError(STALE_EPOCH) if a higher epoch is live; NotKnownError(NOT_FOUND) after `stop`.
        """

    async def wait_registered(self) -> None:
        """Wait until the store has held the record once; not bounded here."""

    async def stop(self) -> None:
        """Say that the worker stopped, then delete the record: watchers remove it at once. Idempotent."""


class Discovery(Protocol):
    """Where workers say that they live, and routers hear of it."""

    async def register(self, record: WorkerRecord) -> Registration:
        """Put a record and keep it alive; a higher epoch takes the place of a lower one.

        Raises: ConflictError(STALE_EPOCH) if a higher epoch of this worker is live.
        """

    def watch(self, namespace: str) -> AsyncGenerator[DiscoveryEvent, None]:
        """Yield a Snapshot, then every change after it; ends when the store is closed. Close it with `aclosing`."""

    async def aclose(self) -> None:
        """End every watch and refuse further registrations. Idempotent."""
