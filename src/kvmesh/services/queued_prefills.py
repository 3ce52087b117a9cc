"""Prefills by the queue: whichever prefill worker leases the task computes it."""

import asyncio
from collections.abc import Callable

from kvmesh import telemetry
from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.waits import Waits
from kvmesh.services.channels import Channels
from kvmesh.services.peers import Peers
from kvmesh.services.prefill_submissions import PrefillSubmissions
from kvmesh.services.prefills import Patience
from kvmesh.services.queue_locator import QueueLocator
from kvmesh.v1 import generation_pb2, prefill_queue_pb2

log = telemetry.logger(__name__)

_QUEUE_LOST = frozenset({Reason.WORKER_LOST, Reason.DRAINING})
"""What says that the queue and not the task is the trouble."""
_RESUBMIT_S = 0.05
"""Between the loss of a queue and the next attempt: the channel finds out that nobody answers."""


class QueuedPrefills:
    """Submits one decode worker's tasks to the active queue; see `Prefills`."""

    reason = "remote"

    def __init__(
        self,
        *,
        peers: Peers,
        channels: Channels,
        waits: Waits,
        max_queue_depth: int | None,
        give_back: Callable[[generation_pb2.KvHandoff], None],
    ) -> None:
        """Give up a task that more than `max_queue_depth` are before; `give_back` frees a handoff that is nobody's."""
        self.depth = 0
        self._queues = QueueLocator(peers=peers, channels=channels)
        self._max_queue_depth = max_queue_depth
        self._submissions = PrefillSubmissions(channels=channels, waits=waits, give_back=give_back)

    async def aclose(self) -> None:
        """Cancel what is still submitted."""
        await self._submissions.aclose()

    async def compute(
        self, task: prefill_queue_pb2.PrefillTask, *, patience: Patience
    ) -> prefill_queue_pb2.TaskCompleted:
        """Submit to the active queue, and when that is lost, under the same key, to the one that takes its place."""
        loop = asyncio.get_running_loop()
        while True:
            address = self._queues.address()
            if address is None:
                raise TryElsewhereError(Reason.PREFILL_FAILED, "no prefill queue is known")
            try:
                return await self._submissions.complete(address, task, patience=patience, on_position=self._check_depth)
            except TryElsewhereError as error:
                if error.reason not in _QUEUE_LOST or not self._queues.has_other_than(address):
                    raise
                log.warning("queue.lost", request_id=task.request_id, address=address, error=error.message)
            patience.queued()
            if loop.time() + _RESUBMIT_S >= patience.due:
                raise TryElsewhereError(Reason.PREFILL_FAILED, "no prefill queue can be reached")
            await asyncio.sleep(_RESUBMIT_S)

    def _check_depth(self, position: int | None) -> None:
        self.depth = position or 0
        if self._max_queue_depth is not None and self.depth > self._max_queue_depth:
            self.depth = 0  # known only from the queue's answers: the next request asks again
            raise TryElsewhereError(Reason.QUEUE_FULL, f"{position} tasks wait before this one")
