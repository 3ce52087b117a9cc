"""Base64 in JSON, checked before it is parsed: protobuf's parser leaves out what is none, and data with it."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from kvmesh.gateway.routes import find_field

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]*={0,2}")
_WRAPPED_BYTES = "google.protobuf.BytesValue"


def bad_base64_in(descriptor: Descriptor, value: Any) -> str | None:
    """Return the path of the first field of bytes whose text is no base64; None where there is none."""
    return next(_bad_ones(descriptor, value, ""), None) if _holds_bytes(descriptor) else None


@lru_cache(maxsize=1024)
def _holds_bytes(descriptor: Descriptor) -> bool:
    seen, waiting = {descriptor}, [descriptor]
    while waiting:
        for field in waiting.pop().fields:
            kind = field.message_type
            if _is_bytes(field):
                return True
            if kind is not None and kind not in seen:
                seen.add(kind)
                waiting.append(kind)
    return False


def _bad_ones(descriptor: Descriptor, value: Any, prefix: str) -> Iterator[str]:
    if not isinstance(value, dict):
        return
    for name, given in value.items():
        field = find_field(descriptor, name)
        if field is None or not (_is_bytes(field) or field.message_type is not None):
            continue
        for path, item in _items(field, given, f"{prefix}{name}"):
            kind = field.message_type
            if kind is not None and kind.GetOptions().map_entry:
                yield from _bad_ones(kind, {"value": item}, f"{path}.")
            elif _is_bytes(field):
                if isinstance(item, str) and (not _BASE64.fullmatch(item) or len(item.rstrip("=")) % 4 == 1):
                    yield path
            elif kind is not None:
                yield from _bad_ones(kind, item, f"{path}.")


def _items(field: FieldDescriptor, given: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield a field's values with their paths."""
    if isinstance(given, list) and field.is_repeated:
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(given))
    elif isinstance(given, dict) and field.is_repeated:
        yield from ((f"{path}[{key}]", item) for key, item in given.items())
    else:
        yield path, given


def _is_bytes(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return field.type == FieldDescriptor.TYPE_BYTES or (kind is not None and kind.full_name == _WRAPPED_BYTES)
