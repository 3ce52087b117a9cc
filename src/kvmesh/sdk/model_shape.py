"""What a model knows of its message and the message does not say.

A field that is absent: proto3 cannot say `empty`, nor None. So a required list or map is empty then, and what may be
None is None; anything else is missing, and refused by its name. And of a field that is a protobuf message: its class.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from pydantic import BaseModel

from kvmesh.sdk.definitions import DeclarationError
from kvmesh.sdk.proto_types import field_type, may_be_none


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Of one model, however deep; fields by their full names."""

    absent: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """What makes the value of a required field that its message does not have."""
    classes: Mapping[str, type[Message]] = field(default_factory=dict)
    """What is a protobuf message in the model too."""


def shape_of(descriptor: Descriptor, model: type[BaseModel]) -> ModelShape:
    """Return the shape of a model whose message this is."""
    absent: dict[str, Callable[[], Any]] = {}
    classes: dict[str, type[Message]] = {}
    seen: set[tuple[str, type[BaseModel]]] = set()

    def walk(descriptor: Descriptor, model: type[BaseModel]) -> None:
        if (descriptor.full_name, model) in seen:
            return
        seen.add((descriptor.full_name, model))
        for name, info in model.model_fields.items():
            known = descriptor.fields_by_name.get(name)
            if known is None:
                continue
            if info.is_required() and known.is_repeated:
                absent[known.full_name] = dict if is_map(known) else list
            elif info.is_required() and may_be_none(info.annotation):
                absent[known.full_name] = NoneType
            inner = map_value(known).message_type if is_map(known) else known.message_type
            with suppress(DeclarationError):  # a caller's own model may have fields that no contract could
                message = field_type(info.annotation, info.metadata).message
                if inner is None or not isinstance(message, type):
                    continue
                if issubclass(message, BaseModel):
                    walk(inner, message)
                else:
                    classes[known.full_name] = message

    walk(descriptor, model)
    return ModelShape(absent, classes)


def is_map(field: FieldDescriptor) -> bool:
    """Tell whether a repeated field is the form of a map."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def map_value(field: FieldDescriptor) -> FieldDescriptor:
    """Return the field that a map's values are."""
    assert field.message_type is not None, "a map"
    return field.message_type.fields_by_name["value"]
