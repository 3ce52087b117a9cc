"""What a graph's services are told beside their code: a YAML file, and `--Class.key=value` over it.

YourWorker:
  workers: 2            # kvmesh's own: workers, resources
  resources: {gpu: 1}
  greeting: hello       # everything else is the class's, as context.config
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.suggestions import suggestion
from kvmesh.runtime.yaml_text import RepeatedKeyError, load_yaml
from kvmesh.sdk.definitions import Resources, ServiceDefinition
from kvmesh.sdk.dependencies import Graph

_OWN = ("workers", "resources")
_MAX_WORKERS = 1024


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """One service as it is to run."""

    definition: ServiceDefinition
    """With the resources that were given."""
    workers: int
    values: Mapping[str, Any] = field(default_factory=dict)
    """What its class may read."""


def read_config(graph: Graph, *, file: Path | None, flags: Sequence[str]) -> tuple[ServiceConfig, ...]:
    """Return every service of a graph as it is to run, in the graph's order; flags are `Class.key=value`.

    Raises: FixRequestError(INVALID_FIELD) naming the file or the flag, the key and the fix.
    """
    given: dict[str, dict[str, Any]] = {one.cls.__name__: {} for one in graph.services}
    if file is not None:
        for name, values in _read(file).items():
            given[_known(graph, name, source=str(file))].update(_table(values, source=f"{file}: {name}"))
    for flag in flags:
        name, key, value = _split(flag)
        _put(given[_known(graph, name, source=f"--{flag}")], key, value, source=f"--{flag}")
    return tuple(_config(one, given[one.cls.__name__]) for one in graph.services)


def _config(definition: ServiceDefinition, given: dict[str, Any]) -> ServiceConfig:
    name = definition.cls.__name__
    workers = given.get("workers", definition.workers)
    if not isinstance(workers, int) or isinstance(workers, bool) or not 1 <= workers <= _MAX_WORKERS:
        raise _refusal(f"{name}.workers", f"{workers!r} is out of range: 1 to {_MAX_WORKERS}")
    resources = definition.resources
    if "resources" in given:
        try:
            resources = Resources.parse(_table(given["resources"], source=f"{name}.resources"))
        except ValueError as exc:
            raise _refusal(f"{name}.resources", str(exc)) from exc
    values = {key: value for key, value in given.items() if key not in _OWN}
    return ServiceConfig(replace(definition, resources=resources), workers, values)


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = load_yaml(file.read_text(encoding="utf-8"))
    except RepeatedKeyError as exc:
        raise _refusal(str(file), str(exc)) from exc
    except OSError as exc:
        raise _refusal(str(file), exc.strerror or str(exc)) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise _refusal(str(file), f"is not YAML: {' '.join(str(exc).split())}") from exc
    return _table(tree if tree is not None else {}, source=str(file))


def _table(value: Any, *, source: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _refusal(source, "must be a table of keys and values")
    return value


def _split(flag: str) -> tuple[str, str, Any]:
    path, separator, text = flag.partition("=")
    name, dot, key = path.partition(".")
    if not separator or not dot or not key:
        raise _refusal(f"--{flag}", "is not --Class.key=value, e.g. --YourWorker.workers=2")
    try:
        return name, key, load_yaml(text)
    except RepeatedKeyError as exc:
        raise _refusal(f"--{flag}", str(exc)) from exc
    except yaml.YAMLError:
        return name, key, text


def _put(values: dict[str, Any], key: str, value: Any, *, source: str) -> None:
    *tables, last = key.split(".")
    for name in tables:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise _refusal(source, f"{name} is a value and no table")
    values[last] = value


def _known(graph: Graph, name: str, *, source: str) -> str:
    service = graph.service(name)
    if service is None:
        names = [one.cls.__name__ for one in graph.services]
        raise _refusal(source, f"no service of this graph is called {name!r}; {suggestion(name, names)}")
    return service.cls.__name__


def _refusal(where: str, why: str) -> FixRequestError:
    return FixRequestError(Reason.INVALID_FIELD, f"{where}: {why}", field=where)
