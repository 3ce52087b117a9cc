"""A call's metadata as HTTP headers, both ways.

`Grpc-Metadata-Name` is metadata `name`, in base64 where the name ends in -bin. What tracing, authorisation and custom
send under names of their own keeps them. Everything else is between the client and this server, and stays here.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence

from starlette.types import Scope

from kvmesh.gateway.failures import Headers, HttpRefusalError
from kvmesh.wire.validation import invalid

Metadata = Sequence[tuple[str, str | bytes]]

MAX_METADATA_BYTES = 8192
"""Of names and values together: what gRPC servers take by default."""
_PREFIX = "grpc-metadata-"
_TRAILER_PREFIX = "grpc-trailer-"
_KEPT = frozenset({"traceparent", "tracestate", "baggage", "authorization", "user-agent"})
_KEPT_PREFIX = "x-"
_NAME = re.compile(r"(?!grpc-)[0-9a-z_.-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")


def metadata_of(scope: Scope, *, request_id_key: str, request_id: str) -> Metadata:
    """Return the metadata that a request's headers stand for; the id is the mesh's, whatever the client sent.

    Raises: FixRequestError naming a header of no legal name or value, HttpRefusalError (431) for too many bytes.
    """
    metadata: list[tuple[str, str | bytes]] = [(request_id_key, request_id)]
    metadata += (item for item in _passed_on(scope["headers"]) if item[0] != request_id_key)
    if sum(len(name) + len(value) for name, value in metadata) > MAX_METADATA_BYTES:
        raise HttpRefusalError(431, invalid("headers", f"those that are passed on exceed {MAX_METADATA_BYTES} bytes"))
    return metadata


def initial_headers(metadata: Metadata) -> Headers:
    """Return a reply's initial metadata as headers."""
    return list(_headers(_PREFIX, metadata))


def trailing_headers(metadata: Metadata) -> Headers:
    """Return a reply's trailing metadata as headers: JSON has no trailers."""
    return list(_headers(_TRAILER_PREFIX, metadata))


def _passed_on(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, str | bytes]]:
    for raw_name, raw_value in headers:
        header, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        name = header.removeprefix(_PREFIX)
        if name != header:
            yield name, _checked(header, name, value)
        elif (header in _KEPT or header.startswith(_KEPT_PREFIX)) and _NAME.fullmatch(name) and _VALUE.fullmatch(value):
            yield name, value


def _checked(header: str, name: str, value: str) -> str | bytes:
    if not _NAME.fullmatch(name):
        raise invalid(header, "names no metadata: digits, letters and _ . - after the prefix, not beginning with grpc-")
    if name.endswith("-bin"):
        try:
            return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
        except binascii.Error as exc:
            raise invalid(header, "must be base64") from exc
    if not _VALUE.fullmatch(value):
        raise invalid(header, "must be printable ASCII, or base64 under a name that ends in -bin")
    return value


def _headers(prefix: str, metadata: Metadata) -> Iterator[tuple[bytes, bytes]]:
    for name, value in metadata:
        told = base64.b64encode(value) if isinstance(value, bytes) else value.encode("latin-1", "replace")
        yield f"{prefix}{name}".encode("ascii"), told
