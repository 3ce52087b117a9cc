"""A request message from the parts of an HTTP request: body, query parameters and path."""

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.gateway.json_messages import load_json, merge_json, new_message
from kvmesh.gateway.routes import HttpRule, field_at
from kvmesh.wire.validation import invalid

_LARGE_BODY_BYTES = 128 * 1024
"""From here on (milliseconds of parsing) a body is parsed off the loop."""
MAX_QUERY_PARAMETERS = 1000
"""Of one request."""
_JSON_VALUES = frozenset(f"google.protobuf.{name}" for name in ("Any", "Empty", "ListValue", "Struct", "Value"))
_BOOLEANS = {"true": True, "false": False}


async def bind_request(rule: HttpRule, *, path_values: Mapping[str, str], query: bytes, body: bytes) -> Message:
    """Return the request of `rule`'s method. Raises: FixRequestError(INVALID_FIELD) naming the field by its path."""
    if len(body) < _LARGE_BODY_BYTES:
        return _bind(rule, path_values, query, body)
    return await asyncio.to_thread(_bind, rule, path_values, query, body)


def _bind(rule: HttpRule, path_values: Mapping[str, str], query: bytes, body: bytes) -> Message:
    message = new_message(rule.method.input_type)
    if rule.body and body.strip():  # an empty body is an empty request
        if rule.body == "*":
            merge_json(load_json(body), message)
        else:
            merge_json({rule.body: load_json(body, path=rule.body)}, message)
    parameters = _query_values(rule, query)
    if parameters:
        merge_json(parameters, message)
    for field_path, text in path_values.items():  # last: the path is what was called
        field = field_at(rule.method.input_type, field_path)
        assert field is not None, "rules_of refuses such a template"
        tree: dict[str, Any] = {}
        _put(tree, field_path, _value_of(field, text))
        merge_json(tree, message)
    return message


def _query_values(rule: HttpRule, query: bytes) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError as exc:
        raise FixRequestError(Reason.INVALID_FIELD, "the query string is not percent-encoded UTF-8") from exc
    if len(pairs) > MAX_QUERY_PARAMETERS:
        raise FixRequestError(Reason.INVALID_FIELD, f"at most {MAX_QUERY_PARAMETERS} query parameters")
    tree: dict[str, Any] = {}
    bound = {variable.field_path for variable in rule.variables} | {rule.body}
    for name, text in pairs:
        if rule.body == "*":
            raise invalid(name, "takes no query parameters: everything is in the body")
        field = field_at(rule.method.input_type, name)
        if field is None:
            raise invalid(name, "unknown field")
        if name.partition(".")[0] in bound or name in bound:
            raise invalid(name, "already set by the path or the body")
        if is_structured(field):
            raise invalid(name, "is no single value: name one of its fields, as in parent.field=value, if it has any")
        _put(tree, name, _value_of(field, text), is_repeated=field.is_repeated)
    return tree


def _value_of(field: FieldDescriptor, text: str) -> Any:
    """Return the JSON value that a text of the path or the query stands for: all but true and false are texts there."""
    is_wrapped_boolean = field.message_type is not None and field.message_type.full_name == "google.protobuf.BoolValue"
    return _BOOLEANS.get(text, text) if field.type == FieldDescriptor.TYPE_BOOL or is_wrapped_boolean else text


def is_structured(field: FieldDescriptor) -> bool:
    """Tell whether it has no form as one text: Duration, Timestamp, FieldMask and the wrappers have."""
    kind = field.message_type
    return kind is not None and (kind.file.package != "google.protobuf" or kind.full_name in _JSON_VALUES)


def _put(tree: dict[str, Any], field_path: str, value: Any, *, is_repeated: bool = False) -> None:
    *parents, last = field_path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise invalid(field_path, f"given twice: {name} has a value already")
    if is_repeated:
        tree.setdefault(last, []).append(value)
    elif last in tree:
        raise invalid(field_path, "given twice")
    else:
        tree[last] = value
