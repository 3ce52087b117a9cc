"""The port between a decode worker's remote prefills and the way by which prefill workers are asked for them."""

import asyncio
from typing import Protocol

from kvmesh.v1 import prefill_queue_pb2


class Patience:
    """How long a submitter waits: so long for a lease, anew when its task is queued again, and no longer than in all.

    A lease lives while its holder extends it, so a task that is leased is being computed: a long prompt takes its time.
    """

    def __init__(self, *, lease_s: float, total_s: float) -> None:
        """Begin to wait for a lease."""
        now = asyncio.get_running_loop().time()
        self._lease_s = lease_s
        self.end = now + max(total_s, 0.0)
        """When it ends at the latest."""
        self.is_leased = False
        self.due = min(now + lease_s, self.end)
        """When the wait ends, on the loop's clock, as things stand."""

    def leased(self) -> None:
        """Wait on, as the task is being computed."""
        self.is_leased, self.due = True, self.end

    def queued(self) -> None:
        """Wait for a lease again, if there was one."""
        if self.is_leased:
            self.is_leased = False
            self.due = min(asyncio.get_running_loop().time() + self._lease_s, self.end)


class Prefills(Protocol):
    """Has prefill workers compute tasks, by the queue or directly."""

    @property
    def reason(self) -> str:
        """How a decision for it is named in `PrefillDecision.reason`."""

    @property
    def depth(self) -> int:
        """Tasks that are known to wait before a new one."""

    async def compute(
        self, task: prefill_queue_pb2.PrefillTask, *, patience: Patience
    ) -> prefill_queue_pb2.TaskCompleted:
        """Wait for a task to be computed; the handoff is the caller's from then on. Cancelling gives the task up.

        Raises: OutOfTimeError(PREFILL_FAILED) when `patience` is over, else MeshError.
        """

    async def aclose(self) -> None:
        """Give up what runs, in bounded time."""
