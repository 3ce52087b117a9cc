"""Where settings come from: each source becomes flat dotted keys, a later source wins, and each key keeps its origin.

    defaults  <  file (TOML or YAML)  <  KVMESH_* environment  <  flags

Keys are checked against the tree before anything is merged, so that a misspelt one is reported with its source and
the nearest name, in the spelling of that source.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, TomlConfigSettingsSource
from pydantic_settings import SettingsError as UnreadableSourceError
from yaml import YAMLError

from kvmesh.runtime.yaml_text import load_yaml

Tree = TypeVar("Tree", bound=BaseSettings)

DEFAULT = "default"
FLAG = "flag"

_SERVICE_LINK = re.compile(
    r"(_[A-Z0-9]+)*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""What Kubernetes tells every pod about a Service whose name begins as our variables do, after that beginning."""
_SERVICE_URL = re.compile(r"(_[A-Z0-9]+)*_PORT=(tcp|udp|sctp)://.*")
"""The one of them, with its value, that somebody who means a setting may write as well."""

_KEY_AND_VALUE = re.compile(r"(?P<key>[\w.]+) = ('[^']*'|[^\s:=]+)(?= (?!=))")
"""How the refusal of one setting begins that names it itself, e.g. `waits.route_s = inf is out of range`."""


class SettingsError(Exception):
    """Settings that cannot be used; the text is for the person who wrote them, one line per fault."""


@dataclass(frozen=True, slots=True)
class LoadedSettings(Generic[Tree]):
    """The settings in force and where each comes from."""

    settings: Tree
    origins: Mapping[str, str]
    """Dotted key -> "default", "file PATH", "env NAME" or "flag"; entries of a table have keys of their own."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One value that a source gives for a dotted key."""

    value: Any
    origin: str
    spelling: str
    """The key as that source writes it."""


def load_tree(tree: type[Tree], *, config_file: Path | None, overrides: Mapping[str, Any]) -> LoadedSettings[Tree]:
    """Merge all sources into one `tree`. Raises: SettingsError."""
    leaves = dict(_leaves(tree))
    entries: dict[str, _Entry] = {}
    faults: list[str] = []
    for source in (_file_entries(tree, config_file), _env_entries(tree), _flag_entries(overrides)):
        for key, entry in source.items():
            if fault := _name_fault(key, entry, leaves):
                faults.append(fault)
            else:
                entries[key] = entry
    if not faults:
        try:
            settings = tree(**_nest(entries))
        except ValidationError as error:
            faults = [_value_fault(item, entries, leaves) for item in error.errors()]
        else:
            origins = dict.fromkeys(leaves, DEFAULT) | {key: entry.origin for key, entry in entries.items()}
            return LoadedSettings(settings, origins)
    raise SettingsError("\n".join(faults)) from None


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping by dotted key; empty mappings vanish."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _leaves(tree: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo | None]]:
    """Yield every dotted key of the tree; the field is None within a plain dataclass, which checks itself."""
    for name, info in tree.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, f"{prefix}{name}.")
        elif isinstance(kind, type) and is_dataclass(kind):
            yield from ((f"{prefix}{name}.{item.name}", None) for item in fields(kind))
        else:
            yield f"{prefix}{name}", info


def _file_entries(tree: type[BaseSettings], path: Path | None) -> dict[str, _Entry]:
    if path is None:
        return {}
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise SettingsError(f"{path}: a settings file ends in .toml, .yaml or .yml")
    if not path.is_file():
        raise SettingsError(f"{path}: no such settings file")
    try:
        data = TomlConfigSettingsSource(tree, path)() if path.suffix == ".toml" else _yaml_table(path)
    except (OSError, ValueError, YAMLError, RecursionError) as error:  # of TOML nested too deep, the last
        raise SettingsError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    origin = f"file {path}"
    sections = {leaf.rpartition(".")[0] for leaf in dict(_leaves(tree))}
    # In YAML a section without entries, e.g. all commented out, reads as null.
    return {
        key: _Entry(value, origin, key)
        for key, value in flatten(data).items()
        if value is not None or key not in sections
    }


def _yaml_table(path: Path) -> dict[str, Any]:
    data = load_yaml(path.read_text(encoding="utf-8"))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError("it holds no sections, as in `mesh: {decode: 4}`")
    return data


