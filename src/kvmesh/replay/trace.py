"""A Mooncake-format trace: one JSON object per line, one line per request.

Format: Qin et al., "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving", 2024. A prompt is known by
the ids of its blocks alone: two prompts share a prefix as far as their hash_ids are equal.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from kvmesh.core.errors import FixRequestError, Reason

BLOCK_TOKENS = 512
"""Prompt tokens that one hash_id stands for; the last of a prompt may stand for fewer."""
MAX_HASH_ID = 2**64 - 1


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    timestamp_ms: float
    """When it was made; no row is earlier than the one before it."""
    input_length: int
    """Prompt tokens; 1 or more."""
    output_length: int
    """Tokens to produce; 1 or more."""
    hash_ids: tuple[int, ...]
    """One per begun block of the prompt, each 0..`MAX_HASH_ID`."""


def read_trace(path: Path, *, limit: int | None = None) -> list[TraceRow]:
    """Return the first `limit` rows, or all of them; blank lines are passed over.

    Raises: FixRequestError(INVALID_FIELD) naming file, line and field; OSError.
    """
    rows: list[TraceRow] = []
    with path.open("rb") as file:
        numbered = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for number, line in islice(numbered, limit):
            try:
                row = _parse(line)
                if rows and row.timestamp_ms < rows[-1].timestamp_ms:
                    raise _invalid("timestamp", f"{row.timestamp_ms:g} is earlier than the row before it")
            except FixRequestError as exc:
                message = f"{path}, line {number}: {exc.message}"
                raise FixRequestError(exc.reason, message, field=exc.field, metadata={"line": str(number)}) from exc
            rows.append(row)
    if not rows:
        raise FixRequestError(Reason.INVALID_FIELD, f"{path} holds no request")
    return rows


def _parse(line: bytes) -> TraceRow:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as exc:
        raise FixRequestError(Reason.INVALID_FIELD, f"no JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise FixRequestError(Reason.INVALID_FIELD, "not a JSON object")
    timestamp_ms = _field(fields, "timestamp")
    if not isinstance(timestamp_ms, int | float) or isinstance(timestamp_ms, bool) or timestamp_ms < 0:
        raise _invalid("timestamp", "must be a number of milliseconds, 0 or more")
    input_length = _count(fields, "input_length")
    return TraceRow(timestamp_ms, input_length, _count(fields, "output_length"), _hash_ids(fields, input_length))


def _field(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise _invalid(name, "missing")
    return fields[name]


def _count(fields: dict[str, Any], name: str) -> int:
    value = _field(fields, name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**32:
        raise _invalid(name, "must be a whole number of tokens, 1 or more")
    return value


def _hash_ids(fields: dict[str, Any], input_length: int) -> tuple[int, ...]:
    hash_ids = _field(fields, "hash_ids")
    if not isinstance(hash_ids, list):
        raise _invalid("hash_ids", "must be a list")
    for hash_id in hash_ids:
        if not isinstance(hash_id, int) or isinstance(hash_id, bool) or not 0 <= hash_id <= MAX_HASH_ID:
            raise _invalid("hash_ids", f"{hash_id!r} is not a whole number from 0 to 2^64 - 1")
    blocks = -(-input_length // BLOCK_TOKENS)
    if len(hash_ids) != blocks:
        raise _invalid("hash_ids", f"{len(hash_ids)} entries, but {input_length} tokens begin {blocks} blocks")
    return tuple(hash_ids)


def _invalid(field: str, message: str) -> FixRequestError:
    return FixRequestError(Reason.INVALID_FIELD, f"{field}: {message}", field=field)
