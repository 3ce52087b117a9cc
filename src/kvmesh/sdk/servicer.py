"""A served instance as a gRPC service: one handler per endpoint, the request checked before the method sees it."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import structlog

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.sdk.codec import Codec, answer_bytes, codec_of
from kvmesh.sdk.context import Place, enter
from kvmesh.sdk.contract import Contract
from kvmesh.sdk.definitions import EndpointDefinition, ServiceDefinition
from kvmesh.sdk.endpoint_threads import EndpointThreads
from kvmesh.services.signal import Signal


class ComponentServicer:
    """Serves one instance; requests run in `place`."""

    def __init__(
        self,
        instance: object,
        definition: ServiceDefinition,
        contract: Contract,
        *,
        place: Place,
        is_draining: Callable[[], bool],
    ) -> None:
        """Refuse requests while `is_draining` says so."""
        self._running = 0
        self._ended = Signal()
        self._instance = instance
        self._definition = definition
        self._contract = contract
        self._place = place
        self._is_draining = is_draining
        self._threads = EndpointThreads(name=place.worker_id)

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return self._running

    async def wait_idle(self) -> None:
        """Wait until none runs; not bounded here."""
        while self._running:
            await self._ended.wait()

    def close(self) -> None:
        """Start nothing more in a thread. Idempotent."""
        self._threads.close()

    def add_to_server(self, server: Any) -> None:
        """Serve the endpoints there, as a generated function would."""
        handlers = {endpoint.name: self._handler(endpoint) for endpoint in self._definition.endpoints}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(self._contract.service.full_name, handlers),)
        )

    def _handler(self, endpoint: EndpointDefinition) -> Any:
        method = self._contract.service.methods_by_name[endpoint.name]
        requests = codec_of(method.input_type, endpoint.request_type)
        answers = codec_of(method.output_type, endpoint.response_type)
        name = f"{self._definition.address}/{endpoint.name}"
        call = getattr(self._instance, endpoint.method)
        if endpoint.is_blocking:
            call = partial(self._threads.run, call)
        if endpoint.is_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(call, answers, name), requests.decode, None)
        return grpc.unary_unary_rpc_method_handler(self._single(call, answers, name), requests.decode, None)

    def _single(self, call: Callable[[Any], Any], answers: Codec, name: str) -> Callable[[Any, Any], Any]:
        async def handle(request: Any, context: Any) -> bytes:
            with self._request(context):
                return answer_bytes(answers, await call(request), endpoint=name)

        return handle

    def _stream(self, call: Callable[[Any], Any], answers: Codec, name: str) -> Callable[[Any, Any], Any]:
        async def handle(request: Any, context: Any) -> AsyncIterator[bytes]:
            with self._request(context):
                async with aclosing(call(request)) as values:
                    async for value in values:
                        yield answer_bytes(answers, value, endpoint=name)

        return handle

    @contextmanager
    def _request(self, context: Any) -> Iterator[None]:
        if self._is_draining():
            raise TryElsewhereError(Reason.DRAINING, "")
        # For the task of this call, which ends with it. The id is the one that its log lines have.
        request_id = structlog.contextvars.get_contextvars().get("request_id", "")
        enter(replace(self._place, request=context, request_id=request_id))
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._ended.fire()
