"""What processors have counted: the one of this process, or all that discovery names, added up."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import grpc

from kvmesh.services.channels import Channels
from kvmesh.services.peers import Peers
from kvmesh.services.request_totals import RequestTotals
from kvmesh.v1 import frontend_pb2, processor_pb2, processor_pb2_grpc

_TIMEOUT_S = 1.0


class TotalsView(Protocol):
    """Looks at the totals of processors."""

    def now(self) -> frontend_pb2.TopologyCounters:
        """Return a new message with what is known without asking; `reservations` is left at 0."""

    def latencies(self) -> Sequence[processor_pb2.LatencySamples]:
        """Return what is known without asking of how long requests waited lately, by processor."""

    async def refresh(self) -> None:
        """Ask where asking is needed, in bounded time."""


class LocalTotals:
    """The processor of this process."""

    def __init__(self, totals: RequestTotals) -> None:
        """Show `totals`."""
        self._totals = totals

    def now(self) -> frontend_pb2.TopologyCounters:
        """See `TotalsView.now`."""
        return self._totals.to_proto()

    def latencies(self) -> Sequence[processor_pb2.LatencySamples]:
        """See `TotalsView.latencies`."""
        return (self._totals.latencies(now=asyncio.get_running_loop().time()),)

    async def refresh(self) -> None:
        """Nothing to ask."""


class RemoteTotals:
    """Every processor that discovery names; one that does not answer keeps the counts of its last answer."""

    def __init__(self, *, peers: Peers, channels: Channels) -> None:
        """Find processors by `peers`."""
        self._peers = peers
        self._channels = channels
        self._by_address: dict[str, processor_pb2.GetTotalsResponse] = {}

    def now(self) -> frontend_pb2.TopologyCounters:
        """See `TotalsView.now`: as old as the last refresh."""
        total = frontend_pb2.TopologyCounters()
        for answer in self._by_address.values():
            for field, value in answer.counters.ListFields():
                setattr(total, field.name, getattr(total, field.name) + value)
        return total

    def latencies(self) -> Sequence[processor_pb2.LatencySamples]:
        """See `TotalsView.latencies`: as old as the last refresh."""
        return [answer.latencies for answer in self._by_address.values()]

    async def refresh(self) -> None:
        """See `TotalsView.refresh`."""
        addresses = self._peers.processor_addresses()
        answers = await asyncio.gather(*(self._ask(address) for address in addresses))
        before = self._by_address
        self._by_address = {
            address: _without_latencies(before.get(address)) if answer is None else answer
            for address, answer in zip(addresses, answers, strict=True)
        }

    async def _ask(self, address: str) -> processor_pb2.GetTotalsResponse | None:
        stub = processor_pb2_grpc.ProcessorStub(self._channels.get(address))
        try:
            return await stub.GetTotals(processor_pb2.GetTotalsRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None


def _without_latencies(answer: processor_pb2.GetTotalsResponse | None) -> processor_pb2.GetTotalsResponse:
    """Keep the counts of a processor that does not answer; what it said of "lately" is over."""
    return processor_pb2.GetTotalsResponse(counters=answer.counters if answer is not None else None)
