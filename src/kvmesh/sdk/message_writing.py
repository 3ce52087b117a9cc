"""Values of Python as messages of a contract; what does not fit is refused by the path of its field."""

import base64
import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from pydantic import BaseModel, RootModel, TypeAdapter
from pydantic_core import to_jsonable_python

from kvmesh.sdk.model_shape import is_map, map_value
from kvmesh.sdk.proto_types import DURATION, EMPTY, FREE_TYPES, STRUCT, TIMESTAMP, VALUE, WRAPPER_NAMES
from kvmesh.wire.validation import invalid

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
_DATETIME, _TIMEDELTA = TypeAdapter(datetime), TypeAdapter(timedelta)


def assign(message: Message, value: Any, path: str = "") -> None:
    """Set a message to a value: a model, a dict, a message of its type, what google's types stand for or their JSON.

    Raises: FixRequestError(INVALID_FIELD) naming the field under `path`.
    """
    name = message.DESCRIPTOR.full_name
    target: Any = message
    value = _unwrapped(value)
    try:
        if isinstance(value, Message):
            copy_message(target, value, path)
        elif name == TIMESTAMP:
            _assign_timestamp(target, value)
        elif name == DURATION:
            _assign_duration(target, value)
        elif name in FREE_TYPES:
            plain = _json_of(value)
            if name == STRUCT and not isinstance(plain, dict):
                raise invalid(path or "request", "must be a JSON object")
            json_format.ParseDict(plain, target)
        elif name in WRAPPER_NAMES:
            target.value = _scalar(target.DESCRIPTOR.fields_by_name["value"], value)
        elif name != EMPTY:
            _fill(target, value, path)
    except (TypeError, ValueError, AttributeError, json_format.Error) as exc:
        raise invalid(path or "request", f"does not fit {name}: {exc}") from exc


def copy_message(target: Message, value: Message, path: str = "") -> None:
    """Set a message to another of its type, whichever pool that is of. Raises: FixRequestError(INVALID_FIELD)."""
    wanted, given = target.DESCRIPTOR.full_name, value.DESCRIPTOR.full_name
    if given != wanted:
        raise invalid(path or "request", f"a {given} is no {wanted}")
    target.ParseFromString(value.SerializeToString())


def _assign_timestamp(target: Any, value: Any) -> None:
    if not isinstance(value, str):
        target.FromDatetime(value)
        return
    try:
        target.FromJsonString(value)
    except ValueError:  # what pydantic writes of a time without a zone
        target.FromDatetime(_DATETIME.validate_python(value))


def _assign_duration(target: Any, value: Any) -> None:
    if not isinstance(value, str):
        target.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
        return
    try:
        target.FromJsonString(value)
    except ValueError:  # ISO 8601, as pydantic writes it
        target.FromTimedelta(_TIMEDELTA.validate_python(value))


def _fill(message: Any, value: Any, path: str) -> None:
    if isinstance(value, BaseModel):
        items = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, Mapping):
        items = dict(value)
    else:
        raise invalid(path or "request", f"a {type(value).__name__} is no {message.DESCRIPTOR.name}")
    fields = message.DESCRIPTOR.fields_by_name
    for name, item in items.items():
        at = f"{path}.{name}" if path else str(name)
        field = fields.get(name)
        if field is None:
            raise invalid(at, "unknown field")
        is_free = not field.is_repeated and field.message_type is not None and field.message_type.full_name == VALUE
        plain = _unwrapped(item)
        if plain is not None or is_free:  # None is a value of such a field, and no field of the others
            _set_field(message, field, plain, at)


def _set_field(message: Any, field: FieldDescriptor, item: Any, at: str) -> None:
    target = getattr(message, field.name)
    try:
        if is_map(field):
            _set_map(target, field, item, at)
        elif field.is_repeated:
            if isinstance(item, str | bytes | Mapping):
                raise TypeError(f"a {type(item).__name__} is no list")
            for index, value in enumerate(item):
                if field.message_type is not None:
                    assign(target.add(), value, f"{at}[{index}]")
                else:
                    target.append(_scalar(field, value))
        elif field.message_type is not None:
            target.SetInParent()
            assign(target, item, at)
        else:
            setattr(message, field.name, _scalar(field, item))
    except (TypeError, ValueError, AttributeError) as exc:
        raise invalid(at, str(exc)) from exc


def _set_map(target: Any, field: FieldDescriptor, item: Any, at: str) -> None:
    assert field.message_type is not None, "a map"
    key_field, value_field = field.message_type.fields_by_name["key"], map_value(field)
    for given, value in item.items():
        key = _scalar(key_field, given)
        if value_field.message_type is not None:
            assign(target[key], value, f"{at}.{key}")
        else:
            target[key] = _scalar(value_field, value)


def _scalar(field: FieldDescriptor, value: Any) -> Any:
    """Return what protobuf takes of a value, or of its form in JSON: whole numbers and bytes are text there."""
    value = _unwrapped(value)
    if field.type == FieldDescriptor.TYPE_STRING:
        return value if isinstance(value, str) else to_jsonable_python(value)
    if isinstance(value, str) and field.type == FieldDescriptor.TYPE_BYTES:
        plain = value.replace("-", "+").replace("_", "/")
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    if isinstance(value, str) and field.cpp_type in _INTEGERS:
        return int(value)
    return value


def _unwrapped(value: Any) -> Any:
    while isinstance(value, RootModel):
        value = value.root
    return value


def _json_of(value: Any) -> Any:
    plain = to_jsonable_python(value)
    _check_finite(plain)
    return plain


def _check_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_finite(item)
