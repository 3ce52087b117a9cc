"""Whether a decode worker can reach a prefill queue, told to its readiness.

The queue is wanted while there are prefill workers whom it could give tasks, or where a remote prefill is required: a
mesh without prefill workers lacks nothing.
"""

import asyncio

import grpc

from kvmesh.services.channels import Channels
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.readiness import Part, Readiness


class QueueLookout:
    """Looks at the connections of one decode worker to the queues that it knows."""

    def __init__(self, *, peers: Peers, channels: Channels, readiness: Readiness, required: bool) -> None:
        """Tell `readiness`, from `start` on; `required`: without prefill workers too."""
        self._peers = peers
        self._channels = channels
        self._readiness = readiness
        self._required = required
        self._tasks = OwnedTasks()
        self._looks: dict[str, asyncio.Task[None]] = {}
        """By address, while the queue is wanted."""
        self._unreachable: set[str] = set()
        """Whose last connection failed; what is still being tried counts as before."""

    def start(self) -> None:
        """Begin to look."""
        self._tasks.start(self._follow(), name="queue-lookout")

    async def aclose(self) -> None:
        """Stop looking."""
        await self._tasks.aclose()

    async def _follow(self) -> None:
        while True:
            is_wanted = self._required or self._peers.prefill_workers("") > 0
            known = self._peers.queue_addresses() if is_wanted else ()
            for address in self._looks.keys() - set(known):
                self._looks.pop(address).cancel()
                self._unreachable.discard(address)
            for address in set(known) - self._looks.keys():
                self._looks[address] = self._tasks.start(self._look(address), name=f"queue-lookout-{address}")
            if is_wanted and not known:
                self._readiness.set_lack(Part.QUEUE, "no prefill queue is known")
            else:
                self._judge()
            await self._peers.changed()

    async def _look(self, address: str) -> None:
        channel = self._channels.get(address)
        while True:
            state = channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                self._unreachable.discard(address)
            elif state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                self._unreachable.add(address)
            self._judge()
            await channel.wait_for_state_change(state)

    def _judge(self) -> None:
        is_lost = bool(self._looks) and self._unreachable >= self._looks.keys()
        listed = ", ".join(sorted(self._unreachable))
        self._readiness.set_lack(Part.QUEUE, f"no prefill queue can be reached at {listed}" if is_lost else "")
