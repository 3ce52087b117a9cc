"""A field in the words of the door that was asked.

What refuses a request may be far behind its door, and names the field as its own message does: the router reads
`query.hints.pinned_worker_id` where the client wrote `routing.pinned_worker_id`. Each door tells its clients their own
names.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvmesh.core.errors import MeshError

IN_GENERATE: Mapping[str, str] = {
    "query.model": "model",
    "query.hints": "routing",
    "token_ids": "prompt.token_ids",
    "text": "prompt.text",
}
"""GenerateRequest's path of what routers (ReserveRequest) and workers (DecodeRequest) name, by the path's start."""
IN_GENERATE_TEXT: Mapping[str, str] = {
    "query.model": "model",
    "query.hints": "routing",
    "prompt.text": "prompt",
    "text": "prompt",
}
"""Likewise GenerateTextRequest's."""


@contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the field of a MeshError on its way out of the block; the longest start of its path that is known."""
    try:
        yield
    except MeshError as error:
        _rename(error, names)
        raise


def _rename(error: MeshError, names: Mapping[str, str]) -> None:
    field = error.field
    if field is None:
        return
    starts = [name for name in names if field == name or field.startswith((f"{name}.", f"{name}["))]
    if not starts:
        return
    start = max(starts, key=len)
    error.field = names[start] + field.removeprefix(start)
    if error.message.startswith(f"{field}:"):
        error.message = error.field + error.message.removeprefix(field)
