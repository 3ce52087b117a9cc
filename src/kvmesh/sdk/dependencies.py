"""`depends` and `link`: which services call which, and which of them are served together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmesh.sdk.definitions import DeclarationError, ServiceDefinition, definition_of, definition_or_none

if TYPE_CHECKING:
    from kvmesh.sdk.caller import ServiceCaller


class Dependency:
    """A class attribute that, in a served instance, calls another service; see `depends`."""

    def __init__(self, service: ServiceDefinition) -> None:
        self.service = service
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        """Return the caller in a served instance; an attribute that the instance has itself goes before this."""
        if instance is None:
            return self
        from kvmesh.sdk.context import context  # noqa: PLC0415  # it names services, which name their dependencies

        if not context.is_served:
            cls = type(instance).__name__
            raise RuntimeError(
                f"{cls}.{self._name} calls {self.service.address}, and nothing is served here: in a unit test set a "
                f"stand-in, `instance.{self._name} = ...`, or use kvmesh.testing.sdk.serving"
            )
        caller: ServiceCaller = context.runtime.caller(self.service)
        instance.__dict__[self._name] = caller  # from now on it is the instance's own, also outside a request
        return caller


def depends(cls: type) -> Any:
    """Declare that this service calls another: `worker = depends(Worker)`, then `self.worker.generate(request)`.

    Serving a service serves what it depends on as well. Raises: DeclarationError if `cls` is no service.
    """
    return Dependency(definition_of(cls))


@dataclass(frozen=True, slots=True)
class Graph:
    """Services that are served together."""

    services: tuple[ServiceDefinition, ...]
    """What a service depends on comes before it."""

    def service(self, name: str) -> ServiceDefinition | None:
        """Return the service of this class name or component name."""
        return next((one for one in self.services if name in (one.cls.__name__, one.component)), None)


def link(*classes: type) -> Graph:
    """Return the graph of exactly these services; what else they depend on is to be served elsewhere.

    Raises: DeclarationError if one is no service, or has no connection to the others.
    """
    chosen = [definition_of(cls) for cls in classes]
    known = {definition.address for definition in chosen}
    calls = {one.address: {other.address for other in _called_by(one)} & known for one in chosen}
    for one in chosen:
        is_called = any(one.address in others for others in calls.values())
        if len(chosen) > 1 and not calls[one.address] and not is_called:
            raise DeclarationError(
                f"{one.cls.__name__} depends on none of the others, and none on it: add depends(...), or leave it out"
            )
    return _graph(chosen, within=known)


def graph_of(target: object) -> Graph:
    """Return the graph that is served for a class, with all that it depends on, or for a `link`.

    Raises: DeclarationError.
    """
    if isinstance(target, Graph):
        return target
    return _graph([definition_of(target)], within=None)


def _graph(roots: Sequence[ServiceDefinition], *, within: set[str] | None) -> Graph:
    ordered: dict[str, ServiceDefinition] = {}

    def add(definition: ServiceDefinition, path: tuple[str, ...]) -> None:
        if definition.address in path:
            raise DeclarationError(
                f"services depend on each other in a circle: {' -> '.join((*path, definition.address))}"
            )
        for other in _called_by(definition):
            if within is None or other.address in within:
                add(other, (*path, definition.address))
        taken = ordered.setdefault(definition.address, definition)
        if taken.cls is not definition.cls:
            raise DeclarationError(
                f"two classes are the component {definition.address}: rename one, @service(name=...)"
            )

    for root in roots:
        add(root, ())
    return Graph(tuple(ordered.values()))


def _called_by(definition: ServiceDefinition) -> list[ServiceDefinition]:
    found: dict[str, ServiceDefinition] = {}
    for base in reversed(definition.cls.__mro__):
        for value in vars(base).values():
            if isinstance(value, Dependency):
                latest = definition_or_none(value.service.cls) or value.service
                found[latest.address] = latest
    return list(found.values())
