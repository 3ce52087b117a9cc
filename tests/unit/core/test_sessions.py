from dataclasses import replace

import pytest

from kvmesh.core.candidates import RoutingHints, RoutingQuery
from kvmesh.core.ids import WorkerId, WorkerRank
from kvmesh.core.roster import WorkerRole
from kvmesh.core.sessions import Sessions

A, B = (WorkerRank(WorkerId(name)) for name in "ab")


def of(session_id: str | None) -> RoutingQuery:
    return RoutingQuery(model="m", prompt_tokens=1, hints=RoutingHints(session_id=session_id))


@pytest.mark.parametrize(("now", "found"), [(5.0, A), (15.0, A), (15.1, None)])
def test_session_is_bound_until_its_time_after_the_last_booking_is_over(now: float, found: WorkerRank | None) -> None:
    sessions = Sessions(ttl_s=10, max_sessions=9)
    sessions.note(of("s"), B, now=0)
    sessions.note(of("s"), A, now=5)

    assert sessions.worker_of(of("s"), now=now) == found


def test_sessions_of_another_model_or_role_and_queries_without_one_are_apart() -> None:
    sessions = Sessions(ttl_s=10, max_sessions=9)
    sessions.note(of("s"), A, now=0)
    sessions.note(of(None), B, now=0)

    others = (of(None), of("t"), replace(of("s"), model="n"), replace(of("s"), role=WorkerRole.PREFILL))

    assert [sessions.worker_of(other, now=0) for other in others] == [None] * 4


def test_memory_is_bounded_by_number_and_by_age() -> None:
    sessions = Sessions(ttl_s=10, max_sessions=2)
    for number, session_id in enumerate("stu"):
        sessions.note(of(session_id), A, now=number)
    by_number = [sessions.worker_of(of(session_id), now=2) for session_id in "stu"]

    sessions.note(of("v"), B, now=20)

    assert by_number == [None, A, A]
    assert len(sessions) == 1
