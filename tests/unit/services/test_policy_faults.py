"""What is logged and counted of a policy that fails."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvmesh.core.candidates import Candidate, RoutingQuery
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, WorkerId, WorkerRank
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.routing import RoutingCore
from kvmesh.services.router_metrics import RouterMetrics
from kvmesh.telemetry import exposition

WORKER = WorkerRank(WorkerId("n/decode/0"))
QUERY = RoutingQuery(model="m", prompt_tokens=16)


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with capture_logs() as captured:
        yield captured


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class ForgetsNothing:
    """A policy that chooses and fails to learn."""

    def select(self, query: RoutingQuery, candidates: Any, rng: random.Random) -> WorkerRank:
        candidate: Candidate = candidates[0]
        return candidate.worker

    def booked(self, query: RoutingQuery, worker: WorkerRank) -> None:
        raise RuntimeError("full")


def failures(policy: str) -> float:
    start = f'kvmesh_routing_fallbacks_total{{policy="{policy}"}} '
    found = [line for line in exposition().decode().splitlines() if line.startswith(start)]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


def test_the_first_failure_shows_its_traceback_and_the_next_are_one_line_in_ten_seconds(lines: list[Any]) -> None:
    clock, error = Clock(), RuntimeError("no idea")
    metrics = RouterMetrics("custom", "events", now=clock)

    for _ in range(5):
        metrics.policy_failed("select", "custom raised", error)
    clock.now += 10
    metrics.policy_failed("select", "custom raised", error)

    assert [(line["event"], line["failures"], line["exc_info"]) for line in lines] == [
        ("policy.failed", 1, error),
        ("policy.failed", 5, None),
    ]


def test_a_policy_that_fails_to_learn_a_booking_is_logged_and_counted(lines: list[Any]) -> None:
    metrics = RouterMetrics("forgets_nothing", "events")
    router = RoutingCore(RouterId("r"), policy=ForgetsNothing(), rng=random.Random(1), on_fault=metrics.policy_failed)
    router.put_worker(
        WorkerRecord(
            worker_id=WORKER.worker_id, epoch=Epoch(1), role=WorkerRole.DECODE, models=("m",), namespace="n",
            block_size=16, address="",
        ),
        now=0,
    )  # fmt: skip
    before = failures("forgets_nothing")

    router.reserve(AttemptKey(RequestId("r1"), 1), QUERY, now=1)

    assert failures("forgets_nothing") == before + 1
    (line,) = lines
    assert (line["event"], line["fault"]) == ("policy.failed", "booked raised RuntimeError('full')")
    assert isinstance(line["exc_info"], RuntimeError)
