"""`@service` and `@endpoint`: a plain class declared to be a component of the mesh.

Whatever is wrong with a declaration is told while its module is imported, with the fix. The decorators return what they
were given: the class can be made and its methods called as if they were not there.
"""

import inspect
import re
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from kvmesh.sdk.contract import contract_of
from kvmesh.sdk.definitions import (
    RESERVED_NAMES,
    DeclarationError,
    EndpointDefinition,
    Resources,
    ServiceDefinition,
    Unannotated,
    definition_or_none,
)
from kvmesh.sdk.proto_types import check_message

_Class = TypeVar("_Class", bound=type)
_Function = TypeVar("_Function", bound=Callable[..., Any])

_ENDPOINT = "__kvmesh_endpoint__"
_HOOK = "__kvmesh_hook__"
_NAMESPACE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
_STREAMS = (AsyncIterator, AsyncGenerator, AsyncIterable)
_ALIAS_KEYS = {"namespace", "enabled"}


class UnannotatedResultWarning(UserWarning):
    """An endpoint's result has no message of its own: other languages see google.protobuf.Value."""


def endpoint(name: str | None = None) -> Callable[[_Function], _Function]:
    """Declare a method to be an endpoint, called `name` or as the method is.

    It takes one annotated request: an async function returns the answer, an async generator yields answers. A plain
    function runs in a thread, and may block. Raises: DeclarationError with the fix.
    """
    if callable(name):
        raise DeclarationError(f"@endpoint on {_name_of(name)}: write @endpoint(), with parentheses")
    if name is not None and not _NAME.fullmatch(name):
        raise DeclarationError(f"endpoint name {name!r}: use letters, digits and _, a letter first")

    def declare(function: _Function) -> _Function:
        at = _name_of(function)
        if hasattr(function, _ENDPOINT):
            raise DeclarationError(f"{at} is an endpoint already: remove one of the two @endpoint()")
        if not inspect.isfunction(function):
            raise DeclarationError(f"{at} is no method: put @endpoint() on an `async def` of the class")
        if inspect.isgeneratorfunction(function):
            raise DeclarationError(f"{at} yields and must be async: write `async def {function.__name__}(self, ...)`")
        if not _is_async(function) and _is_async(inspect.unwrap(function)):
            raise DeclarationError(f"{at} is async, its decorator's wrapper is not: write `async def` there too")
        for taken in sorted(RESERVED_NAMES & {name, function.__name__}):
            raise DeclarationError(f"{at}: {taken!r} asks a dependency for its instances: rename the endpoint")
        _request_parameter(function)
        setattr(function, _ENDPOINT, name or function.__name__)
        return function

    return declare


def on_start(function: _Function) -> _Function:
    """Have a method run once the instance is made, before anybody hears of it. Async, without arguments."""
    return _hook(function, "on_start")


def on_shutdown(function: _Function) -> _Function:
    """Have a method run once the last request has ended, for `waits.drain_s` at most. Async, without arguments."""
    return _hook(function, "on_shutdown")


def service(
    namespace: str | None = None,
    *,
    name: str | None = None,
    resources: Mapping[str, Any] | None = None,
    workers: int = 1,
    dynamo: Mapping[str, Any] | None = None,
) -> Callable[[_Class], _Class]:
    """Declare a class to be the component `namespace`/`name`; its name is the class's unless another is given.

    `resources` are what one worker needs: `cpu`, `memory`, `gpu`; `workers` is how many are to run. `dynamo` is another
    way to give the namespace, for code written elsewhere. Raises: DeclarationError with the fix.
    """
    if isinstance(namespace, type):
        raise DeclarationError(f"@service on {namespace.__name__}: write @service(), with parentheses")

    def declare(cls: _Class) -> _Class:
        if definition_or_none(cls) is not None and "__kvmesh_service__" in vars(cls):
            raise DeclarationError(f"{cls.__name__} is a service already: remove one of the two @service(...)")
        component = name or cls.__name__
        if not _NAME.fullmatch(component):
            raise DeclarationError(f"component name {component!r}: use letters, digits and _, a letter first")
        if workers < 1:
            raise DeclarationError(f"{cls.__name__}: workers={workers} is below 1")
        definition = ServiceDefinition(
            cls=cls,
            namespace=_namespace(cls, namespace, dynamo),
            component=component,
            endpoints=_endpoints(cls),
            hooks={kind: _hooks(cls, kind) for kind in ("on_start", "on_shutdown")},
            resources=_resources(cls, resources or {}),
            workers=workers,
        )
        contract_of(definition)  # what has no form in protobuf is told now, and not when it is served
        cls.__kvmesh_service__ = definition  # type: ignore[attr-defined]  # the one thing that is added to the class
        return cls

    return declare


