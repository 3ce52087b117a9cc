"""What a served instance knows of where it runs: `context["runtime"]`, `context["component"]`, or as attributes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvmesh.core.errors import FixRequestError, Reason

if TYPE_CHECKING:
    from kvmesh.sdk.handles import Component
    from kvmesh.sdk.runtime import Runtime

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(slots=True)
class Place:
    """Where code runs: in a served instance, or in a program that only calls."""

    runtime: "Runtime"
    component: "Component | None" = None
    """The component that is served; None in a program that only calls."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What `-f` and `--Class.key=value` say for the class."""
    worker_id: str = ""
    request: Any = None
    """gRPC's context of the running request; None outside of one."""
    request_id: str = ""
    """Of the running request; "" outside of one."""


_place: ContextVar[Place | None] = ContextVar("kvmesh_place", default=None)


class Context:
    """Reads the place of the running task. As a mapping it has `runtime`, `component`, `config`, `worker_id`."""

    @property
    def is_served(self) -> bool:
        """Whether anything is served or connected here: not so where a unit test calls a class by itself."""
        return _place.get() is not None

    @property
    def runtime(self) -> "Runtime":
        """The mesh. Raises: LookupError where nothing is served."""
        return self._here.runtime

    @property
    def component(self) -> "Component":
        """The component that this instance is one of. Raises: LookupError where nothing is served."""
        component = self._here.component
        if component is None:
            raise LookupError("this program serves no component: it only calls others")
        return component

    @property
    def worker_id(self) -> str:
        """The instance's id. Raises: LookupError where nothing is served."""
        return self._here.worker_id

    @property
    def config(self) -> Mapping[str, Any]:
        """What `-f` and `--Class.key=value` say for this class. Raises: LookupError where nothing is served."""
        return self._here.config

    def config_as(self, model: type[_Model]) -> _Model:
        """Return the config as a model, checked. Raises: FixRequestError(INVALID_FIELD) naming the key."""
        try:
            return model.model_validate(dict(self.config))
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise FixRequestError(Reason.INVALID_FIELD, f"{key}: {first['msg']}", field=key) from exc

    @property
    def request_id(self) -> str:
        """The id of the running request, as the log and every component it comes to have it; "" outside of one."""
        place = _place.get()
        return place.request_id if place is not None else ""

    def time_remaining(self) -> float | None:
        """Return the seconds that the caller of the running request still waits; None = it does not say."""
        place = _place.get()
        if place is None or place.request is None:
            return None
        remaining: float | None = place.request.time_remaining()
        return remaining

    def __getitem__(self, key: str) -> Any:
        if key not in ("runtime", "component", "config", "worker_id"):
            raise KeyError(f"{key!r} is none of runtime, component, config, worker_id")
        return getattr(self, key)

    @property
    def _here(self) -> Place:
        place = _place.get()
        if place is None:
            raise LookupError(
                "there is no context: nothing is served here. In a test use kvmesh.testing.sdk.serving, or give the "
                "class what it needs"
            )
        return place


context = Context()
"""The one that is imported."""


@contextmanager
def placed(place: Place) -> Iterator[None]:
    """Run a block there."""
    before = _place.get()
    _place.set(place)
    try:
        yield
    finally:
        _place.set(before)  # and not by a token: a fixture of a test may end in another context than it began


def enter(place: Place) -> None:
    """Be there for the rest of the running task, which must be one that ends with what it was started for."""
    _place.set(place)


def current_runtime() -> "Runtime | None":
    """Return the runtime of the running task, if it has one."""
    place = _place.get()
    return place.runtime if place is not None else None
