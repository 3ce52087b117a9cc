"""The file of decisions: what is written, dropped and rotated."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from kvmesh.core.candidates import Candidate, RoutingQuery, Selection
from kvmesh.core.decision_log import Decision, is_start
from kvmesh.core.errors import FixRequestError
from kvmesh.core.ids import WorkerId, WorkerRank
from kvmesh.services.decision_log import DecisionLog
from kvmesh.telemetry import exposition

WORKER = WorkerRank(WorkerId("n/decode/0"))
SETTINGS = {"policy": "kv_aware"}


def decision(number: int, **inputs: Any) -> Decision:
    selection = Selection(
        worker=WORKER,
        policy="kv_aware",
        query=RoutingQuery(model="m", prompt_tokens=number),
        candidates=(Candidate(worker=WORKER, block_size=16, **inputs),),
    )
    return Decision(selection=selection, policy_settings=SETTINGS, at_s=1.0)


def log_at(path: Path, *, max_bytes: int = 1_000_000, max_pending: int = 1_000) -> DecisionLog:
    return DecisionLog(path, max_bytes=max_bytes, policy_settings=SETTINGS, max_pending=max_pending)


def numbers_in(path: Path) -> list[int]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["query"]["prompt_tokens"] for line in lines if not is_start(line)]


def dropped() -> float:
    line = next(
        line for line in exposition().decode().splitlines() if line.startswith("kvmesh_decisions_dropped_total")
    )
    return float(line.rpartition(" ")[2])


async def test_what_was_put_is_written_by_the_time_it_is_closed(tmp_path: Path) -> None:
    log = log_at(tmp_path / "log.jsonl")
    log.start()

    for number in range(100):
        log.put(decision(number))
    await log.aclose()
    await log.aclose()

    assert numbers_in(tmp_path / "log.jsonl") == list(range(100))


async def test_a_log_goes_on_where_the_one_before_ended_and_says_that_it_starts(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for number in range(2):
        log = log_at(path)
        log.start()
        log.put(decision(number))
        await log.aclose()

    starts = [is_start(json.loads(line)) for line in path.read_text().splitlines()]
    assert starts == [True, False, True, False]


async def test_a_full_file_becomes_the_one_before_and_no_more_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = log_at(path, max_bytes=4_000)
    log.start()

    for number in range(50):
        log.put(decision(number))
    await log.aclose()

    kept = [*numbers_in(tmp_path / "log.jsonl.1"), *numbers_in(path)]
    assert kept == list(range(50))[-len(kept) :]
    sizes = {name: (tmp_path / name).stat().st_size for name in os.listdir(tmp_path)}
    assert sorted(sizes) == ["log.jsonl", "log.jsonl.1"]
    assert max(sizes.values()) <= 4_000


async def test_what_there_is_no_room_for_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, go = log_at(tmp_path / "log.jsonl", max_pending=3), threading.Event()
    write = log._write
    monkeypatch.setattr(log, "_write", lambda one: go.wait(20) and write(one))
    log.start()
    before = dropped()

    for number in range(20):
        log.put(decision(number))
    was_dropped = dropped() - before
    go.set()
    await log.aclose()

    assert 16 <= was_dropped <= 17  # three wait, and one may be with the thread
    assert len(numbers_in(tmp_path / "log.jsonl")) == 20 - was_dropped


async def test_what_cannot_be_written_is_dropped_and_the_rest_goes_on(tmp_path: Path) -> None:
    log, before = log_at(tmp_path / "log.jsonl"), dropped()
    log.start()

    log.put(decision(1, active_blocks=object()))
    log.put(decision(2))
    await log.aclose()

    assert numbers_in(tmp_path / "log.jsonl") == [2]
    assert dropped() - before == 1


@pytest.mark.parametrize(
    ("path", "why"), [("/missing/log.jsonl", "No such file"), ("/dev/full", "No space left")], ids=["open", "write"]
)
def test_a_file_that_cannot_be_written_is_refused_by_name(path: str, why: str) -> None:
    log = log_at(Path(path))

    with pytest.raises(FixRequestError, match=f"router.decision_log: {path} cannot be written: {why}") as refused:
        log.start()

    assert refused.value.field == "router.decision_log"
