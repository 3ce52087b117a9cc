"""The comments of a contract's file, by the full names of what they stand before."""

from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto


def comments_of(file: FileDescriptorProto) -> dict[str, str]:
    """Return the comments before the services, methods, messages, fields, enums and values of one file, as written."""
    found = (
        (_full_name(file, location.path), location.leading_comments.strip())
        for location in file.source_code_info.location
    )
    return {name: text for name, text in found if name and text}


def _full_name(file: FileDescriptorProto, path: Sequence[int]) -> str:
    """Return the name of what a location's path leads to; "" for what has none, an option for one."""
    names = [file.package, *_names(file, path)]
    return ".".join(names) if len(names) > 1 and len(path) // 2 == len(names) - 1 else ""


def _names(message: Any, path: Sequence[int]) -> Iterator[str]:
    for number, index in zip(path[::2], path[1::2], strict=False):
        field = message.DESCRIPTOR.fields_by_number.get(number)
        if field is None or not field.is_repeated or field.message_type is None:
            return
        message = getattr(message, field.name)[index]
        if "name" not in message.DESCRIPTOR.fields_by_name:
            return
        yield message.name
