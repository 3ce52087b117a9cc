"""What the contract's comments say, by full protobuf name: the words of the API document.

Generated code has no comments; the descriptor set that is committed beside it (`make protos`) has.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2

from kvmesh.v1 import frontend_pb2

_CONTRACT = "contract.binpb"


def contract_path() -> Path:
    """Return the contract's descriptor set: imports and comments included, as Envoy and grpcurl take it."""
    return Path(frontend_pb2.__file__).with_name(_CONTRACT)


@lru_cache(maxsize=1)
def contract_comments() -> dict[str, str]:
    """Return the comments of all of the contract. Raises: OSError where the package is not whole."""
    files = descriptor_pb2.FileDescriptorSet.FromString(contract_path().read_bytes())
    return {
        name: text
        for file in files.file
        if file.package.startswith("kvmesh.")
        for name, text in comments_of(file).items()
    }


def comments_of(file: descriptor_pb2.FileDescriptorProto) -> dict[str, str]:
    """Return the comments before the services, methods, messages, fields, enums and values of one file."""
    found = (
        (_full_name(file, location.path), " ".join(location.leading_comments.split()))
        for location in file.source_code_info.location
    )
    return {name: text for name, text in found if name and text}


def _full_name(file: descriptor_pb2.FileDescriptorProto, path: Sequence[int]) -> str:
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
