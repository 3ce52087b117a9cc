"""What a field takes in JSON, in words for the person who sent something else."""

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_SCALARS = {
    FieldDescriptor.CPPTYPE_FLOAT: "must be a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "must be a number",
    FieldDescriptor.CPPTYPE_BOOL: "must be true or false",
}
_WELL_KNOWN = {
    "google.protobuf.Duration": 'must be seconds as text, e.g. "1.5s"',
    "google.protobuf.Timestamp": 'must be a time as text, e.g. "2030-01-31T12:00:00Z"',
}

_WRAPPERS = frozenset(
    f"google.protobuf.{name}Value"
    for name in ("Bool", "Bytes", "Double", "Float", "Int32", "Int64", "String", "UInt32", "UInt64")
)
_OWN_FORMS = (
    _WRAPPERS
    | _WELL_KNOWN.keys()
    | {f"google.protobuf.{name}" for name in ("Any", "FieldMask", "ListValue", "Struct", "Value")}
)


def wrapped_field(kind: Descriptor) -> FieldDescriptor | None:
    """Return the field that stands for the whole message in JSON; None for every message but the wrappers."""
    return kind.fields_by_name["value"] if kind.full_name in _WRAPPERS else None


def has_form_of_its_own(kind: Descriptor) -> bool:
    """Tell whether its JSON is not an object of its fields."""
    return kind.full_name in _OWN_FORMS


def expectation_of(field: FieldDescriptor) -> str | None:
    """Return what one value of this field must be; None where only the parser knows."""
    if field.cpp_type in _INTEGERS:
        low, high = _INTEGERS[field.cpp_type]
        return f"must be a whole number, {low} to {high}"
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return "must be base64 text" if field.type == FieldDescriptor.TYPE_BYTES else "must be text"
    if field.enum_type is not None:
        return f"must be one of {', '.join(value.name for value in field.enum_type.values)}"
    if field.message_type is not None:
        wrapped = wrapped_field(field.message_type)
        return expectation_of(wrapped) if wrapped is not None else _WELL_KNOWN.get(field.message_type.full_name)
    return _SCALARS.get(field.cpp_type)


def rivals_in(descriptor: Descriptor, value: dict[str, Any]) -> str | None:
    """Return what is wrong with an object that sets several fields of which one may be set; None if none does."""
    for oneof in descriptor.oneofs:
        given = [field.name for field in oneof.fields if {field.name, field.json_name} & value.keys()]
        if len(given) > 1:
            return f"set only one of {', '.join(given)}"
    return None
