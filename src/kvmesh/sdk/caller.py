"""What `depends` gives a served instance: another service's endpoints, called as its methods are."""

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from kvmesh.sdk.client import Client
from kvmesh.sdk.definitions import EndpointDefinition, ServiceDefinition, Unannotated

if TYPE_CHECKING:
    from kvmesh.sdk.runtime import Runtime


class EndpointCaller(Client):
    """Calls one endpoint: as the method is called, or by `generate`, `round_robin`, `random`, `direct`."""

    def __init__(self, runtime: "Runtime", service: ServiceDefinition, endpoint: EndpointDefinition) -> None:
        answer = endpoint.response_type
        is_message = isinstance(answer, type) and answer is not Unannotated and hasattr(answer, "model_fields")
        is_message = is_message or hasattr(answer, "DESCRIPTOR")
        super().__init__(
            runtime, service.namespace, service.component, endpoint.name, answer=answer if is_message else None
        )
        self._is_stream = endpoint.is_stream

    def __call__(self, request: Any, *, timeout_s: float | None = None) -> Any:
        """Return an async generator of the answers, or an awaitable of the one answer, as the method would."""
        return self._many(request, timeout_s) if self._is_stream else self._one(request, timeout_s)

    async def _many(self, request: Any, timeout_s: float | None) -> AsyncGenerator[Any, None]:
        async for answer in await self.generate(request, timeout_s=timeout_s):
            yield answer

    async def _one(self, request: Any, timeout_s: float | None) -> Any:
        async for answer in await self.generate(request, timeout_s=timeout_s):
            return answer
        raise AssertionError("a call that does not stream ends with an answer or an error")


class ServiceCaller:
    """Has an `EndpointCaller` per endpoint, by the names of the methods and of the endpoints."""

    def __init__(self, runtime: "Runtime", service: ServiceDefinition) -> None:
        self._service = service
        self._runtime = runtime
        for endpoint in service.endpoints:
            caller = EndpointCaller(runtime, service, endpoint)
            setattr(self, endpoint.method, caller)
            setattr(self, endpoint.name, caller)

    def worker_ids(self) -> list[str]:
        """Return the ids of the instances that take requests."""
        return [record.worker_id for record in self._runtime.workers(self._service.namespace, self._service.component)]

    def __getattr__(self, name: str) -> EndpointCaller:
        raise AttributeError(f"{self._service.address} has no endpoint {name!r}")
