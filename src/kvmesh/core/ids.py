"""The identifiers of the mesh, as distinct types, so that one is never passed for another."""

from dataclasses import dataclass
from typing import NamedTuple, NewType

RequestId = NewType("RequestId", str)
"""UUIDv7 minted by the frontend; the only key of a request."""

WorkerId = NewType("WorkerId", str)
"""Stable name of a worker, `node/role/n`: it survives restarts."""

Epoch = NewType("Epoch", int)
"""Start time of one incarnation of a worker in ns since 1970, u64; the highest live epoch of a worker_id wins."""

RouterId = NewType("RouterId", str)
"""One router process; loads are reported per router_id."""

LeaseId = NewType("LeaseId", str)
"""Fence of one attempt at a task: new per attempt, never reused."""

LocalHash = NewType("LocalHash", int)
"""u64 hash of one full block's tokens, whatever precedes them."""

SequenceHash = NewType("SequenceHash", int)
"""u64 hash of a full block and all blocks before it."""


class AttemptKey(NamedTuple):
    """What reservations and tasks are keyed by: one attempt at one request.

    A tuple and no dataclass: every output token looks its request up by it, and a tuple is hashed without a call.
    """

    request_id: RequestId
    attempt: int
    """From 1; a retry elsewhere is the next number."""

    def __str__(self) -> str:
        return f"request {self.request_id}, attempt {self.attempt}"


@dataclass(frozen=True, slots=True, order=True)
class WorkerRank:
    """One data-parallel rank of a worker: the unit that holds a cache and a load of its own."""

    worker_id: WorkerId
    rank: int = 0
