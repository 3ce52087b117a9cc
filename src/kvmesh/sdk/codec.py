"""Python values <-> the messages of a contract, with errors that name the field by its path."""

from collections.abc import Callable, Collection, Mapping
from datetime import UTC, timedelta
from typing import Any, Protocol

import orjson
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from kvmesh.core.errors import FixRequestError, MeshError, Reason
from kvmesh.sdk.definitions import Unannotated
from kvmesh.sdk.proto_types import EMPTY, STRUCT, VALUE, message_of
from kvmesh.wire.validation import invalid

_WRAPPERS = {f"google.protobuf.{kind}Value" for kind in ("String", "Int64", "Double", "Bool", "Bytes")}
_TIMESTAMP, _DURATION, _LIST = "google.protobuf.Timestamp", "google.protobuf.Duration", "google.protobuf.ListValue"
_EXACT = 2**53
"""Numbers of google.protobuf.Value are doubles: whole ones below this are integers in Python."""


class Codec(Protocol):
    """One message type of a contract, as values of Python."""

    def encode(self, value: Any) -> bytes:
        """Return the message of a value. Raises: FixRequestError(INVALID_FIELD) with the field's path."""

    def decode(self, data: bytes) -> Any:
        """Return the value of a message. Raises: FixRequestError(INVALID_FIELD) with the field's path."""


def codec_of(descriptor: Descriptor, annotation: Any, *, required_lists: Collection[str] = ()) -> Codec:
    """Return the codec of a message that is `annotation` in Python: a model, a protobuf message, a plain type."""
    known = None if annotation is Unannotated else message_of(annotation)
    if isinstance(known, type) and issubclass(known, Message):
        return _MessageCodec(known)
    if known is None or not isinstance(known, type):
        return PlainCodec(descriptor)
    return _ModelCodec(descriptor, known, required_lists)


class PlainCodec:
    """Messages as dicts and lists: for who has no type for them."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._class = GetMessageClass(descriptor)

    def encode(self, value: Any) -> bytes:
        """See Codec.encode; takes a model, a dict, the text of a JSON object, or a message of this type."""
        message = self._class()
        if isinstance(value, Message):
            return value.SerializeToString()
        is_json = isinstance(value, str) and message.DESCRIPTOR.full_name not in {VALUE, *_WRAPPERS}
        _assign(message, _load(value) if is_json else value, "")
        return message.SerializeToString()

    def decode(self, data: bytes) -> Any:
        """See Codec.decode."""
        return _value_of(self._class.FromString(data))


class _MessageCodec:
    """A protobuf message of the author's own."""

    def __init__(self, cls: type[Message]) -> None:
        self._class = cls

    def encode(self, value: Any) -> bytes:
        if isinstance(value, self._class):
            return value.SerializeToString()
        fields = _load(value) if isinstance(value, str) else to_jsonable_python(value)
        try:
            return json_format.ParseDict(fields, self._class()).SerializeToString()
        except json_format.ParseError as exc:
            raise FixRequestError(Reason.INVALID_FIELD, str(exc)) from exc

    def decode(self, data: bytes) -> Any:
        return self._class.FromString(data)


class _ModelCodec:
    """A pydantic model."""

    def __init__(self, descriptor: Descriptor, model: type[BaseModel], required_lists: Collection[str]) -> None:
        self._class = GetMessageClass(descriptor)
        self._model = model
        self._adapter: TypeAdapter[Any] = TypeAdapter(model)
        self._required_lists = required_lists

    def encode(self, value: Any) -> bytes:
        message = self._class()
        _assign(message, value if isinstance(value, self._model) else self._checked(value), "")
        return message.SerializeToString()

    def decode(self, data: bytes) -> Any:
        fields = _value_of(self._class.FromString(data), self._required_lists)
        return _validated(lambda: self._adapter.validate_python(fields, by_alias=False, by_name=True))

    def _checked(self, value: Any) -> Any:
        if isinstance(value, Message):
            value = _value_of(value)
        if isinstance(value, str | bytes):
            return _validated(lambda: self._adapter.validate_json(value))
        fields = value.model_dump() if isinstance(value, BaseModel) else value
        return _validated(lambda: self._adapter.validate_python(fields))