def _env_entries(tree: type[BaseSettings]) -> dict[str, _Entry]:
    prefix, delimiter = tree.model_config["env_prefix"], tree.model_config["env_nested_delimiter"] or ""
    names = {
        name.upper().removeprefix(prefix).replace(delimiter, ".").lower(): name
        for name, value in os.environ.items()
        if name.upper().startswith(prefix) and value and not _is_service_link(name, value, prefix)
    }
    # Names first, so that a misspelt one is reported even where the reader would skip it.
    entries = {key: _Entry(os.environ[name], f"env {name}", name) for key, name in names.items()}
    try:
        values = flatten(EnvSettingsSource(tree)())
    except UnreadableSourceError as error:
        raise SettingsError(f"{prefix}* environment: {error}; sections and tables are written as JSON") from error
    for key, value in values.items():
        name = next((name for known, name in names.items() if key == known or key.startswith(f"{known}.")), None)
        if name is not None:
            entries[key] = _Entry(value, f"env {name}", name)
            # A table given whole, as JSON, has become its entries.
            if key != (whole := name.upper().removeprefix(prefix).replace(delimiter, ".").lower()):
                entries.pop(whole, None)
    return entries


def _is_service_link(name: str, value: str, prefix: str) -> bool:
    """Tell whether Kubernetes set this variable, e.g. `KVMESH_PORT=tcp://10.0.0.1:8000` for a Service "kvmesh".

    No setting is written so: between section and name there are two underscores.
    """
    rest = name.removeprefix(prefix.rstrip("_"))
    return bool(_SERVICE_LINK.fullmatch(rest) or _SERVICE_URL.fullmatch(f"{rest}={value}"))


def _flag_entries(overrides: Mapping[str, Any]) -> dict[str, _Entry]:
    return {key: _Entry(value, FLAG, key) for key, value in flatten(overrides).items()}


def _name_fault(key: str, entry: _Entry, leaves: Mapping[str, FieldInfo | None]) -> str | None:
    """Return what is wrong with the name of a setting, with a close one or what its section has, or None."""
    is_table = {name for name, info in leaves.items() if info is not None and "dict" in str(info.annotation)}
    if key in leaves or any(key.startswith(f"{table}.") for table in is_table):
        return None
    members = [name for name in leaves if name.startswith(f"{key}.")]
    if members:
        return f"{entry.spelling} ({entry.origin}) is a section, not a setting: it has {', '.join(members)}"
    return f"{entry.spelling} ({entry.origin}) is not a setting; {_hint(key, leaves, origin=entry.origin)}"


def _hint(key: str, leaves: Mapping[str, FieldInfo | None], *, origin: str) -> str:
    known = difflib.get_close_matches(key, leaves, n=1)
    says = "the nearest is"
    if not known:
        known = [name for name in leaves if name.startswith(f"{key.partition('.')[0]}.")]
        says = "its section has"
    if not known:
        return "`kvmesh config show` lists all"
    if origin.startswith("env "):
        known = ["KVMESH_" + name.replace(".", "__").upper() for name in known]
    return f"{says} {', '.join(known)}"


def _nest(entries: Mapping[str, _Entry]) -> dict[str, Any]:
    """Undo `flatten`. A key has at most two dots of its own: what follows is the name of a table's entry."""
    nested: dict[str, Any] = {}
    for key, entry in entries.items():
        *sections, name = key.split(".", maxsplit=2)
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = entry.value
    return nested


def _value_fault(error: Any, entries: Mapping[str, _Entry], leaves: Mapping[str, FieldInfo | None]) -> str:
    """Return one of pydantic's findings in our words: the key, the value, its source, and what would do."""
    location = ".".join(str(part) for part in error["loc"])
    key = max((name for name in leaves if f"{location}.".startswith(f"{name}.")), key=len, default=location)
    entry = entries.get(location, entries.get(key))
    source = f" ({entry.origin})" if entry is not None else ""
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return _with_source(text, entries) if " = " in text else f"{key}{source}: {text}"
    value = f"{location} = {error['input']!r}{source}"
    if error["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{value} is out of range: {_range_text(leaves.get(key))}"
    return f"{value}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _with_source(text: str, entries: Mapping[str, _Entry]) -> str:
    """Return a text that begins `KEY = VALUE` with the source of that key behind the value."""
    found = _KEY_AND_VALUE.match(text)
    entry = entries.get(found["key"]) if found is not None else None
    if found is None or entry is None:
        return text
    return f"{text[: found.end()]} ({entry.origin}){text[found.end() :]}"


def _range_text(info: FieldInfo | None) -> str:
    """Say a field's range in words, e.g. `1 to 64`."""
    low, high = "", ""
    for bound in info.metadata if info is not None else ():
        match bound:
            case annotated_types.Ge(ge=limit):
                low = f"{limit}"
            case annotated_types.Gt(gt=limit):
                low = f"above {limit}"
            case annotated_types.Le(le=limit):
                high = f"to {limit}"
            case annotated_types.Lt(lt=limit):
                high = f"to below {limit}"
    return " ".join(part for part in (low, high) if part)
