"""Messages of a contract as values of Python: dicts, lists, datetimes and what google's types stand for."""

from collections.abc import Mapping
from datetime import UTC
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor

from kvmesh.sdk.model_shape import ModelShape, is_map, map_value
from kvmesh.sdk.proto_types import DURATION, EMPTY, FREE_TYPES, TIMESTAMP, WRAPPER_NAMES
from kvmesh.wire.validation import invalid

_EXACT = 2**53
"""Numbers of google.protobuf.Value are doubles: whole ones below this are integers in Python."""
_PLAIN = ModelShape()


def value_of(message: Any, shape: ModelShape = _PLAIN, path: str = "") -> Any:
    """Return a message as Python has it; fields that are not set are absent, or what `shape` makes of them.

    Raises: FixRequestError(INVALID_FIELD) naming, under `path`, a Value that is no JSON.
    """
    name = message.DESCRIPTOR.full_name
    if name == TIMESTAMP:
        return message.ToDatetime(tzinfo=UTC)  # an instant: what has no zone counts as UTC
    if name == DURATION:
        return message.ToTimedelta()
    if name in FREE_TYPES:
        try:
            return _whole_numbers(json_format.MessageToDict(message))
        except (ValueError, json_format.Error) as exc:
            raise invalid(path or "request", str(exc)) from exc
    if name in WRAPPER_NAMES:
        return message.value
    if name == EMPTY:
        return None
    found = {
        field.name: _field_value(field, value, shape, f"{path}.{field.name}" if path else field.name)
        for field, value in message.ListFields()
    }
    for field in message.DESCRIPTOR.fields:
        if field.name not in found and (make := shape.absent.get(field.full_name)) is not None:
            found[field.name] = make()
    return found


def _field_value(field: FieldDescriptor, value: Any, shape: ModelShape, path: str) -> Any:
    cls = shape.classes.get(field.full_name)

    def read(message: Any, at: str) -> Any:
        return value_of(message, shape, at) if cls is None else cls.FromString(message.SerializeToString())

    if is_map(field):
        items: Mapping[Any, Any] = value
        is_message = map_value(field).message_type is not None
        return {key: read(item, f"{path}.{key}") if is_message else item for key, item in items.items()}
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    if field.is_repeated:
        return [read(item, f"{path}[{index}]") for index, item in enumerate(value)]
    return read(value, path)


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    return [_whole_numbers(item) for item in value] if isinstance(value, list) else value
