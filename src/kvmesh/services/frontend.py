"""Frontend: the door of the mesh. It reads the call; what is asked is checked and done behind the generator."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from kvmesh.core.errors import FixRequestError, MeshError, Reason
from kvmesh.services.event_responses import response_of
from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc, generation_pb2
from kvmesh.wire import validation
from kvmesh.wire.field_names import IN_GENERATE, IN_GENERATE_TEXT, fields_named
from kvmesh.wire.generation import Delta, Event, Generator

if TYPE_CHECKING:
    from kvmesh.v1.frontend_pb2_grpc import _ServicerContext as Context

DEFAULT_WATCH_INTERVAL_S = 1.0
MIN_WATCH_INTERVAL_S = 0.1
_MAX_WATCH_INTERVAL_S = 3600.0


class Frontend(frontend_pb2_grpc.FrontendServicer):
    """Serves clients."""

    def __init__(
        self,
        *,
        generator: Generator,
        topology: Callable[[], Awaitable[frontend_pb2.Topology]],
        request_timeout_s: float,
    ) -> None:
        """Open the door to `generator`; `request_timeout_s` bounds the calls of clients that set no deadline."""
        self._generator = generator
        self._topology = topology
        self._request_timeout_s = request_timeout_s
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End every watch, so that the server can stop. Idempotent."""
        self._closing.set()

    async def Generate(
        self, request: frontend_pb2.GenerateRequest, context: "Context"
    ) -> AsyncIterator[frontend_pb2.GenerateResponse]:
        """See the contract."""
        with fields_named(IN_GENERATE):
            async with aclosing(self._generate(request, context)) as events:
                async for event in events:
                    yield response_of(event, frontend_pb2.GenerateResponse)

    async def GenerateText(
        self, request: frontend_pb2.GenerateTextRequest, context: "Context"
    ) -> frontend_pb2.GenerateTextResponse:
        """See the contract."""
        _check_text_request(request)
        wanted = frontend_pb2.GenerateRequest(
            prompt=generation_pb2.Prompt(text=request.prompt),
            model=request.model,
            sampling=request.sampling,
            routing=request.routing,
            client_request_id=request.request_id,
        )
        pieces: list[str] = []
        finished: generation_pb2.Finished | None = None
        with fields_named(IN_GENERATE_TEXT):
            async with aclosing(self._generate(wanted, context)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        pieces += event.pieces
                    finished = event if isinstance(event, generation_pb2.Finished) else None
        if finished is None:  # a part must never pass for the whole
            raise MeshError(Reason.INTERNAL, "the generator ended without finished")
        response = frontend_pb2.GenerateTextResponse(worker_output="".join(pieces), request_id=request.request_id)
        if finished.reason != generation_pb2.FINISH_REASON_STOP:
            response.finish_reason = finished.reason
        return response

    async def ListModels(
        self, request: frontend_pb2.ListModelsRequest, context: "Context"
    ) -> frontend_pb2.ListModelsResponse:
        """See the contract."""
        return self._generator.models()

    async def GetTopology(
        self, request: frontend_pb2.GetTopologyRequest, context: "Context"
    ) -> frontend_pb2.GetTopologyResponse:
        """See the contract."""
        return frontend_pb2.GetTopologyResponse(topology=await self._topology())

    async def WatchTopology(
        self, request: frontend_pb2.WatchTopologyRequest, context: "Context"
    ) -> AsyncIterator[frontend_pb2.WatchTopologyResponse]:
        """See the contract."""
        interval_s = _watch_interval_s(request)
        while not self._closing.is_set():
            yield frontend_pb2.WatchTopologyResponse(topology=await self._topology())
            try:
                async with asyncio.timeout(interval_s):
                    await self._closing.wait()
            except TimeoutError:
                continue

    def _generate(self, request: frontend_pb2.GenerateRequest, context: "Context") -> AsyncGenerator[Event, None]:
        """Run the request under the id that its door minted, so that the reply's headers and the log name it alike."""
        remaining_s = context.time_remaining()
        return self._generator.generate(
            request,
            timeout_s=self._request_timeout_s if remaining_s is None else remaining_s,
            request_id=getattr(context, "request_id", None),
        )


def _check_text_request(request: frontend_pb2.GenerateTextRequest) -> None:
    """Refuse by this message's own field names what the generator would refuse by those of GenerateRequest."""
    if not request.prompt:
        raise FixRequestError(Reason.EMPTY_PROMPT, "", field="prompt")
    if len(request.request_id.encode()) > validation.MAX_CLIENT_ID_BYTES:
        raise validation.invalid("request_id", f"at most {validation.MAX_CLIENT_ID_BYTES} bytes")
    if request.sampling.HasField("logprobs"):
        raise validation.invalid("sampling.logprobs", "this answer has no place for them: use Frontend.Generate")


def _watch_interval_s(request: frontend_pb2.WatchTopologyRequest) -> float:
    if not request.HasField("interval"):
        return DEFAULT_WATCH_INTERVAL_S
    return validation.seconds(request.interval, path="interval", low=MIN_WATCH_INTERVAL_S, high=_MAX_WATCH_INTERVAL_S)
