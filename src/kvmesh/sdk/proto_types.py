"""Python types as protobuf's: which type of the contract each annotation becomes.

| Python | protobuf |
|---|---|
| str, Enum of str, Literal of str, UUID, Path, Decimal, date, time, URLs | string |
| bool, float, bytes | bool, double, bytes |
| int | int64; with bounds int32, uint32 or uint64, the smallest that has room for them |
| datetime, timedelta | google.protobuf.Timestamp, google.protobuf.Duration |
| a pydantic model, a protobuf message | that message |
| list, set, tuple of one type | repeated |
| dict from str or int | map; with values of any type google.protobuf.Struct |
| Optional | the same, unset for None |
| Any, dict, list, other unions | google.protobuf.Value |
"""

import enum
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from uuid import UUID

import annotated_types
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import Message
from pydantic import BaseModel, RootModel
from pydantic.networks import AnyUrl

from kvmesh.sdk.definitions import DeclarationError, Unannotated

_T = FieldDescriptorProto
_TEXTS: tuple[type, ...] = (str, UUID, PurePath, Decimal, date, time, AnyUrl)
_PLAIN: tuple[tuple[type, FieldDescriptorProto.Type.ValueType], ...] = (
    (bool, _T.TYPE_BOOL),
    (float, _T.TYPE_DOUBLE),
    (bytes, _T.TYPE_BYTES),
)
VALUE = "google.protobuf.Value"
STRUCT = "google.protobuf.Struct"
EMPTY = "google.protobuf.Empty"
TIMESTAMP = "google.protobuf.Timestamp"
DURATION = "google.protobuf.Duration"
FREE_TYPES = frozenset({VALUE, STRUCT, "google.protobuf.ListValue"})
"""Messages that are any JSON."""
_SPANS: Mapping[type, str] = {datetime: TIMESTAMP, timedelta: DURATION}
_WRAPPERS: Mapping[Any, str] = {
    str: "google.protobuf.StringValue",
    int: "google.protobuf.Int64Value",
    float: "google.protobuf.DoubleValue",
    bool: "google.protobuf.BoolValue",
    bytes: "google.protobuf.BytesValue",
    None: EMPTY,
    type(None): EMPTY,
}
WRAPPER_NAMES = frozenset(_WRAPPERS.values()) - {EMPTY}
"""Messages that are one plain value."""
_INTEGERS = (
    (-(2**31), 2**31 - 1, _T.TYPE_INT32),
    (0, 2**32 - 1, _T.TYPE_UINT32),
    (-(2**63), 2**63 - 1, _T.TYPE_INT64),
    (0, 2**64 - 1, _T.TYPE_UINT64),
)


@dataclass(frozen=True, slots=True)
class FieldType:
    """The type of one field."""

    kind: FieldDescriptorProto.Type.ValueType
    message: str | type[BaseModel] | type[Message] | None = None
    """Of a message: its full name, or the pydantic model or protobuf class that it is."""
    is_repeated: bool = False
    map_key: FieldDescriptorProto.Type.ValueType | None = None
    """Of a map: the type of its keys; the rest is the type of its values."""


def message_of(annotation: Any) -> str | type[BaseModel] | type[Message]:
    """Return the message that a request or an answer of this type is: its full name, or its class.

    Raises: DeclarationError.
    """
    plain = _without_extras(annotation)[0]
    if plain is Unannotated or plain is Any or plain is list or get_origin(plain) is list:
        return VALUE
    if plain is dict or get_origin(plain) is dict:
        return STRUCT
    if plain in _WRAPPERS:
        return _WRAPPERS[plain]
    if isinstance(plain, type) and issubclass(plain, Message | BaseModel) and not issubclass(plain, RootModel):
        return plain
    raise DeclarationError(f"{_text(plain)} is no message: make it a pydantic.BaseModel")


def check_message(annotation: Any, *, at: str, is_request: bool = False) -> None:
    """Refuse, naming where, what no message can be made of. Raises: DeclarationError."""
    try:
        message = message_of(annotation)
        if is_request and isinstance(message, str) and message != STRUCT:
            raise DeclarationError(f"{_text(annotation)} is no request: make it a field of a pydantic.BaseModel")
        _check_fields(message, seen=set())
    except DeclarationError as exc:
        raise DeclarationError(f"{at}: {exc}") from exc


def field_type(annotation: Any, metadata: Sequence[Any] = ()) -> FieldType:
    """Return the type of a field; `metadata` are constraints beside the annotation. Raises: DeclarationError."""
    plain, inner = _without_extras(annotation)
    constraints = (*metadata, *inner)
    origin, arguments = get_origin(plain), get_args(plain)
    if origin in (Union, types.UnionType):
        rest = [argument for argument in arguments if argument is not type(None)]
        return field_type(rest[0], constraints) if len(rest) == 1 else FieldType(_T.TYPE_MESSAGE, VALUE)
    if origin is Literal:
        are_texts = all(isinstance(argument, str) for argument in arguments)
        return FieldType(_T.TYPE_STRING) if are_texts else FieldType(_T.TYPE_MESSAGE, VALUE)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _map_type(arguments)
    if isinstance(origin, type) and issubclass(origin, Collection):
        return _list_type(plain, arguments)
    return _plain_type(plain, constraints)