def _endpoints(cls: type) -> tuple[EndpointDefinition, ...]:
    found: dict[str, EndpointDefinition] = {}
    for attribute in dir(cls):
        function = inspect.getattr_static(cls, attribute)
        name = getattr(function, _ENDPOINT, None)
        if name is None:
            continue
        if name in found:
            raise DeclarationError(
                f"{cls.__name__}: {found[name].method} and {attribute} are both the endpoint {name!r}: rename one, "
                "@endpoint(name=...)"
            )
        found[name] = _endpoint(cls, function, name)
    if not found:
        raise DeclarationError(f"{cls.__name__} has no endpoint: put @endpoint() on a method")
    return tuple(found.values())


def _endpoint(cls: type, function: Callable[..., Any], name: str) -> EndpointDefinition:
    at = f"{cls.__name__}.{function.__name__}"
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as exc:
        raise DeclarationError(f"{at}: {exc}: define that type at the top of its module, above the class") from exc
    is_stream = inspect.isasyncgenfunction(function)
    request_type = hints[_request_parameter(function).name]
    response_type = _response_type(at, hints["return"], is_stream=is_stream) if "return" in hints else Unannotated
    if problem := _untyped(response_type, is_stream=is_stream):
        warnings.warn(f"{at} {problem}", UnannotatedResultWarning, stacklevel=4)
    check_message(request_type, at=f"{at}, request", is_request=True)
    check_message(response_type, at=f"{at}, answer")
    return EndpointDefinition(
        name=name,
        method=function.__name__,
        is_stream=is_stream,
        is_blocking=not _is_async(function),
        request_type=request_type,
        response_type=response_type,
        doc=inspect.getdoc(function) or "",
    )


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _response_type(at: str, annotation: Any, *, is_stream: bool) -> Any:
    if not is_stream:
        if get_origin(annotation) in _STREAMS:
            raise DeclarationError(f"{at} returns a stream: write it as an async generator, with `yield`")
        return annotation
    if get_origin(annotation) not in _STREAMS or not get_args(annotation):
        raise DeclarationError(f"{at} yields its answers: annotate it, -> AsyncIterator[YourResponse]")
    return get_args(annotation)[0]


def _untyped(response_type: Any, *, is_stream: bool) -> str | None:
    """Return why clients see no type, and the fix, where the author may think that they do."""
    said = "AsyncIterator[YourResponse]" if is_stream else "YourResponse"
    if response_type is Unannotated:
        return f"does not say what it answers, so its clients see google.protobuf.Value: annotate it, -> {said}"
    if get_origin(response_type) is list and get_args(response_type) != (Any,):
        return (
            "answers a list, which is no message, so its clients see google.protobuf.Value and every number in it "
            f"as a double: make the list a field of a pydantic.BaseModel, -> {said}"
        )
    return None


def _request_parameter(function: Callable[..., Any]) -> inspect.Parameter:
    at = _name_of(function)
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) != 2:
        raise DeclarationError(
            f"{at} must take one request: `async def {function.__name__}(self, request: YourRequest)`"
        )
    if parameters[1].annotation is inspect.Parameter.empty:
        raise DeclarationError(
            f"{at} does not say what its request is: annotate it, `{parameters[1].name}: YourRequest`, "
            "a pydantic model or a protobuf message"
        )
    return parameters[1]


def _hook(function: _Function, kind: str) -> _Function:
    at = _name_of(function)
    if not inspect.iscoroutinefunction(function):
        raise DeclarationError(f"{at} must be async: write `async def {function.__name__}(self)`")
    if len(inspect.signature(function).parameters) != 1:
        raise DeclarationError(f"{at} takes no arguments: write `async def {function.__name__}(self)`")
    setattr(function, _HOOK, kind)
    return function


def _hooks(cls: type, kind: str) -> tuple[str, ...]:
    names = [
        name
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
        if getattr(value, _HOOK, None) == kind
    ]
    return tuple(dict.fromkeys(names))


def _namespace(cls: type, namespace: str | None, alias: Mapping[str, Any] | None) -> str:
    unknown = set(alias or {}) - _ALIAS_KEYS
    if unknown:
        raise DeclarationError(f"{cls.__name__}: dynamo has no {sorted(unknown)[0]!r}: it may have a namespace")
    given = [value for value in (namespace, (alias or {}).get("namespace")) if value is not None]
    if len(set(given)) > 1:
        raise DeclarationError(f"{cls.__name__}: two namespaces are given, {given[0]!r} and {given[1]!r}: keep one")
    chosen = given[0] if given else "default"
    if not isinstance(chosen, str) or not _NAMESPACE.fullmatch(chosen):
        raise DeclarationError(f"{cls.__name__}: namespace {chosen!r}: use letters, digits, _ and -, a letter first")
    return chosen


def _resources(cls: type, resources: Mapping[str, Any]) -> Resources:
    try:
        return Resources.parse(resources)
    except ValueError as exc:
        raise DeclarationError(f"{cls.__name__}: resources: {exc}") from exc


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", function)).rpartition("<locals>.")[2]
