"""The exchanges of one processor: at most one per worker address, opened on first use."""

import asyncio

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.waits import Waits
from kvmesh.services.channels import Channels
from kvmesh.services.exchange_client import ExchangeClient
from kvmesh.services.local_calls import LocalServers
from kvmesh.v1 import decode_worker_pb2, decode_worker_pb2_grpc
from kvmesh.wire.validation import duration


class ExchangePool:
    """Opens, keeps and closes them."""

    def __init__(
        self,
        *,
        processor_id: str,
        channels: Channels,
        waits: Waits,
        merge_within_s: float = 0.0,
        local: LocalServers | None = None,
    ) -> None:
        """Open exchanges as `processor_id`, unique to this process: a second one would supersede the first.

        Args:
            processor_id: Who speaks.
            channels: The way to the workers.
            waits: The bounds.
            merge_within_s: How long busy workers may hold output of a request that streams already; 0 = never.
            local: Workers of this process, reached without a socket; None = there are none.
        """
        self._opening = decode_worker_pb2.ExchangeOpen(processor_id=processor_id, merge_within=duration(merge_within_s))
        self._channels = channels
        self._local = local or LocalServers()
        self._waits = waits
        self._open: dict[str, ExchangeClient] = {}
        self._lost: set[str] = set()
        """Whose exchange ended, and who was not seen connected since."""

    def reaches(self, address: str) -> bool:
        """Tell whether a request could be sent to a worker now, as far as is known; one that is not connected is asked.

        A worker of whom nothing is known yet counts as reached.
        """
        if self._local.channel(address) is not None:
            return True
        state = self._channels.get(address).get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            self._lost.discard(address)
            return True
        return address not in self._lost and state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE

    async def get(self, address: str) -> ExchangeClient:
        """Return the exchange with a worker. Raises: TryElsewhereError(WORKER_LOST) if it is not reached."""
        exchange = self._open.get(address)
        if exchange is not None:
            return exchange
        channel = self._local.channel(address) or await self._connected(address)
        exchange = self._open.get(address)  # another request may have opened it meanwhile
        if exchange is None:
            self._lost.discard(address)
            exchange = self._open[address] = ExchangeClient(
                decode_worker_pb2_grpc.DecodeWorkerStub(channel).Exchange(),
                opening=self._opening,
                waits=self._waits,
                on_end=lambda ended: self._forget(address, ended),
            )
        return exchange

    async def _connected(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        try:
            async with asyncio.timeout(self._waits.connect_s):
                await channel.channel_ready()
        except TimeoutError as exc:
            telemetry.WAIT_ENDED.labels(wait="connect_s").inc()
            raise TryElsewhereError(
                Reason.WORKER_LOST, f"{address} not reached within {self._waits.connect_s:g} s"
            ) from exc
        return channel

    async def aclose(self) -> None:
        """End every exchange."""
        for exchange in list(self._open.values()):
            await exchange.aclose()

    def _forget(self, address: str, ended: ExchangeClient) -> None:
        if self._open.get(address) is ended:
            del self._open[address]
            self._lost.add(address)
            self._lost.intersection_update(self._channels.addresses)