def may_be_none(annotation: Any) -> bool:
    """Tell whether a value of this type may be None."""
    plain = _without_extras(annotation)[0]
    if plain is Any or plain is object or plain is None or plain is type(None):
        return True
    if get_origin(plain) in (Union, types.UnionType):
        return any(map(may_be_none, get_args(plain)))
    if get_origin(plain) is Literal:
        return None in get_args(plain)
    is_root = isinstance(plain, type) and issubclass(plain, RootModel)
    return is_root and may_be_none(plain.model_fields["root"].annotation)


def _plain_type(plain: Any, constraints: Sequence[Any]) -> FieldType:
    if plain is Any or plain in (dict, list, tuple, set, object):
        return FieldType(_T.TYPE_MESSAGE, VALUE)
    if isinstance(plain, type):
        if issubclass(plain, RootModel):
            root = plain.model_fields["root"]
            return field_type(root.annotation, root.metadata)
        if issubclass(plain, BaseModel | Message):
            return FieldType(_T.TYPE_MESSAGE, plain)
        if found := _scalar_type(plain, constraints):
            return found
    raise DeclarationError(f"{_text(plain)} has no form in protobuf: use a pydantic model, or Any")


def _scalar_type(plain: type, constraints: Sequence[Any]) -> FieldType | None:
    if span := next((name for known, name in _SPANS.items() if issubclass(plain, known)), None):
        return FieldType(_T.TYPE_MESSAGE, span)
    if issubclass(plain, enum.Enum) and not issubclass(plain, int):
        are_texts = all(isinstance(member.value, str) for member in plain)
        return FieldType(_T.TYPE_STRING) if are_texts else FieldType(_T.TYPE_MESSAGE, VALUE)
    if issubclass(plain, int) and not issubclass(plain, bool):
        return FieldType(_integer_type(constraints))
    for known, of_protobuf in _PLAIN:
        if issubclass(plain, known):
            return FieldType(of_protobuf)
    return FieldType(_T.TYPE_STRING) if issubclass(plain, _TEXTS) else None


def _map_type(arguments: tuple[Any, ...]) -> FieldType:
    key, value = (field_type(argument) for argument in arguments)
    if key.kind not in (_T.TYPE_STRING, _T.TYPE_INT64, _T.TYPE_INT32, _T.TYPE_UINT32, _T.TYPE_UINT64, _T.TYPE_BOOL):
        raise DeclarationError(f"{_text(arguments[0])} cannot be the key of a map: use str or int")
    if value.message == VALUE and key.kind == _T.TYPE_STRING:
        return FieldType(_T.TYPE_MESSAGE, STRUCT)
    _refuse_none(arguments[1], value)
    if value.is_repeated or value.map_key is not None:
        raise DeclarationError("a map of lists or of maps has no form in protobuf: make its values a pydantic model")
    return FieldType(value.kind, value.message, map_key=key.kind)


def _list_type(plain: Any, arguments: tuple[Any, ...]) -> FieldType:
    items = {argument for argument in arguments if argument is not Ellipsis}
    if len(items) != 1:
        return FieldType(_T.TYPE_MESSAGE, VALUE)  # a tuple of several types
    item = items.pop()
    inner = field_type(item)
    _refuse_none(item, inner)
    if inner.is_repeated or inner.map_key is not None:
        raise DeclarationError(f"{_text(plain)}: a list of lists has no form in protobuf: make its items a model")
    return FieldType(inner.kind, inner.message, is_repeated=True)


def _refuse_none(item: Any, found: FieldType) -> None:
    """Refuse items that may be None, which protobuf has in a Value only."""
    if found.message != VALUE and may_be_none(item):
        raise DeclarationError(
            f"{item}: what is in a list or a map cannot be None in protobuf: use Any for it, or a model"
        )


def _integer_type(constraints: Sequence[Any]) -> FieldDescriptorProto.Type.ValueType:
    low: float = -(2**63)
    high: float = 2**63 - 1
    is_bounded = False
    for constraint in constraints:
        match constraint:
            case annotated_types.Ge(ge=bound):
                low, is_bounded = max(low, _number(bound)), True
            case annotated_types.Gt(gt=bound):
                low, is_bounded = max(low, _number(bound) + 1), True
            case annotated_types.Le(le=bound):
                high, is_bounded = _number(bound), True
            case annotated_types.Lt(lt=bound):
                high, is_bounded = _number(bound) - 1, True
            case _:
                continue
    if not is_bounded:
        return _T.TYPE_INT64
    return next((kind for least, most, kind in _INTEGERS if least <= low and high <= most), _T.TYPE_INT64)


def _number(bound: Any) -> float:
    return bound if isinstance(bound, int | float) else 0


def _check_fields(message: str | type[BaseModel] | type[Message], *, seen: set[type]) -> None:
    """Refuse a model with a field that has no form, however deep."""
    if isinstance(message, str) or not issubclass(message, BaseModel) or message in seen:
        return
    seen.add(message)
    for name, info in message.model_fields.items():
        try:
            found = field_type(info.annotation, info.metadata)
            if found.message is not None:
                _check_fields(found.message, seen=seen)
        except DeclarationError as exc:
            raise DeclarationError(f"{message.__name__}.{name}: {exc}") from exc


def _without_extras(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(annotation) is not Annotated:
        return annotation, ()
    plain, *extras = get_args(annotation)
    flat = [part for extra in extras for part in (getattr(extra, "metadata", None) or [extra])]
    return plain, tuple(flat)


def _text(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation)
