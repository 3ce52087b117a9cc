"""What a declared class is to the mesh: frozen, and found by `definition_of`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESERVED_NAMES = frozenset({"worker_ids"})
"""What a caller that `depends` gives has beside the endpoints, so that none may be called that."""


class DeclarationError(TypeError):
    """A class is declared in a way that cannot be served; the text has the fix."""


class Unannotated:
    """Stands for the answer of an endpoint that does not say what it answers."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker needs of its machine."""

    gpu: int | None = None
    """GPUs of its own; None = it does not say, and sees those that the process that starts it sees."""
    others: Mapping[str, str] = field(default_factory=dict)
    """`cpu` and `memory`, as a scheduler of containers reads them; nothing here goes by them."""

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Resources":
        """Read what `resources` of a service says. Raises: ValueError."""
        unknown = sorted(set(given) - {"cpu", "memory", "gpu"})
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of cpu, memory, gpu")
        gpu = given.get("gpu")
        if gpu is not None and not (str(gpu).isdecimal() and int(gpu) <= 1024):
            raise ValueError(f"gpu {gpu!r} is no number of GPUs")
        others = {key: str(value) for key, value in given.items() if key != "gpu"}
        return cls(None if gpu is None else int(gpu), others)


@dataclass(frozen=True, slots=True)
class EndpointDefinition:
    """One endpoint."""

    name: str
    """As clients call it."""
    method: str
    """As the class calls it."""
    is_stream: bool
    """It yields answers."""
    is_blocking: bool
    """It is a plain function, which runs in a thread."""
    request_type: Any
    response_type: Any
    """Of one answer; `Unannotated` where the method does not say."""
    doc: str


@dataclass(frozen=True, slots=True, eq=False)
class ServiceDefinition:
    """One declared class."""

    cls: type
    namespace: str
    component: str
    endpoints: tuple[EndpointDefinition, ...]
    """By name."""
    hooks: Mapping[str, tuple[str, ...]]
    """Names of methods by when they run: `on_start`, `on_shutdown`."""
    resources: Resources
    workers: int

    @property
    def address(self) -> str:
        """namespace/component."""
        return f"{self.namespace}/{self.component}"

    def endpoint(self, name: str) -> EndpointDefinition | None:
        """Return the endpoint of this name."""
        return next((endpoint for endpoint in self.endpoints if endpoint.name == name), None)


def definition_or_none(cls: object) -> ServiceDefinition | None:
    """Return what `@service` made of a class; None where it is not declared."""
    definition = getattr(cls, "__kvmesh_service__", None)
    return definition if isinstance(definition, ServiceDefinition) else None


def definition_of(cls: object) -> ServiceDefinition:
    """Return what `@service` made of a class. Raises: DeclarationError where it is not declared."""
    definition = definition_or_none(cls)
    if definition is None:
        name = getattr(cls, "__name__", repr(cls))
        raise DeclarationError(f"{name} is no service: put @service(namespace=...) on the class")
    return definition
