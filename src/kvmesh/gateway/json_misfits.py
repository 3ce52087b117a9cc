"""JSON of the wrong type that protobuf's parser takes all the same, looked for before it is asked.

It reads what is false to Python ([], "", 0, false) as an empty message, booleans as numbers, booleans and fractions as
values of an enum, and of base64 text it leaves out what is none, and data with it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from kvmesh.gateway.json_expectations import expectation_of, has_form_of_its_own, wrapped_field

Misfit = tuple[str, str]
"""The path of a value and what it must be."""

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]*={0,2}")
_MAX_DEPTH = 99
"""Of messages within one another: as deep as the parser goes. JSON may go deeper than Python's calls may."""


def misfit_in(descriptor: Descriptor, value: Any) -> Misfit | None:
    """Return the first value of the wrong type that the parser would take; its path is "" for the whole value.

    Messages nested too deeply are found as well. What the parser refuses by itself need not be: unknown names, null
    within a list, a list for a map.
    """
    shape = _message_shape(descriptor)
    found = None if shape is None else _misfit_of(shape, value, 0)
    return found and (found[0].removeprefix("."), found[1])


@dataclass(frozen=True, slots=True)
class _Shape:
    """What one value must be."""

    expected: str
    is_misfit: Callable[[Any], bool]
    kind: Descriptor | None = None
    """The message it is, to look into."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A field: one value, a list or a map of them."""

    shape: _Shape
    is_repeated: bool


@lru_cache(maxsize=1024)
def _places(descriptor: Descriptor) -> Mapping[str, _Place]:
    """Return the fields that the parser is too free with, by both their names; the others are not looked at."""
    places: dict[str, _Place] = {}
    for field in descriptor.fields:
        kind = field.message_type
        is_map = kind is not None and kind.GetOptions().map_entry
        shape = _field_shape(kind.fields_by_name["value"] if is_map and kind is not None else field)
        if shape is not None:
            places[field.name] = places[field.json_name] = _Place(shape, field.is_repeated)
    return places


def _field_shape(field: FieldDescriptor) -> _Shape | None:
    if field.message_type is not None:
        return _message_shape(field.message_type)
    expected = expectation_of(field) or ""
    if field.cpp_type in {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}:
        return _Shape(expected, _is_bool)
    if field.enum_type is not None:
        return _Shape(expected, _is_no_enum_value)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _Shape(expected, _is_no_base64)
    return None


@lru_cache(maxsize=1024)
def _message_shape(kind: Descriptor) -> _Shape | None:
    wrapped = wrapped_field(kind)
    if wrapped is not None:
        return _field_shape(wrapped)
    return None if has_form_of_its_own(kind) else _Shape("must be a JSON object", _is_no_object, kind)


def _misfit_of(shape: _Shape, value: Any, depth: int) -> Misfit | None:
    """Paths are put together on the way back: a request without a fault costs none."""
    if shape.is_misfit(value):
        return "", shape.expected
    if shape.kind is None:
        return None
    if depth > _MAX_DEPTH:
        return "", f"nested too deeply: up to {_MAX_DEPTH} messages within one another"
    places = _places(shape.kind)
    for name, given in value.items():
        place = places.get(name)
        if place is None or given is None:  # null is "not set"
            continue
        found = (_misfit_of_any if place.is_repeated else _misfit_of)(place.shape, given, depth + 1)
        if found is not None:
            return f".{name}{found[0]}", found[1]
    return None


def _misfit_of_any(shape: _Shape, values: Any, depth: int) -> Misfit | None:
    keyed = enumerate(values) if isinstance(values, list) else values.items() if isinstance(values, dict) else ()
    for key, value in keyed:
        found = _misfit_of(shape, value, depth)
        if found is not None:
            return f"[{key}]{found[0]}", found[1]
    return None


def _is_no_object(value: Any) -> bool:
    return not isinstance(value, dict)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_no_enum_value(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, float) and not value.is_integer())


def _is_no_base64(value: Any) -> bool:
    return isinstance(value, str) and (not _BASE64.fullmatch(value) or len(value.rstrip("=")) % 4 == 1)
