"""`runtime.namespace(...).component(...).endpoint(...)`: names, until something is asked of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmesh.sdk.client import Client

if TYPE_CHECKING:
    from kvmesh.sdk.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace of components."""

    runtime: "Runtime"
    name: str

    def component(self, name: str) -> "Component":
        """Return the handle of a component."""
        return Component(self.runtime, self.name, name)


@dataclass(frozen=True, slots=True)
class Component:
    """A component, served here or elsewhere."""

    runtime: "Runtime"
    namespace: str
    name: str

    def endpoint(self, name: str) -> "Endpoint":
        """Return the handle of an endpoint."""
        return Endpoint(self, name)

    def worker_ids(self) -> list[str]:
        """Return the ids of the running instances that take requests."""
        return [record.worker_id for record in self.runtime.workers(self.namespace, self.name)]

    async def create_service(self) -> None:
        """Do nothing: a component is there once an instance of it runs. For code that was written to ask first."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint."""

    component: Component
    name: str

    async def client(self, *, answer: Any = None) -> Client:
        """Return a client; answers are dicts and plain values, or of the pydantic model `answer`."""
        component = self.component
        return Client(component.runtime, component.namespace, component.name, self.name, answer=answer)
