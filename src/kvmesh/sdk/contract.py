"""The contract of a component: a .proto file made of its declaration, and what serves and calls it by that.

    component `ns/Name`  ->  file sdk/ns/name.proto, package sdk.ns.name, service Name with one rpc per endpoint

Every field of one value is `optional`: whether it was given is known, so a missing one is refused by name and never
taken for 0 or "". Messages live in a pool of the contract's own, so that two components may have types of one name.
"""

import base64
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from inspect import getdoc
from typing import Any

from google.api import annotations_pb2, http_pb2
from google.protobuf import (
    descriptor_pb2,
    duration_pb2,
    empty_pb2,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    SourceCodeInfo,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from kvmesh.sdk.definitions import DeclarationError, ServiceDefinition
from kvmesh.sdk.proto_types import FieldType, field_type, message_of
from kvmesh.wire.comments import comments_of

_ANNOTATIONS = annotations_pb2.DESCRIPTOR.name
_FIELD = FieldDescriptorProto
_GIVEN: dict[str, FileDescriptor] = {
    module.DESCRIPTOR.name: module.DESCRIPTOR
    for module in (
        annotations_pb2, descriptor_pb2, duration_pb2, empty_pb2, http_pb2, struct_pb2, timestamp_pb2, wrappers_pb2,
    )
}  # fmt: skip
"""Files that every process of the mesh has: they do not travel with a contract."""
_MAX_BYTES = 1 << 20
"""Of a contract; one of a hundred types has about 20 KiB."""
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MESSAGE_PATH, _FIELD_PATH, _SERVICE_PATH, _METHOD_PATH = 4, 2, 6, 2
"""Numbers of the fields of descriptors, as paths of comments have them."""


@dataclass(frozen=True, slots=True)
class Contract:
    """One component's contract."""

    files: tuple[FileDescriptorProto, ...]
    """What it needs beside google's, in order; the last is its own."""
    service: ServiceDescriptor

    @property
    def file(self) -> FileDescriptorProto:
        """The component's own file."""
        return self.files[-1]

    def encode(self) -> str:
        """Return it as text, for a record in discovery."""
        return base64.b64encode(zlib.compress(FileDescriptorSet(file=self.files).SerializeToString())).decode("ascii")


def rest_path(namespace: str, component: str, endpoint: str) -> str:
    """Return where an endpoint is reached over HTTP."""
    return f"/sdk/v1/{namespace}/{component}/{endpoint}"


@cache
def contract_of(definition: ServiceDefinition) -> Contract:
    """Return the contract of a service. Raises: DeclarationError."""
    return _Builder(definition).build()


def decode_contract(text: str) -> tuple[ServiceDescriptor, dict[str, str]]:
    """Return what `Contract.encode` wrote, and the comments by full name. Raises: ValueError."""
    try:
        files = FileDescriptorSet.FromString(_inflate(base64.b64decode(text, validate=True))).file
        pool = _pool_of(files)
        service = files[-1].package + "." + files[-1].service[0].name
        return pool.FindServiceByName(service), comments_of(files[-1])
    except Exception as exc:  # a record is anybody's text: base64, zlib and protobuf each fail in their own way
        raise ValueError(f"this is no contract: {exc}") from exc


def _inflate(data: bytes) -> bytes:
    """Return what was compressed, in bounded memory: a few bytes of a stranger's can stand for gigabytes."""
    inflater = zlib.decompressobj()
    found = inflater.decompress(data, _MAX_BYTES)
    if not inflater.eof:
        raise ValueError(f"it is cut off, or longer than {_MAX_BYTES} bytes")
    return found


class _Builder:
    """Makes one contract."""

    def __init__(self, definition: ServiceDefinition) -> None:
        self._definition = definition
        self._cls = definition.cls.__name__
        part = _snake(definition.component)
        space = definition.namespace.replace("-", "_").lower()
        self._file = FileDescriptorProto(
            name=f"sdk/{space}/{part}.proto", package=f"sdk.{space}.{part}", syntax="proto3", dependency=[_ANNOTATIONS]
        )
        self._models: dict[type[BaseModel], str] = {}
        self._names = {definition.component}
        self._others: dict[str, FileDescriptor] = {}

    def build(self) -> Contract:
        service = self._file.service.add(name=self._definition.component)
        self._comment((_SERVICE_PATH, 0), getdoc(self._definition.cls) or "")
        for index, endpoint in enumerate(self._definition.endpoints):
            method = service.method.add(
                name=endpoint.name,
                input_type=self._type_name(message_of(endpoint.request_type)),
                output_type=self._type_name(message_of(endpoint.response_type)),
            )
            if endpoint.is_stream:
                method.server_streaming = True
            rule = method.options.Extensions[annotations_pb2.http]
            rule.post = rest_path(self._definition.namespace, self._definition.component, endpoint.name)
            rule.body = "*"
            self._comment((_SERVICE_PATH, 0, _METHOD_PATH, index), endpoint.doc)
        files = (*_travelling(self._others.values()), self._file)
        if (size := sum(file.ByteSize() for file in files)) > _MAX_BYTES:
            raise DeclarationError(f"{self._cls}: a contract of {size} bytes is too long: up to {_MAX_BYTES}")
        try:
            service_descriptor = _pool_of(files).FindServiceByName(f"{self._file.package}.{service.name}")
        except TypeError as exc:  # what protobuf refuses in a file
            raise DeclarationError(f"{self._cls}: protobuf cannot have this, rename what it names: {exc}") from exc
        return Contract(files, service_descriptor)

    def _type_name(self, message: str | type[BaseModel] | type[Message]) -> str:
        if isinstance(message, str):
            name = message.rpartition(".")[2]
            self._need(next(file for file in _GIVEN.values() if name in file.message_types_by_name))
            return f".{message}"
        if issubclass(message, Message):
            descriptor: Any = message.DESCRIPTOR
            self._need(descriptor.file)
            return f".{descriptor.full_name}"
        return self._model(message)

    def _model(self, model: type[BaseModel]) -> str:
        known = self._models.get(model)
        if known is not None:
            return known
        name = re.sub(r"\W+", "_", model.__name__).strip("_")
        if name in self._names:
            raise DeclarationError(f"{self._cls}: two of its types are called {name}: rename one of the models")
        self._names.add(name)
        _check_names(model, name)
        full_name = self._models[model] = f".{self._file.package}.{name}"
        place = len(self._file.message_type)
        message = self._file.message_type.add(name=name)
        self._comment((_MESSAGE_PATH, place), _own_doc(model))
        for number, (field_name, info) in enumerate(model.model_fields.items(), start=1):
            found = field_type(info.annotation, info.metadata)
            self._add_field(message, field_name, number, found)
            self._comment((_MESSAGE_PATH, place, _FIELD_PATH, number - 1), _field_doc(info))
        _add_presence(message)
        return full_name

    def _add_field(self, message: DescriptorProto, name: str, number: int, found: FieldType) -> None:
        field = message.field.add(name=name, number=number, label=_FIELD.LABEL_OPTIONAL)
        if found.map_key is not None:
            entry = message.nested_type.add(name=f"{''.join(part.title() for part in name.split('_'))}Entry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, type=found.map_key, label=_FIELD.LABEL_OPTIONAL)
            value = entry.field.add(name="value", number=2, label=_FIELD.LABEL_OPTIONAL)
            self._set_type(value, found)
            field.type, field.label = _FIELD.TYPE_MESSAGE, _FIELD.LABEL_REPEATED
            field.type_name = f".{self._file.package}.{message.name}.{entry.name}"
            return
        self._set_type(field, found)
        if found.is_repeated:
            field.label = _FIELD.LABEL_REPEATED
        else:
            field.proto3_optional = True

    def _set_type(self, field: FieldDescriptorProto, found: FieldType) -> None:
        field.type = found.kind
        if found.message is not None:
            field.type_name = self._type_name(found.message)

    def _need(self, file: FileDescriptor) -> None:
        if file.name not in self._file.dependency:
            self._file.dependency.append(file.name)
        self._others[file.name] = file

    def _comment(self, path: tuple[int, ...], text: str) -> None:
        if text:
            location = SourceCodeInfo.Location(path=path, leading_comments=text)
            self._file.source_code_info.location.append(location)


def _check_names(model: type[BaseModel], name: str) -> None:
    """Refuse names that protobuf, or its JSON, cannot tell apart or write."""
    if not _IDENTIFIER.fullmatch(name):
        raise DeclarationError(f"{model.__name__}: a name of protobuf has letters of ASCII, digits and _: rename it")
    in_json: dict[str, str] = {}
    for field in model.model_fields:
        if not _IDENTIFIER.fullmatch(field):
            raise DeclarationError(
                f"{model.__name__}.{field}: a name of protobuf has letters of ASCII, digits and _: rename the field"
            )
        json_name = re.sub(r"_+(.?)", lambda match: match[1].upper(), field)
        other = in_json.setdefault(json_name, field)
        if other != field:
            raise DeclarationError(
                f"{model.__name__}: {other} and {field} are both {json_name!r} in JSON: rename one of the fields"
            )


def _add_presence(message: DescriptorProto) -> None:
    for field in message.field:
        if field.proto3_optional:
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field.name}")


def _field_doc(info: Any) -> str:
    default = ""
    if not info.is_required() and info.default is not PydanticUndefined and info.default is not None:
        default = f"Default: {info.default!r}."
    return " ".join(filter(None, (info.description, default)))


def _own_doc(model: type[BaseModel]) -> str:
    return getdoc(model) or "" if "__doc__" in vars(model) and model.__doc__ else ""


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _travelling(files: Iterable[FileDescriptor]) -> Iterator[FileDescriptorProto]:
    """Yield files that are not google's, what they import first."""
    seen: set[str] = set()

    def walk(file: FileDescriptor) -> Iterator[FileDescriptorProto]:
        if file.name in seen or file.name in _GIVEN:
            return
        seen.add(file.name)
        for other in file.dependencies:
            yield from walk(other)
        proto = FileDescriptorProto()
        file.CopyToProto(proto)
        yield proto

    for file in files:
        yield from walk(file)


def _pool_of(files: Iterable[FileDescriptorProto]) -> DescriptorPool:
    pool, added = DescriptorPool(), set[str]()

    def add(proto: FileDescriptorProto) -> None:
        if proto.name in added:
            return
        added.add(proto.name)
        for name in proto.dependency:
            if name not in own:
                known = FileDescriptorProto()
                _GIVEN[name].CopyToProto(known)
                add(known)
        pool.Add(proto)

    listed = list(files)
    own = {file.name for file in listed}
    for file in listed:
        add(file)
    return pool