def answer_bytes(codec: Codec, value: Any, *, endpoint: str) -> bytes:
    """Encode what an endpoint answered. Raises: MeshError(INTERNAL), for the log: the fault is not the caller's."""
    try:
        return codec.encode(value)
    except MeshError as exc:
        raise MeshError(Reason.INTERNAL, f"{endpoint} answered what its contract does not have: {exc.message}") from exc


def _validated(validate: Callable[[], Any]) -> Any:
    try:
        return validate()
    except ValidationError as exc:
        first, *rest = exc.errors(include_url=False, include_input=False)
        more = f" (and {len(rest)} more)" if rest else ""
        raise invalid(_path_of(first["loc"]) or "request", f"{first['msg']}{more}") from exc


def _path_of(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _load(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise FixRequestError(Reason.INVALID_FIELD, f"the request is not JSON: {exc}") from exc


def _assign(message: Message, value: Any, path: str) -> None:
    """Set a message to a value of Python."""
    name = message.DESCRIPTOR.full_name
    target: Any = message
    try:
        if name == _TIMESTAMP:
            target.FromDatetime(value)
        elif name == _DURATION:
            target.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
        elif name in (VALUE, STRUCT, _LIST):
            json_format.ParseDict(to_jsonable_python(value), target)
        elif name in _WRAPPERS:
            target.value = value
        elif name != EMPTY:
            _fill(target, value, path)
    except (TypeError, ValueError, AttributeError, json_format.ParseError) as exc:
        raise invalid(path or "request", f"does not fit {name}: {exc}") from exc


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
        if item is not None:
            _set_field(message, field, item, at)


def _set_field(message: Any, field: FieldDescriptor, item: Any, at: str) -> None:
    target = getattr(message, field.name)
    try:
        if is_map(field):
            value_field = _map_value(field)
            for key, value in item.items():
                if value_field.message_type is not None:
                    _assign(target[key], value, f"{at}.{key}")
                else:
                    target[key] = _scalar(value_field, value)
        elif field.is_repeated:
            for index, value in enumerate(item):
                if field.message_type is not None:
                    _assign(target.add(), value, f"{at}[{index}]")
                else:
                    target.append(_scalar(field, value))
        elif field.message_type is not None:
            target.SetInParent()
            _assign(target, item, at)
        else:
            setattr(message, field.name, _scalar(field, item))
    except (TypeError, ValueError, AttributeError) as exc:
        raise invalid(at, str(exc)) from exc


def _scalar(field: FieldDescriptor, value: Any) -> Any:
    return value if field.type != FieldDescriptor.TYPE_STRING or isinstance(value, str) else to_jsonable_python(value)


def _value_of(message: Any, required_lists: Collection[str] = ()) -> Any:
    """Return a message as Python has it: fields that are not set are absent."""
    name = message.DESCRIPTOR.full_name
    if name == _TIMESTAMP:
        return message.ToDatetime(tzinfo=UTC)  # an instant: what has no zone counts as UTC
    if name == _DURATION:
        return message.ToTimedelta()
    if name in (VALUE, STRUCT, _LIST):
        return _whole_numbers(json_format.MessageToDict(message))
    if name in _WRAPPERS:
        return message.value
    if name == EMPTY:
        return None
    found = {field.name: _field_value(field, value, required_lists) for field, value in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        if field.full_name in required_lists and field.name not in found:
            found[field.name] = {} if is_map(field) else []
    return found


def _field_value(field: FieldDescriptor, value: Any, required_lists: Collection[str]) -> Any:
    if is_map(field):
        is_message = _map_value(field).message_type is not None
        return {key: _value_of(item, required_lists) if is_message else item for key, item in value.items()}
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    return (
        [_value_of(item, required_lists) for item in value] if field.is_repeated else _value_of(value, required_lists)
    )


def is_map(field: FieldDescriptor) -> bool:
    """Tell whether a repeated field is the form of a map."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _map_value(field: FieldDescriptor) -> FieldDescriptor:
    assert field.message_type is not None, "a map"
    return field.message_type.fields_by_name["value"]


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    return [_whole_numbers(item) for item in value] if isinstance(value, list) else value
