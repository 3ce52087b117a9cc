"""Who waits for room, and who goes first."""

import pytest

from kvmesh.core.admission import AdmissionOrder, AdmissionQueue, AdmissionRules, Waiting, lane_of
from kvmesh.core.candidates import RoutingHints, RoutingQuery
from kvmesh.core.ids import WorkerId


def queue(order: AdmissionOrder, **rules: float) -> AdmissionQueue[str]:
    return AdmissionQueue(AdmissionRules(wait_s=60, order=order, **rules))  # type: ignore[arg-type]  # tests name fields


def waiting(name: str, *, at: float = 0.0, priority: int = 10, new_tokens: int = 0, lane: str = "all") -> Waiting[str]:
    return Waiting(item=name, lane=lane, arrived_at=at, priority=priority, new_tokens=new_tokens)


def order_of(queue: AdmissionQueue[str], *entries: Waiting[str], now: float = 10.0) -> list[str]:
    for entry in entries:
        queue.put(entry)
    return [entry.item for entry in queue.in_order(now=now)]


def test_first_come_goes_first_among_equals() -> None:
    order = order_of(queue(AdmissionOrder.FCFS), waiting("second", at=2), waiting("first", at=1))

    assert order == ["first", "second"]


def test_a_jump_is_a_head_start_in_seconds() -> None:
    # The later one, 60 priorities more urgent, has a head start of 50 s over the default, and 45 of them left.
    early, jumps = waiting("early", at=0, priority=60), waiting("jumps", at=5, priority=10)

    assert order_of(queue(AdmissionOrder.FCFS), early, jumps) == ["jumps", "early"]


def test_a_jump_does_not_outrun_an_arrival_long_before() -> None:
    order = order_of(queue(AdmissionOrder.FCFS), waiting("urgent", at=50, priority=0), waiting("early", at=0), now=60)

    assert order == ["early", "urgent"]


def test_strict_priority_beats_any_arrival() -> None:
    entries = (waiting("early", at=0, priority=5), waiting("urgent", at=9, priority=4))

    assert order_of(queue(AdmissionOrder.PRIORITY, ageing_s=100), *entries) == ["urgent", "early"]


def test_ageing_lifts_whoever_waits_long_over_those_that_are_more_urgent() -> None:
    entries = (waiting("patient", at=0, priority=6), waiting("urgent", at=40, priority=4))

    before = order_of(queue(AdmissionOrder.PRIORITY, ageing_s=10), *entries, now=49)  # 6 - 4 against 4 - 0
    assert before == ["patient", "urgent"]
    assert order_of(queue(AdmissionOrder.PRIORITY, ageing_s=30), *entries, now=49) == ["urgent", "patient"]


def test_nobody_starves_while_more_urgent_requests_keep_coming() -> None:
    waits = queue(AdmissionOrder.PRIORITY, ageing_s=1)
    waits.put(waiting("patient", at=0, priority=20))

    admitted = []
    for second in range(40):  # one comes and one is let in, each second
        waits.put(waiting(f"urgent {second}", at=second, priority=0))
        first = waits.in_order(now=second)[0]
        waits.remove(first)
        admitted.append(first.item)

    assert admitted.index("patient") == 20


def test_equal_priorities_go_by_arrival() -> None:
    order = order_of(queue(AdmissionOrder.PRIORITY), waiting("second", at=2), waiting("first", at=1))

    assert order == ["first", "second"]


def test_the_shortest_prefill_goes_first_weighted_by_the_jump() -> None:
    # weights over tokens: 1/100, 1/10, (1 + 9)/1000 at priority 1, (1/11)/10 at priority 20
    entries = (
        waiting("long", new_tokens=100),
        waiting("short", new_tokens=10),
        waiting("long but urgent", at=1, new_tokens=1000, priority=1),
        waiting("short but yields", new_tokens=10, priority=20),
    )

    order = order_of(queue(AdmissionOrder.SHORTEST), *entries)

    assert order == ["short", "long", "long but urgent", "short but yields"]


def test_a_cached_prompt_counts_as_one_token() -> None:
    order = order_of(queue(AdmissionOrder.SHORTEST), waiting("one", at=0, new_tokens=1), waiting("none", at=1))

    assert order == ["one", "none"]


def test_the_queue_is_full_at_its_bound_and_has_room_again_when_one_leaves() -> None:
    waits = queue(AdmissionOrder.FCFS, max_waiting=2)
    first, second = waiting("a"), waiting("b", lane="other")
    waits.put(first)
    waits.put(second)

    was_full = waits.is_full
    waits.remove(first)
    waits.remove(first)

    assert was_full
    assert not waits.is_full
    assert len(waits) == 1
    assert (waits.has_lane("all"), waits.has_lane("other")) == (False, True)


@pytest.mark.parametrize(
    "hints",
    [
        RoutingHints(pinned_worker=WorkerId("a")),
        RoutingHints(allowed_workers=frozenset({WorkerId("a")})),
        RoutingHints(excluded_workers=frozenset({WorkerId("a")})),
        RoutingHints(required_labels={"zone": "x"}),
    ],
)
def test_requests_that_other_workers_may_take_wait_in_another_lane(hints: RoutingHints) -> None:
    anywhere = RoutingQuery(model="m", prompt_tokens=1)

    assert lane_of(anywhere) != lane_of(RoutingQuery(model="m", prompt_tokens=1, hints=hints))
    assert lane_of(anywhere) == lane_of(RoutingQuery(model="m", prompt_tokens=9, hints=RoutingHints(priority=3)))
