"""Processor: the generator served to frontends of other processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING
from uuid import UUID

from kvmesh.services.event_responses import processor_response_of
from kvmesh.services.request_totals import RequestTotals
from kvmesh.v1 import processor_pb2, processor_pb2_grpc
from kvmesh.wire import validation
from kvmesh.wire.generation import Generator

if TYPE_CHECKING:
    from kvmesh.v1.processor_pb2_grpc import _ServicerContext as Context

_UUID_VERSION = 7


class Processor(processor_pb2_grpc.ProcessorServicer):
    """Serves frontends; the request's id is theirs."""

    def __init__(self, generator: Generator, *, totals: RequestTotals) -> None:
        """Serve `generator`, whose counts are `totals`; a caller without a deadline gets the generator's own."""
        self._generator = generator
        self._totals = totals

    async def Generate(
        self, request: processor_pb2.ProcessorGenerateRequest, context: "Context"
    ) -> AsyncIterator[processor_pb2.ProcessorGenerateResponse]:
        """See the contract."""
        events = self._generator.generate(
            request.request, timeout_s=context.time_remaining(), request_id=_request_id(request)
        )
        async with aclosing(events):
            async for event in events:
                yield processor_response_of(event)

    async def GetTotals(
        self, request: processor_pb2.GetTotalsRequest, context: "Context"
    ) -> processor_pb2.GetTotalsResponse:
        """See the contract."""
        now = asyncio.get_running_loop().time()
        return processor_pb2.GetTotalsResponse(
            counters=self._totals.to_proto(), latencies=self._totals.latencies(now=now)
        )


def _request_id(request: processor_pb2.ProcessorGenerateRequest) -> str:
    """Return the frontend's id in its one spelling. Raises: FixRequestError when it is no UUIDv7."""
    try:
        parsed = UUID(request.request_id)
    except ValueError as exc:
        raise validation.invalid("request_id", "required: the UUIDv7 that the frontend minted") from exc
    if parsed.version != _UUID_VERSION:
        raise validation.invalid("request_id", "must be a UUIDv7")
    return str(parsed)
