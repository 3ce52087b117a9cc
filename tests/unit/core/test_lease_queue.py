import copy
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from kvmesh.core.errors import BackOffError, ConflictError, NotKnownError, OutOfTimeError, Reason, TryElsewhereError
from kvmesh.core.ids import AttemptKey, Epoch, LeaseId, RequestId, SequenceHash, WorkerId
from kvmesh.core.lease_capability import Capability, WorkerCapability
from kvmesh.core.lease_deadlines import Deadlines
from kvmesh.core.lease_effects import (
    DrainRequested,
    Effect,
    LeaseRevoked,
    TaskBackedOff,
    TaskCancelled,
    TaskCompleted,
    TaskDead,
    TaskExpired,
    TaskLeased,
    TaskQueued,
    WorkerSuperseded,
)
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.lease_queue import LeaseQueue
from kvmesh.core.lease_task import LIVE_STATES, TRANSITIONS, Grant, SubmitResult, TaskEvent, TaskSpec, TaskState
from kvmesh.testing.virtual_clock import VirtualClock

A, B = WorkerId("node/prefill/0"), WorkerId("node/prefill/1")
FIRST, SECOND = Epoch(1), Epoch(2)
NEEDS = Capability(
    model="llama", block_size=16, dtype="float16", layout="fp-1", transports=frozenset({"tcp", "shared_memory"})
)
OFFERS = WorkerCapability(
    models=frozenset({"llama"}), block_size=16, dtype="float16", layout="fp-1", transports=frozenset({"tcp"})
)


def key_of(name: str, attempt: int = 1) -> AttemptKey:
    return AttemptKey(RequestId(name), attempt)


def hashes(*values: int) -> tuple[SequenceHash, ...]:
    return tuple(SequenceHash(value) for value in values)


class Bench:
    """A queue, a clock, and the calls with their defaults filled in."""

    def __init__(self, limits: QueueLimits | None = None) -> None:
        numbers = count(1)
        self.clock = VirtualClock()
        self.queue = LeaseQueue(limits or QueueLimits(), new_lease_id=lambda: LeaseId(f"lease-{next(numbers)}"))

    @property
    def now(self) -> float:
        return self.clock.now()

    def submit(self, name: str, *, content: bytes = b"same", needs: Capability = NEEDS, **spec: Any) -> SubmitResult:
        task = TaskSpec(key=key_of(name), content=content, requirement=needs, **spec)
        return self.queue.submit(task, payload=f"payload of {name}", now=self.now)

    def attach(self, *workers: WorkerId, epoch: Epoch = FIRST, offers: WorkerCapability = OFFERS) -> None:
        for worker in workers:
            self.queue.attach(worker, epoch, offers, now=self.now)

    def lease(self, worker: WorkerId, *, max_tasks: int = 1, epoch: Epoch = FIRST, **options: Any) -> list[Grant]:
        return self.queue.lease(worker, epoch, max_tasks=max_tasks, now=self.now, **options)

    def lease_one(self, worker: WorkerId, **options: Any) -> Grant:
        (grant,) = self.lease(worker, **options)
        return grant

    def names(self, worker: WorkerId, *, max_tasks: int = 100, **options: Any) -> list[str]:
        return [grant.key.request_id for grant in self.lease(worker, max_tasks=max_tasks, **options)]

    def complete(self, grant: Grant, result: str = "result") -> None:
        self.queue.complete(grant.key, grant.lease_id, result, now=self.now)

    def fail(self, grant: Grant, *, retryable: bool = True, delay_s: float = 0.0) -> None:
        self.queue.fail(grant.key, grant.lease_id, retryable=retryable, delay_s=delay_s, now=self.now)

    def extend(self, grant: Grant) -> float:
        return self.queue.extend(grant.key, grant.lease_id, now=self.now)

    def cancel(self, name: str) -> bool:
        return self.queue.cancel(key_of(name), now=self.now)

    def wait(self, seconds: float) -> list[Effect]:
        return self.queue.tick(self.clock.advance(seconds))

    def effects(self) -> list[Effect]:
        return self.queue.take_effects()

    def refused(self, reason: Reason, call: Callable[[], object], *, error: type[Exception] = ConflictError) -> None:
        """The call raises, and neither state nor counts nor effects tell that it was made."""
        self.queue.tick(self.now)
        before = copy.deepcopy((self.queue.snapshot(), self.queue.stats(), self.queue.dead()))
        with pytest.raises(error) as caught:
            call()
        assert caught.value.reason is reason  # type: ignore[attr-defined]  # every class passed in is a MeshError
        assert (self.queue.snapshot(), self.queue.stats(), self.queue.dead()) == before
        assert self.effects() == []
        self.queue.check_integrity()


@pytest.fixture
def bench() -> Bench:
    return Bench()


# The table.


def test_every_state_has_a_row_and_every_live_state_can_be_cancelled_and_expire() -> None:
    assert set(TRANSITIONS) == set(TaskState)
    assert {TaskState.QUEUED, TaskState.LEASED, TaskState.DELAYED} == LIVE_STATES
    for state in LIVE_STATES:
        assert TRANSITIONS[state][TaskEvent.CANCEL] is TaskState.CANCELLED
        assert TRANSITIONS[state][TaskEvent.EXPIRE] is TaskState.EXPIRED


def test_only_a_queued_task_is_granted_and_only_a_leased_one_completed() -> None:
    assert [state for state in TaskState if TaskEvent.GRANT in TRANSITIONS[state]] == [TaskState.QUEUED]
    assert [state for state in TaskState if TaskEvent.COMPLETE in TRANSITIONS[state]] == [TaskState.LEASED]


# Submit.


def test_submitted_task_is_told_its_position(bench: Bench) -> None:
    first, second, urgent = bench.submit("a"), bench.submit("b"), bench.submit("c", priority=0)

    assert first == SubmitResult(TaskState.QUEUED, already=False, position=0)
    assert (second.position, urgent.position) == (1, 0)
    assert bench.effects() == [
        TaskQueued(key_of("a"), 0, 0),
        TaskQueued(key_of("b"), 1, 0),
        TaskQueued(key_of("c"), 0, 0),
    ]


