"""Which of several prefill queues is the active one: everybody finds the same by the same rule, and asks nobody.

The active queue is the one that has run longest of those that can be reached. All who use a queue hear of the same
records, so they agree; whoever cannot reach the first goes to the next, where no prefill worker may be attached yet,
and comes back when it can.
"""

import grpc

from kvmesh.services.channels import Channels
from kvmesh.services.peers import Peers


class QueueLocator:
    """Finds the queue for one component, over the channels that it uses."""

    def __init__(self, *, peers: Peers, channels: Channels) -> None:
        """Learn of queues by `peers`; what `channels` cannot reach is passed over."""
        self._peers = peers
        self._channels = channels

    def address(self) -> str | None:
        """Return where the active queue is served; None while none is known.

        While none can be reached it is the longest-running one, and the caller's own deadline decides.
        """
        known = self._peers.queue_addresses()
        reachable = (address for address in known if self._is_reachable(address))
        return next(reachable, known[0] if known else None)

    def has_other_than(self, address: str) -> bool:
        """Tell whether there is another queue to turn to."""
        return any(other != address for other in self._peers.queue_addresses())

    def _is_reachable(self, address: str) -> bool:
        """False once a connection failed, until one succeeds; asking makes the channel try again."""
        state = self._channels.get(address).get_state(try_to_connect=True)
        return state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE
