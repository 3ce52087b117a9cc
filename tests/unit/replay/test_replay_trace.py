"""Reading a trace: what a row holds, and how a bad file is refused."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.replay.trace import TraceRow, read_trace

GOOD: Mapping[str, Any] = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [0, 7]}
REAL_TRACE = os.environ.get("TEST_TRACE", "")
"""Not KVMESH_...: those are settings."""


def write(folder: Path, *lines: str) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_row_holds_what_its_line_says(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(GOOD), json.dumps({**GOOD, "timestamp": 3000.5, "hash_ids": [0, 2**64 - 1]}), "")

    rows = read_trace(path)

    assert rows == [TraceRow(0, 600, 3, (0, 7)), TraceRow(3000.5, 600, 3, (0, 2**64 - 1))]


def test_nothing_beyond_the_limit_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(GOOD), "", json.dumps(GOOD), "not JSON")

    rows = read_trace(path, limit=2)

    assert len(rows) == 2


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("timestamp", "0", "timestamp: must be a number of milliseconds, 0 or more"),
        ("timestamp", True, "timestamp: must be a number of milliseconds, 0 or more"),
        ("timestamp", -1, "timestamp: must be a number of milliseconds, 0 or more"),
        ("timestamp", 99, "timestamp: 99 is earlier than the row before it"),
        ("input_length", 0, "input_length: must be a whole number of tokens, 1 or more"),
        ("input_length", 600.0, "input_length: must be a whole number of tokens, 1 or more"),
        ("input_length", 2**32, "input_length: must be a whole number of tokens, 1 or more"),
        ("output_length", None, "output_length: must be a whole number of tokens, 1 or more"),
        ("output_length", True, "output_length: must be a whole number of tokens, 1 or more"),
        ("hash_ids", "0 7", "hash_ids: must be a list"),
        ("hash_ids", [0, -1], "hash_ids: -1 is not a whole number from 0 to 2^64 - 1"),
        ("hash_ids", [0, 2**64], "is not a whole number from 0 to 2^64 - 1"),
        ("hash_ids", [0, "7"], "hash_ids: '7' is not a whole number from 0 to 2^64 - 1"),
        ("hash_ids", [0], "hash_ids: 1 entries, but 600 tokens begin 2 blocks"),
        ("hash_ids", [0, 7, 9], "hash_ids: 3 entries, but 600 tokens begin 2 blocks"),
    ],
)
def test_a_bad_field_is_refused_by_line_and_name(tmp_path: Path, field: str, value: object, told: str) -> None:
    path = write(
        tmp_path, json.dumps({**GOOD, "timestamp": 100}), "", json.dumps({**GOOD, field: value} | _later(field))
    )

    with pytest.raises(FixRequestError) as refusal:
        read_trace(path)

    assert refusal.value.reason is Reason.INVALID_FIELD
    assert refusal.value.field == field
    assert refusal.value.message.startswith(f"{path}, line 3: ")
    assert told in refusal.value.message


def _later(field: str) -> dict[str, int]:
    return {} if field == "timestamp" else {"timestamp": 100}


@pytest.mark.parametrize("field", GOOD)
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    path = write(tmp_path, json.dumps({name: value for name, value in GOOD.items() if name != field}))

    with pytest.raises(FixRequestError, match=rf"line 1: {field}: missing$") as refusal:
        read_trace(path)

    assert refusal.value.field == field


@pytest.mark.parametrize(("line", "told"), [("{", "no JSON"), ("[1]", "not a JSON object"), ("\xff", "no JSON")])
def test_what_is_no_object_is_refused_by_line(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(f"{json.dumps(GOOD)}\n{line}\n".encode("latin-1"))

    with pytest.raises(FixRequestError, match=rf"line 2: {told}"):
        read_trace(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "", "")

    with pytest.raises(FixRequestError, match="holds no request"):
        read_trace(path)


@pytest.mark.skipif(not REAL_TRACE, reason="set TEST_TRACE to the path of Mooncake's conversation_trace.jsonl")
def test_the_conversation_trace_has_the_prefix_hits_that_are_known_of_it() -> None:
    rows = read_trace(Path(REAL_TRACE))

    seen: set[int] = set()
    hits = 0
    for row in rows:
        for hash_id in row.hash_ids:
            if hash_id not in seen:
                break
            hits += 1
        seen.update(row.hash_ids)

    assert len(rows) == 12_031
    assert (hits, sum(len(row.hash_ids) for row in rows)) == (105_710, 288_500)
