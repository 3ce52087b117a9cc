"""Python values <-> the messages of a contract, with errors that name the field by its path."""

from collections.abc import Callable
from typing import Any, Protocol

import orjson
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from kvmesh.core.errors import FixRequestError, MeshError, Reason
from kvmesh.sdk.definitions import Unannotated
from kvmesh.sdk.message_reading import value_of
from kvmesh.sdk.message_writing import assign, copy_message
from kvmesh.sdk.model_shape import shape_of
from kvmesh.sdk.proto_types import VALUE, WRAPPER_NAMES, message_of
from kvmesh.wire.validation import invalid


class Codec(Protocol):
    """One message type of a contract, as values of Python."""

    def encode(self, value: Any) -> bytes:
        """Return the message of a value. Raises: FixRequestError(INVALID_FIELD) with the field's path."""

    def decode(self, data: bytes) -> Any:
        """Return the value of a message. Raises: FixRequestError(INVALID_FIELD) with the field's path."""


def codec_of(descriptor: Descriptor, annotation: Any) -> Codec:
    """Return the codec of a message that is `annotation` in Python: a model, a protobuf message, a plain type."""
    known = None if annotation is Unannotated else message_of(annotation)
    if isinstance(known, type) and issubclass(known, Message):
        return _MessageCodec(known)
    if known is None or not isinstance(known, type):
        return PlainCodec(descriptor)
    return _ModelCodec(descriptor, known)


class PlainCodec:
    """Messages as dicts and lists: for who has no type for them."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._class = GetMessageClass(descriptor)

    def encode(self, value: Any) -> bytes:
        """See Codec.encode; takes a model, a dict, the text of a JSON object, or a message of this type."""
        message = self._class()
        is_json = isinstance(value, str) and message.DESCRIPTOR.full_name not in {VALUE, *WRAPPER_NAMES}
        assign(message, _load(value) if is_json else value)
        return message.SerializeToString()

    def decode(self, data: bytes) -> Any:
        """See Codec.decode."""
        return value_of(self._class.FromString(data))


class _MessageCodec:
    """A protobuf message of the author's own."""

    def __init__(self, cls: type[Message]) -> None:
        self._class = cls

    def encode(self, value: Any) -> bytes:
        if isinstance(value, Message):
            message = self._class()
            copy_message(message, value)
            return message.SerializeToString()
        fields = _load(value) if isinstance(value, str) else to_jsonable_python(value)
        try:
            return json_format.ParseDict(fields, self._class()).SerializeToString()
        except json_format.ParseError as exc:
            raise FixRequestError(Reason.INVALID_FIELD, str(exc)) from exc

    def decode(self, data: bytes) -> Any:
        return self._class.FromString(data)


class _ModelCodec:
    """A pydantic model."""

    def __init__(self, descriptor: Descriptor, model: type[BaseModel]) -> None:
        self._class = GetMessageClass(descriptor)
        self._model = model
        self._adapter: TypeAdapter[Any] = TypeAdapter(model)
        self._shape = shape_of(descriptor, model)

    def encode(self, value: Any) -> bytes:
        message = self._class()
        assign(message, value if isinstance(value, self._model) else self._checked(value))
        return message.SerializeToString()

    def decode(self, data: bytes) -> Any:
        return self._read(self._class.FromString(data))

    def _checked(self, value: Any) -> Any:
        if isinstance(value, Message):
            return self._read(value)
        if isinstance(value, str | bytes):
            return _validated(lambda: self._adapter.validate_json(value))
        fields = value.model_dump() if isinstance(value, BaseModel) else value
        return _validated(lambda: self._adapter.validate_python(fields))

    def _read(self, message: Message) -> Any:
        fields = value_of(message, self._shape)
        return _validated(lambda: self._adapter.validate_python(fields, by_alias=False, by_name=True))


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
