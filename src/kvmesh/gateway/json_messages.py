"""JSON <-> protobuf messages, with errors that say where.

In: proto or JSON names. Out: proto names, and fields at their defaults too, in unary replies and on streams alike, so
that a reader of JSON never has to know which fields protobuf leaves out.
"""

from typing import Any, cast

import orjson
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.gateway.json_expectations import expectation_of, has_form_of_its_own, rivals_in
from kvmesh.gateway.json_misfits import misfit_in
from kvmesh.gateway.json_numbers import is_beyond_double, path_beyond_double
from kvmesh.gateway.routes import find_field
from kvmesh.wire.validation import invalid

_STRUCT = "google.protobuf.Struct"
_LINE_ENDS = [(end.encode(), b"\\u%04x" % ord(end)) for end in ("\x85", "\u2028", "\u2029")]


def load_json(body: bytes, *, path: str = "") -> Any:
    """Return the value of a JSON text, which is that of `path`. Raises: FixRequestError(INVALID_FIELD) saying where."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        if not is_beyond_double(exc.doc, exc.pos):
            raise FixRequestError(Reason.INVALID_FIELD, f"the body is not JSON: {exc}") from exc
        within = path_beyond_double(exc.doc)
        field = f"{path}.{within}".replace(".[", "[").strip(".")
        problem = f"the number is out of range at line {exc.lineno} column {exc.colno}"
        raise invalid(field or "body", problem) from exc


def new_message(descriptor: Descriptor) -> Message:
    """Return an empty message of this type."""
    return message_factory.GetMessageClass(descriptor)()


def merge_json(value: Any, message: Message) -> None:
    """Set what a JSON value says in `message`. Raises: FixRequestError(INVALID_FIELD) with the path of the field."""
    descriptor = cast(Descriptor, message.DESCRIPTOR)
    if not isinstance(value, dict) and (not has_form_of_its_own(descriptor) or descriptor.full_name == _STRUCT):
        raise FixRequestError(Reason.INVALID_FIELD, "the body must be a JSON object")
    misfit = misfit_in(descriptor, value)
    if misfit is not None:
        path, problem = misfit
        raise invalid(path or "body", problem)
    try:
        json_format.ParseDict(value, message)
    except (json_format.ParseError, TypeError) as exc:  # a TypeError from the parser's outermost message only
        own_form = has_form_of_its_own(descriptor)
        fault = ("body", _innermost(exc)) if own_form else _locate(descriptor, value, "")
        path, problem = fault or ("body", rivals_in(descriptor, value) or _innermost(exc))
        raise invalid(path, problem) from exc


def to_json(message: Message) -> bytes:
    """Return a message as JSON."""
    return orjson.dumps(to_dict(message))


def in_one_line(data: bytes) -> bytes:
    """Return JSON that is one line to every reader: Python's and others also end lines at U+0085, U+2028 and U+2029."""
    if data.isascii():
        return data
    for raw, escaped in _LINE_ENDS:
        data = data.replace(raw, escaped)
    return data


def to_dict(message: Message) -> dict[str, Any]:
    """Return a message as the value of its JSON."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _locate(descriptor: Descriptor, value: Any, path: str) -> tuple[str, str] | None:
    """Return the path and the problem of the first part that does not parse; None if only the whole does not.

    The parser's own texts name the field only in part, and differ between its releases.
    """
    if not isinstance(value, dict):
        return path, "must be a JSON object"
    for name, item in value.items():
        at = f"{path}.{name}" if path else name
        field = find_field(descriptor, name)
        if field is None:
            return at, "unknown field"
        problem = _problem(descriptor, {name: item})
        if problem:
            return _locate_in_field(field, name, item, at) or (at, problem)
    return None


def _locate_in_field(field: FieldDescriptor, name: str, value: Any, path: str) -> tuple[str, str] | None:
    owner, kind = field.containing_type, field.message_type
    if owner is None:
        return None
    if kind is not None and kind.GetOptions().map_entry:
        entries = value.items() if isinstance(value, dict) else ()
        expected = expectation_of(kind.fields_by_name["value"])
        tried = ((f"{path}[{key}]", _problem(owner, {name: {key: item}})) for key, item in entries)
        bad_entry = next(((at, expected or problem) for at, problem in tried if problem), None)
        return bad_entry or (path, "must be a JSON object")
    if field.is_repeated:
        if not isinstance(value, list):
            return path, "must be a JSON array"
        index = _first_bad_item(owner, name, value)
        path, value = f"{path}[{index}]", value[index]
        problem = _problem(owner, {name: [value]})
    else:
        problem = _problem(owner, {name: value})
    if kind is None or has_form_of_its_own(kind):
        return path, expectation_of(field) or problem or ""
    return _locate(kind, value, path) or (path, rivals_in(kind, value) or problem or "")


def _first_bad_item(descriptor: Descriptor, name: str, items: list[Any]) -> int:
    """Bisect: a list of a million numbers is parsed about twice, and not once per number."""
    low, high = 0, len(items)
    while high - low > 1:
        middle = (low + high) // 2
        if _problem(descriptor, {name: items[low:middle]}):
            high = middle
        else:
            low = middle
    return low


def _problem(descriptor: Descriptor, value: Any) -> str | None:
    try:
        json_format.ParseDict(value, new_message(descriptor))
    except json_format.ParseError as exc:
        return _innermost(exc)
    return None


def _innermost(exc: Exception) -> str:
    """Return the first cause: what wraps it repeats the path."""
    inner: BaseException = exc
    while isinstance(inner.__cause__, Exception):
        inner = inner.__cause__
    return str(inner).partition("\n")[0].rstrip(".")
