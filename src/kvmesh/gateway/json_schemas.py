"""JSON Schema (2020-12, as OpenAPI 3.1 has it) of protobuf messages in the form in which REST routes write them."""

import re
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, OneofDescriptor

Schema = dict[str, Any]

_REFERENCE = "#/components/schemas/"
_JSON_NAN = ["NaN", "Infinity", "-Infinity"]
_NUMBER: Schema = {"anyOf": [{"type": "number"}, {"enum": _JSON_NAN}]}
_CPP = FieldDescriptor
_SCALARS: dict[int, Schema] = {
    _CPP.CPPTYPE_BOOL: {"type": "boolean"},
    _CPP.CPPTYPE_STRING: {"type": "string"},
    _CPP.CPPTYPE_FLOAT: _NUMBER,
    _CPP.CPPTYPE_DOUBLE: _NUMBER,
    _CPP.CPPTYPE_INT32: {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    _CPP.CPPTYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    # As text, since JavaScript and others have no such integers.
    _CPP.CPPTYPE_INT64: {"type": "string", "format": "int64", "pattern": "^-?[0-9]{1,19}$"},
    _CPP.CPPTYPE_UINT64: {"type": "string", "format": "uint64", "pattern": "^([0-9]{1,19}|1[0-9]{19})$"},
}
_BYTES: Schema = {"type": "string", "contentEncoding": "base64"}
_WELL_KNOWN: dict[str, Schema] = {
    "Any": {"type": "object", "properties": {"@type": {"type": "string"}}, "required": ["@type"]},
    "BoolValue": {"type": ["boolean", "null"]},
    "BytesValue": {**_BYTES, "type": ["string", "null"]},
    "DoubleValue": {"anyOf": [*_NUMBER["anyOf"], {"type": "null"}]},
    "Duration": {"type": "string", "pattern": r"^-?[0-9]{1,11}(\.[0-9]{1,9})?s$", "examples": ["1.5s"]},
    "Empty": {"type": "object", "additionalProperties": False},
    "FieldMask": {"type": "string"},
    "FloatValue": {"anyOf": [*_NUMBER["anyOf"], {"type": "null"}]},
    "Int32Value": {**_SCALARS[_CPP.CPPTYPE_INT32], "type": ["integer", "null"]},
    "Int64Value": {**_SCALARS[_CPP.CPPTYPE_INT64], "type": ["string", "null"]},
    "ListValue": {"type": "array", "items": {}},
    "StringValue": {"type": ["string", "null"]},
    "Struct": {"type": "object"},
    "Timestamp": {"type": "string", "format": "date-time"},
    "UInt32Value": {**_SCALARS[_CPP.CPPTYPE_UINT32], "type": ["integer", "null"]},
    "UInt64Value": {**_SCALARS[_CPP.CPPTYPE_UINT64], "type": ["string", "null"]},
    "Value": {},
}
_REQUIRED = re.compile(r"\bRequired(, [^.]+)?\.$")
"""How the comment of a field ends that every request must have: validation refuses what protobuf cannot."""


class Schemas:
    """The schemas of one document: what was asked for, and everything that those refer to."""

    def __init__(self, comments: Mapping[str, str]) -> None:
        """`comments` describe messages, fields and enums by their full names."""
        self._comments = comments
        self.components: dict[str, Schema] = {}
        """By full name."""

    def of_message(self, message: Descriptor) -> Schema:
        """Return the schema of a message: a reference, unless it has a form of its own in JSON."""
        if message.file.package == "google.protobuf" and message.name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[message.name])
        if message.full_name not in self.components:
            self.components[message.full_name] = {}  # a message may hold itself
            self.components[message.full_name] = self._described(self._object(message), message.full_name)
        return {"$ref": _REFERENCE + message.full_name}

    def is_required(self, field: FieldDescriptor) -> bool:
        """Tell whether the contract's words say that a request without this field is refused."""
        return _REQUIRED.search(self._comments.get(field.full_name, "")) is not None

    def has_required(self, message: Descriptor) -> bool:
        """Tell whether any of a message's fields is."""
        return any(map(self.is_required, message.fields))

    def of_field(self, field: FieldDescriptor) -> Schema:
        """Return the schema of what a field holds, its comment included."""
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            schema: Schema = {
                "type": "object",
                "additionalProperties": self._of_one(kind.fields_by_name["value"]),
            }
        elif field.is_repeated:
            schema = {"type": "array", "items": self._of_one(field)}
        else:
            schema = self._of_one(field)
        return self._described(schema, field.full_name)

    def _of_one(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None:
            return self.of_message(field.message_type)
        if field.enum_type is not None:
            return self._of_enum(field.enum_type)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return dict(_BYTES)
        return dict(_SCALARS[field.cpp_type])

    def _of_enum(self, enum: EnumDescriptor) -> Schema:
        if enum.full_name not in self.components:
            names = [value.name for value in enum.values]
            texts = ((name, self._comments.get(f"{enum.full_name}.{name}", "")) for name in names)
            lines = [f"- {name}: {text}" for name, text in texts if text]
            described = self._described({"type": "string", "enum": names}, enum.full_name)
            described["description"] = "\n".join([described.get("description", ""), *lines]).strip()
            self.components[enum.full_name] = described
        return {"$ref": _REFERENCE + enum.full_name}

    def _object(self, message: Descriptor) -> Schema:
        schema: Schema = {
            "type": "object",
            "properties": {field.name: self.of_field(field) for field in message.fields},
            "additionalProperties": False,
        }
        if self.has_required(message):
            schema["required"] = [field.name for field in message.fields if self.is_required(field)]
        choices = [_one_at_most(oneof) for oneof in message.oneofs if len(oneof.fields) > 1]
        return {**schema, "allOf": choices} if choices else schema

    def _described(self, schema: Schema, full_name: str) -> Schema:
        text = self._comments.get(full_name)
        return {**schema, "description": text} if text else schema


def _one_at_most(oneof: OneofDescriptor) -> Schema:
    set_ones: list[Schema] = [{"required": [field.name]} for field in oneof.fields]
    return {"oneOf": [*set_ones, {"not": {"anyOf": set_ones}}]}