def test_payload_reaches_the_worker_untouched(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")

    grant = bench.lease_one(A)

    assert (grant.payload, grant.attempt, grant.ttl_s, grant.expires_at) == ("payload of a", 1, 10.0, 10.0)
    assert bench.effects()[-1] == TaskLeased(key_of("a"), A, 1)


def test_same_content_twice_is_one_task(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("z")
    bench.submit("a")

    again = bench.submit("a", expires_at=99.0)

    assert again == SubmitResult(TaskState.QUEUED, already=True, position=1)
    assert bench.names(A) == ["z", "a"]
    assert bench.submit("a") == SubmitResult(TaskState.LEASED, already=True)


def test_other_content_under_one_key_is_refused_whatever_the_state(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")

    bench.refused(Reason.ALREADY_EXISTS, lambda: bench.submit("a", content=b"other"))
    grant = bench.lease_one(A)
    bench.refused(Reason.ALREADY_EXISTS, lambda: bench.submit("a", content=b"other"))
    bench.complete(grant)
    bench.refused(Reason.ALREADY_EXISTS, lambda: bench.submit("a", content=b"other"))


def test_another_attempt_at_a_request_is_another_task(bench: Bench) -> None:
    bench.submit("a")
    retry = TaskSpec(key=key_of("a", 2), content=b"other", requirement=NEEDS)

    result = bench.queue.submit(retry, payload=None, now=0.0)

    assert not result.already
    assert bench.queue.stats().queued == 2


def test_completed_task_submitted_again_gets_the_same_result_until_it_is_forgotten() -> None:
    bench = Bench(QueueLimits(terminal_kept_s=60.0))
    bench.attach(A)
    bench.submit("a")
    bench.complete(bench.lease_one(A), "blocks")

    bench.wait(59.9)
    again = bench.submit("a")
    bench.wait(0.1)
    anew = bench.submit("a")

    assert again == SubmitResult(TaskState.COMPLETED, already=True, outcome=TaskCompleted(key_of("a"), "blocks"))
    assert not anew.already


def test_dead_task_submitted_again_is_still_dead(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    bench.fail(bench.lease_one(A), retryable=False)

    again = bench.submit("a")

    assert again.state is TaskState.DEAD
    assert again.outcome == bench.queue.dead()[0]


def test_cancelled_key_begins_anew(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    old = bench.lease_one(A)
    bench.cancel("a")

    result = bench.submit("a")

    assert result == SubmitResult(TaskState.QUEUED, already=False, position=0)
    bench.effects()
    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(old))
    assert bench.lease_one(A).attempt == 1


def test_full_queue_refuses_and_evicts_nothing() -> None:
    bench = Bench(QueueLimits(max_depth=2, full_retry_after_s=0.5))
    bench.attach(A)
    bench.submit("a")
    bench.submit("b")

    bench.refused(Reason.QUEUE_FULL, lambda: bench.submit("c"), error=BackOffError)
    with pytest.raises(BackOffError) as refusal:
        bench.submit("c")

    assert refusal.value.retry_after_s == 0.5
    assert bench.submit("a").already
    assert bench.names(A) == ["a", "b"]
    assert not bench.submit("c").already


def test_task_in_backoff_counts_towards_the_depth() -> None:
    bench = Bench(QueueLimits(max_depth=1))
    bench.attach(A)
    bench.submit("a")
    bench.fail(bench.lease_one(A))

    bench.refused(Reason.QUEUE_FULL, lambda: bench.submit("b"), error=BackOffError)


def test_submit_past_its_time_to_live_is_refused(bench: Bench) -> None:
    bench.wait(5.0)

    bench.refused(Reason.DEADLINE, lambda: bench.submit("a", expires_at=5.0), error=OutOfTimeError)


# Capabilities.


@pytest.mark.parametrize(
    ("needs", "field", "required", "offered"),
    [
        pytest.param(Capability("qwen", 16, "float16", "fp-1"), "model", "qwen", "llama", id="model"),
        pytest.param(Capability("llama", 32, "float16", "fp-1"), "block_size", "32", "16", id="block size"),
        pytest.param(Capability("llama", 16, "float32", "fp-1"), "dtype", "float32", "float16", id="dtype"),
        pytest.param(Capability("llama", 16, "float16", "fp-2"), "layout", "fp-2", "fp-1", id="layout"),
        pytest.param(
            Capability("llama", 16, "float16", "fp-1", frozenset({"nixl", "shared_memory"})),
            "transport",
            "nixl,shared_memory",
            "tcp",
            id="no transport in common",
        ),
        pytest.param(Capability("qwen", 32, "float32", "fp-2"), "model", "qwen", "llama", id="coarsest first"),
    ],
)
def test_task_that_no_worker_can_do_is_refused_naming_both_values(
    bench: Bench, needs: Capability, field: str, required: str, offered: str
) -> None:
    bench.attach(A)

    bench.refused(Reason.NO_CAPABLE_WORKER, lambda: bench.submit("a", needs=needs), error=TryElsewhereError)
    with pytest.raises(TryElsewhereError) as refusal:
        bench.submit("a", needs=needs)

    assert refusal.value.metadata == {"capability": field, "required": required, "offered": offered}


@pytest.mark.parametrize(
    "needs",
    [
        pytest.param(Capability("", 16, "float16", "fp-1"), id="any model"),
        pytest.param(Capability("llama", 0, "", ""), id="any layout"),
        pytest.param(Capability("llama", 16, "float16", "fp-1"), id="any transport"),
    ],
)
def test_empty_requirement_is_met_by_every_worker(bench: Bench, needs: Capability) -> None:
    bench.attach(A)
    bench.submit("a", needs=needs)

    assert bench.names(A) == ["a"]


def test_worker_without_a_layout_does_no_task_that_needs_one(bench: Bench) -> None:
    bench.attach(A, offers=WorkerCapability(frozenset({"llama"}), 0, "", ""))

    bench.refused(Reason.NO_CAPABLE_WORKER, lambda: bench.submit("a"), error=TryElsewhereError)


def test_refusal_names_what_the_closest_workers_offer(bench: Bench) -> None:
    bench.attach(A)
    bench.attach(B, offers=WorkerCapability(frozenset({"qwen"}), 32, "float16", "fp-1"))

    with pytest.raises(TryElsewhereError) as refusal:
        bench.submit("a", needs=Capability("qwen", 64, "float16", "fp-1"))

    assert refusal.value.metadata == {"capability": "block_size", "required": "64", "offered": "32"}


def test_task_waits_for_a_worker_while_none_is_attached(bench: Bench) -> None:
    bench.submit("a")
    bench.attach(A)

    assert bench.names(A) == ["a"]


def test_lease_skips_tasks_the_worker_cannot_do_and_keeps_the_order_of_the_rest(bench: Bench) -> None:
    qwen = Capability("qwen", 16, "float16", "fp-1")
    bench.submit("qwen-1", needs=qwen)
    bench.submit("llama-1")
    bench.submit("qwen-2", needs=qwen)
    bench.submit("llama-2", needs=Capability("llama", 16, "float16", "fp-1"))
    bench.attach(A)
    bench.attach(B, offers=WorkerCapability(frozenset({"qwen"}), 16, "float16", "fp-1"))

    assert bench.names(A) == ["llama-1", "llama-2"]
    assert bench.names(B) == ["qwen-1", "qwen-2"]


# Order.


def test_urgent_priority_goes_first_and_arrival_orders_the_rest(bench: Bench) -> None:
    bench.attach(A)
    for name, priority in [("a", 10), ("b", 0), ("c", 10), ("d", 5), ("e", 0)]:
        bench.submit(name, priority=priority)

    assert bench.names(A) == ["b", "e", "d", "a", "c"]


def test_equal_deadlines_keep_submission_order(bench: Bench) -> None:
    bench.attach(A)
    for name in "abcd":
        bench.submit(name, expires_at=50.0)
    for grant in reversed(bench.lease(A, max_tasks=4)):
        bench.fail(grant)
    bench.wait(2.0)

    assert bench.names(A) == ["a", "b", "c", "d"]
    expired = [effect for effect in bench.wait(60.0) if isinstance(effect, TaskExpired)]
    assert [effect.key.request_id for effect in expired] == ["a", "b", "c", "d"]


def test_budget_stops_at_the_first_task_that_does_not_fit(bench: Bench) -> None:
    bench.attach(A)
    for name, tokens in [("a", 3000), ("b", 1096), ("c", 1), ("d", 0)]:
        bench.submit(name, uncached_tokens=tokens)

    assert bench.names(A, max_tokens=4096) == ["a", "b"]
    assert bench.names(A, max_tokens=4096) == ["c", "d"]


def test_budget_does_not_pass_over_a_large_task_for_a_small_one(bench: Bench) -> None:
    bench.attach(A)
    for name, tokens in [("a", 100), ("large", 9000), ("small", 1)]:
        bench.submit(name, uncached_tokens=tokens)

    assert bench.names(A, max_tokens=4096) == ["a"]
    assert bench.names(A, max_tokens=4096) == ["large"]


def test_lease_takes_at_most_max_tasks(bench: Bench) -> None:
    bench.attach(A)
    for name in "abc":
        bench.submit(name)

    assert bench.names(A, max_tasks=2) == ["a", "b"]
    assert bench.names(A, max_tasks=0) == []


def test_empty_queue_grants_nothing_and_new_work_is_announced(bench: Bench) -> None:
    bench.attach(A)

    assert bench.lease(A) == []
    bench.submit("a")
    assert bench.effects() == [TaskQueued(key_of("a"), 0, 0)]


# Affinity.


def holds_only(*cached: int) -> Callable[[tuple[SequenceHash, ...]], int]:
    def depth(block_hashes: tuple[SequenceHash, ...]) -> int:
        leading = 0
        while leading < len(block_hashes) and block_hashes[leading] in cached:
            leading += 1
        return leading

    return depth


def test_worker_gets_the_task_whose_prefix_it_holds_before_older_ones(bench: Bench) -> None:
    bench.attach(A, B)
    bench.submit("old", block_hashes=hashes(1, 2))
    bench.submit("cached", block_hashes=hashes(7, 8))

    assert bench.names(A, holds=holds_only(7)) == ["cached", "old"]


def test_deepest_prefix_is_preferred_and_ties_go_to_the_older(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("shallow", block_hashes=hashes(7, 1))
    bench.submit("deep", block_hashes=hashes(7, 8))
    bench.submit("as deep", block_hashes=hashes(7, 8))

    assert bench.names(A, holds=holds_only(7, 8)) == ["deep", "as deep", "shallow"]


def test_affinity_never_crosses_priorities(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("cached", block_hashes=hashes(7))
    bench.submit("urgent", priority=0, block_hashes=hashes(1))

    assert bench.names(A, max_tasks=1, holds=holds_only(7)) == ["urgent"]


def test_passed_over_task_is_served_first_once_its_skips_are_used_up() -> None:
    bench = Bench(QueueLimits(max_skips=4))
    bench.attach(A)
    bench.submit("old", block_hashes=hashes(1))
    for number in range(6):
        bench.submit(f"cached-{number}", block_hashes=hashes(7))

    order = [bench.names(A, max_tasks=1, holds=holds_only(7))[0] for _ in range(7)]

    assert order == ["cached-0", "cached-1", "cached-2", "cached-3", "old", "cached-4", "cached-5"]


def test_task_that_the_worker_cannot_do_is_not_passed_over(bench: Bench) -> None:
    bench.submit("other", needs=Capability("qwen", 16, "float16", "fp-1"), block_hashes=hashes(1))
    bench.submit("old", block_hashes=hashes(1))
    bench.submit("cached", block_hashes=hashes(7))
    bench.attach(A)

    bench.lease(A, holds=holds_only(7))

    assert {view.key.request_id: view.skips for view in bench.queue.snapshot()} == {"other": 0, "old": 1, "cached": 0}


def test_task_that_does_not_fit_the_budget_charges_no_skip(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("first", block_hashes=hashes(7, 8), uncached_tokens=10)
    bench.submit("old", block_hashes=hashes(1), uncached_tokens=10)
    bench.submit("cached", block_hashes=hashes(7), uncached_tokens=4096)

    assert bench.names(A, holds=holds_only(7, 8), max_tokens=100) == ["first"]
    assert [view.skips for view in bench.queue.snapshot()] == [0, 0, 0]


def test_prefix_is_looked_for_in_the_window_only_and_once_per_task() -> None:
    bench = Bench(QueueLimits(affinity_window=3))
    bench.attach(A)
    for number in range(5):
        bench.submit(f"t{number}", block_hashes=hashes(number))
    asked: list[tuple[SequenceHash, ...]] = []

    def holds(block_hashes: tuple[SequenceHash, ...]) -> int:
        asked.append(block_hashes)
        return 1 if block_hashes == hashes(4) else 0

    assert bench.names(A, max_tasks=2, holds=holds) == ["t0", "t1"]
    assert asked == [hashes(0), hashes(1), hashes(2), hashes(3)]


# Leases.


def test_expired_lease_is_requeued_with_next_attempt() -> None:
    bench = Bench(QueueLimits(lease_ttl_s=1.0))
    bench.attach(A, B)
    bench.submit("a")
    first = bench.lease_one(A)
    bench.effects()

    before, after = bench.wait(0.75), bench.wait(0.25)

    assert before == []
    assert after == [LeaseRevoked(first.key, A, FIRST, first.lease_id), TaskQueued(first.key, 0, 1)]
    second = bench.lease_one(B)
    assert (second.attempt, second.lease_id != first.lease_id) == (2, True)


def test_late_complete_is_refused_and_the_second_holders_result_stands() -> None:
    bench = Bench(QueueLimits(lease_ttl_s=1.0))
    bench.attach(A, B)
    bench.submit("a")
    first = bench.lease_one(A)
    bench.wait(1.0)

    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(first))
    second = bench.lease_one(B)
    bench.effects()
    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(first, "late"))
    bench.complete(second, "in time")
    assert bench.effects() == [TaskCompleted(key_of("a"), "in time")]
    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(first, "late"))
    assert bench.queue.outcome(key_of("a")) == TaskCompleted(key_of("a"), "in time")


def test_complete_at_the_moment_of_expiry_is_late_even_if_nobody_ticked(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    grant = bench.lease_one(A)
    bench.clock.advance(10.0)

    with pytest.raises(ConflictError) as refusal:
        bench.complete(grant)

    assert refusal.value.reason is Reason.LEASE_LOST
    assert bench.effects()[-1] == TaskQueued(key_of("a"), 0, 1)


def test_requeued_task_keeps_its_place_and_priority(bench: Bench) -> None:
    bench.attach(A, B)
    bench.submit("a")
    bench.submit("b")
    bench.submit("urgent", priority=0)
    bench.lease(A, max_tasks=2)
    bench.submit("urgent-2", priority=0)
    bench.wait(10.0)

    assert bench.names(B) == ["urgent", "urgent-2", "a", "b"]


def test_extend_keeps_the_lease(bench: Bench) -> None:
    bench.attach(A, B)
    bench.submit("a")
    grant = bench.lease_one(A)

    for _ in range(2):
        bench.wait(8.0)
        assert bench.extend(grant) == 10.0
    bench.wait(9.9)

    assert bench.lease(B) == []
    bench.complete(grant)
    assert bench.queue.stats().ended[TaskState.COMPLETED] == 1


def test_lease_and_extend_never_pass_the_time_to_live(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a", expires_at=12.0)
    bench.submit("b", expires_at=5.0)

    grant, short = bench.lease(A, max_tasks=2)
    bench.wait(4.0)

    assert (short.ttl_s, short.expires_at) == (5.0, 5.0)
    assert bench.extend(grant) == 8.0
    assert bench.extend(short) == 1.0


def test_calls_by_a_non_holder_are_refused(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    bench.submit("b")
    mine, other = bench.lease(A, max_tasks=2)
    stolen = Grant(mine.key, other.lease_id, 1, 10.0, 10.0, None)

    bench.refused(Reason.LEASE_LOST, lambda: bench.extend(stolen))
    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(stolen))
    bench.refused(Reason.LEASE_LOST, lambda: bench.fail(stolen))


def test_calls_on_an_unknown_task_are_not_found(bench: Bench) -> None:
    ghost = Grant(key_of("ghost"), LeaseId("lease-0"), 1, 10.0, 10.0, None)

    bench.refused(Reason.NOT_FOUND, lambda: bench.extend(ghost), error=NotKnownError)
    bench.refused(Reason.NOT_FOUND, lambda: bench.complete(ghost), error=NotKnownError)
    bench.refused(Reason.NOT_FOUND, lambda: bench.fail(ghost), error=NotKnownError)
    bench.refused(Reason.NOT_FOUND, lambda: bench.cancel("ghost"), error=NotKnownError)
    bench.refused(Reason.NOT_FOUND, lambda: bench.queue.outcome(ghost.key), error=NotKnownError)


def test_completing_twice_with_the_completing_lease_changes_nothing(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    grant = bench.lease_one(A)
    bench.complete(grant, "first")
    bench.effects()

    bench.complete(grant, "second")

    assert bench.effects() == []
    assert bench.queue.outcome(grant.key) == TaskCompleted(grant.key, "first")
    bench.refused(Reason.LEASE_LOST, lambda: bench.fail(grant))
    bench.refused(Reason.LEASE_LOST, lambda: bench.extend(grant))


# Failure.


@pytest.mark.parametrize(
    ("delay_s", "visible_after_s"),
    [
        pytest.param(0.5, 2.0, id="the backoff is longer"),
        pytest.param(7.0, 7.0, id="the delay is longer"),
        pytest.param(500.0, 30.0, id="the cap bounds both"),
    ],
)
def test_failed_task_is_invisible_until_its_backoff_ends(delay_s: float, visible_after_s: float) -> None:
    bench = Bench()
    bench.attach(A)
    bench.submit("a", priority=3)
    bench.fail(bench.lease_one(A), delay_s=delay_s)

    assert bench.effects()[-1] == TaskBackedOff(key_of("a"), 1, visible_after_s, "")
    bench.wait(visible_after_s - 0.25)
    assert bench.lease(A) == []
    assert bench.wait(0.25) == [TaskQueued(key_of("a"), 0, 1)]
    assert bench.queue.snapshot()[0].priority == 3
    assert bench.lease_one(A).attempt == 2


def test_backoff_doubles_up_to_the_cap_and_never_overflows() -> None:
    limits = QueueLimits()

    assert [limits.backoff_s(attempt, 0.0) for attempt in (1, 2, 3, 4, 5, 6, 5000)] == [2, 4, 8, 16, 30, 30, 30]


def test_task_that_cannot_be_retried_is_dead_at_once(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    grant = bench.lease_one(A)
    bench.effects()

    bench.fail(grant, retryable=False)

    (dead,) = bench.effects()
    assert dead == TaskDead(key_of("a"), 1, "attempt 1 of 3: failed, not retryable", Reason.PREFILL_FAILED)
    assert bench.queue.dead() == (dead,)
    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(grant))


def test_task_is_dead_when_its_last_attempt_fails(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    for wait_s in (2.0, 4.0):
        bench.fail(bench.lease_one(A))
        bench.wait(wait_s)
    last = bench.lease_one(A)

    bench.fail(last)

    dead = bench.effects()[-1]
    assert isinstance(dead, TaskDead)
    assert (last.attempt, dead.attempts, dead.reason) == (3, 3, Reason.PREFILL_FAILED)
    bench.wait(100.0)
    assert bench.lease(A) == []


def test_task_is_dead_when_its_last_lease_expires(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    for _ in range(3):
        bench.lease_one(A)
        effects = bench.wait(10.0)

    assert isinstance(effects[-1], TaskDead)
    assert bench.queue.stats().leased == 0
    assert bench.queue.stats().ended[TaskState.DEAD] == 1


def test_always_failing_consumer_follows_the_backoff_and_fresh_tasks_are_not_preempted() -> None:
    bench = Bench(QueueLimits(max_attempts=10))
    bench.attach(A, B)
    bench.submit("poison")
    attempts: list[float] = []
    fresh_waits: list[float] = []
    submitted: dict[str, float] = {}

    for step in range(400):  # 50 s in eighths, which floats count exactly
        if step % 8 == 0:
            submitted[f"fresh-{step}"] = bench.now
            bench.submit(f"fresh-{step}")
        for grant in bench.lease(A):
            if grant.key == key_of("poison"):
                attempts.append(bench.now)
                bench.fail(grant)
            else:
                fresh_waits.append(bench.now - submitted[grant.key.request_id])
                bench.complete(grant)
        bench.wait(0.125)

    assert attempts == [0, 2, 6, 14, 30]
    assert len(fresh_waits) == 50
    assert max(fresh_waits) <= 0.25


def test_retry_goes_behind_fresh_tasks_that_waited_before_its_backoff_ended(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("retry")
    bench.fail(bench.lease_one(A))
    bench.wait(1.0)
    bench.submit("fresh")
    bench.wait(1.5)
    bench.submit("later")

    assert bench.names(A) == ["fresh", "retry", "later"]


def test_thousand_retries_leave_nothing_in_flight() -> None:
    bench = Bench(QueueLimits(max_attempts=1001))
    bench.attach(A)
    bench.submit("a")

    for _ in range(1000):
        bench.fail(bench.lease_one(A))
        assert bench.queue.stats().leased == 0
        bench.wait(30.0)
    bench.complete(bench.lease_one(A))

    assert (bench.queue.stats().leased, bench.queue.stats().delayed, bench.queue.stats().queued) == (0, 0, 0)
    assert bench.queue.next_wakeup() is None
    bench.queue.check_integrity()


# Time-to-live.


def test_task_past_its_time_to_live_is_never_leased(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a", expires_at=3.0)
    bench.submit("b", expires_at=3.5)
    bench.effects()
    bench.clock.advance(3.0)

    assert bench.names(A) == ["b"]
    assert bench.effects()[0] == TaskExpired(key_of("a"), Reason.DEADLINE)


def test_time_to_live_ends_a_leased_task_and_its_holder_is_told(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a", expires_at=3.0)
    grant = bench.lease_one(A)
    bench.effects()

    assert bench.wait(3.0) == [LeaseRevoked(grant.key, A, FIRST, grant.lease_id), TaskExpired(grant.key)]
    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(grant))


def test_time_to_live_ends_a_task_in_backoff(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a", expires_at=2.0)
    bench.fail(bench.lease_one(A))
    bench.effects()

    assert bench.wait(2.0) == [TaskExpired(key_of("a"))]


def test_one_long_jump_gives_the_same_effects_as_many_ticks() -> None:
    histories = []
    for steps in (1, 320):
        bench = Bench()
        bench.attach(A)
        bench.submit("a", expires_at=35.0)
        bench.submit("b")
        bench.fail(bench.lease(A, max_tasks=2)[0])
        effects = bench.effects()
        for _ in range(steps):
            effects += bench.wait(40.0 / steps)
        histories.append(effects)

    assert histories[0] == histories[1]
    assert TaskExpired(key_of("a")) in histories[0]


def test_next_wakeup_is_the_earliest_deadline(bench: Bench) -> None:
    bench.attach(A)
    wakeups = [bench.queue.next_wakeup()]
    bench.submit("a")
    wakeups.append(bench.queue.next_wakeup())
    bench.submit("b", expires_at=50.0)
    wakeups.append(bench.queue.next_wakeup())
    grant = bench.lease_one(A)
    wakeups.append(bench.queue.next_wakeup())
    bench.fail(grant)
    wakeups.append(bench.queue.next_wakeup())
    bench.cancel("a")
    wakeups.append(bench.queue.next_wakeup())

    assert wakeups == [None, None, 50.0, 10.0, 2.0, 50.0]


# Cancel.


def test_cancelled_task_is_gone_from_the_line(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    bench.effects()

    assert bench.cancel("a")

    assert bench.effects() == [TaskCancelled(key_of("a"))]
    assert bench.lease(A) == []
    assert not bench.cancel("a")
    assert bench.effects() == []


def test_cancel_tells_the_holder_and_its_complete_is_refused(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    grant = bench.lease_one(A)
    bench.effects()

    bench.cancel("a")

    assert bench.effects() == [LeaseRevoked(grant.key, A, FIRST, grant.lease_id), TaskCancelled(grant.key)]
    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(grant))
    assert bench.queue.stats().leased == 0


def test_cancelled_task_in_backoff_never_returns(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    bench.fail(bench.lease_one(A))
    bench.cancel("a")
    bench.effects()

    assert bench.wait(100.0) == []
    assert bench.lease(A) == []


# Workers.


def test_lease_without_attach_is_refused(bench: Bench) -> None:
    bench.submit("a")
    bench.effects()

    bench.refused(Reason.NOT_ATTACHED, lambda: bench.lease(A))
    bench.attach(A)
    bench.refused(Reason.NOT_ATTACHED, lambda: bench.lease(A, epoch=SECOND))
    bench.refused(Reason.NOT_ATTACHED, lambda: bench.queue.drain(B, now=bench.now))


def test_detach_requeues_its_leases_at_once(bench: Bench) -> None:
    bench.attach(A, B)
    for name in "abc":
        bench.submit(name)
    lost = bench.lease(A, max_tasks=2)
    bench.effects()

    assert bench.queue.detach(A, FIRST, now=bench.now)

    assert bench.effects() == [TaskQueued(key_of("a"), 0, 1), TaskQueued(key_of("b"), 1, 1)]
    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(lost[0]))
    bench.refused(Reason.NOT_ATTACHED, lambda: bench.lease(A))
    assert [(grant.key.request_id, grant.attempt) for grant in bench.lease(B, max_tasks=9)] == [
        ("a", 2),
        ("b", 2),
        ("c", 1),
    ]


def test_detach_of_the_last_allowed_attempt_is_death(bench: Bench) -> None:
    bench.submit("a")
    for _ in range(3):
        bench.attach(A)
        bench.lease_one(A)
        bench.queue.detach(A, FIRST, now=bench.now)

    assert isinstance(bench.effects()[-1], TaskDead)


def test_detach_of_another_epoch_changes_nothing(bench: Bench) -> None:
    bench.attach(A, epoch=SECOND)
    bench.submit("a")
    grant = bench.lease_one(A, epoch=SECOND)
    bench.effects()

    assert not bench.queue.detach(A, FIRST, now=bench.now)
    assert not bench.queue.detach(B, FIRST, now=bench.now)

    assert bench.effects() == []
    bench.complete(grant)


def test_higher_epoch_supersedes_and_requeues_the_lower_ones_leases(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    old = bench.lease_one(A)
    bench.effects()

    bench.attach(A, epoch=SECOND)

    assert bench.effects() == [TaskQueued(key_of("a"), 0, 1), WorkerSuperseded(A, FIRST)]
    bench.refused(Reason.LEASE_LOST, lambda: bench.complete(old))
    bench.refused(Reason.STALE_EPOCH, lambda: bench.lease(A))
    bench.refused(Reason.STALE_EPOCH, lambda: bench.attach(A))
    assert bench.lease_one(A, epoch=SECOND).attempt == 2


def test_same_epoch_attached_again_keeps_its_leases_and_renews_its_capability(bench: Bench) -> None:
    bench.attach(A)
    bench.submit("a")
    grant = bench.lease_one(A)
    bench.effects()

    bench.attach(A, offers=WorkerCapability(frozenset({"qwen"}), 16, "float16", "fp-1"))

    assert bench.effects() == []
    bench.refused(Reason.NO_CAPABLE_WORKER, lambda: bench.submit("b"), error=TryElsewhereError)
    bench.complete(grant)


def test_draining_worker_gets_no_lease_and_finishes_what_it_holds(bench: Bench) -> None:
    bench.attach(A, B)
    bench.submit("a")
    bench.submit("b")
    grant = bench.lease_one(A)
    bench.effects()

    bench.queue.drain(A, now=bench.now)
    bench.queue.drain(A, now=bench.now)

    assert bench.effects() == [DrainRequested(A, FIRST)]
    assert bench.lease(A) == []
    assert bench.extend(grant) == 10.0
    bench.complete(grant)
    assert bench.names(B) == ["b"]
    assert (bench.queue.stats().workers, bench.queue.stats().draining) == (2, 1)


def test_draining_worker_does_not_count_as_capable(bench: Bench) -> None:
    bench.attach(A)
    bench.attach(B, offers=WorkerCapability(frozenset({"qwen"}), 16, "float16", "fp-1"))
    bench.queue.drain(A, now=bench.now)
    bench.effects()

    bench.refused(Reason.NO_CAPABLE_WORKER, lambda: bench.submit("a"), error=TryElsewhereError)


# Bounds.


def test_dead_letters_and_ended_tasks_are_bounded_by_count() -> None:
    bench = Bench(QueueLimits(dead_kept=2, terminal_kept=3))
    bench.attach(A)
    for number in range(5):
        bench.submit(f"t{number}")
        bench.fail(bench.lease_one(A), retryable=False)

    assert [dead.key.request_id for dead in bench.queue.dead()] == ["t3", "t4"]
    assert not bench.submit("t1").already
    assert bench.submit("t2").already
    bench.queue.check_integrity()


def test_replaced_deadlines_do_not_pile_up() -> None:
    deadlines = Deadlines()

    for number in range(10_000):
        deadlines.set(key_of("a"), float(number), order=0)

    assert len(deadlines._heap) < 200
    assert deadlines.pop_due(9998.9) is None
    assert deadlines.pop_due(9999.0) == (9999.0, key_of("a"))
    assert deadlines.earliest() is None


def test_stats_count_what_happened(bench: Bench) -> None:
    bench.attach(A)
    for name in "abcd":
        bench.submit(name, uncached_tokens=100)
    first, second, _ = bench.lease(A, max_tasks=3)
    bench.complete(first)
    bench.fail(second)

    stats = bench.queue.stats()

    assert (stats.queued, stats.delayed, stats.leased, stats.queued_tokens) == (1, 1, 1, 100)
    assert (stats.ended[TaskState.COMPLETED], stats.backed_off, stats.requeued) == (1, 1, 0)


def test_every_lease_that_ends_unanswered_is_counted_also_the_last_one() -> None:
    bench = Bench(QueueLimits(max_attempts=2))
    bench.attach(A)
    bench.submit("requeued, then dead")
    bench.submit("past its time-to-live", expires_at=5.0)
    bench.submit("completed")
    bench.complete(bench.lease(A, max_tasks=3)[2])

    bench.wait(10.0)
    bench.lease_one(A)
    bench.queue.detach(A, FIRST, now=bench.now)

    stats = bench.queue.stats()
    assert (stats.leases_lost, stats.requeued) == (3, 1)
    assert (stats.ended[TaskState.DEAD], stats.ended[TaskState.EXPIRED]) == (1, 1)


@pytest.mark.parametrize("name", ["max_depth", "lease_ttl_s", "max_attempts", "affinity_window"])
def test_limit_that_could_never_work_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        QueueLimits(**{name: 0})


def test_time_that_runs_backwards_is_our_bug(bench: Bench) -> None:
    bench.wait(1.0)

    with pytest.raises(AssertionError, match="backwards"):
        bench.queue.tick(0.5)
    with pytest.raises(ValueError, match="backwards"):
        bench.clock.advance(-1.0)
