"""The queue against a twin that is too simple to be wrong: one list, sorted and searched anew for every question.

Times are multiples of 0.25 s, which floats count exactly.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.core.errors import MeshError
from kvmesh.core.ids import AttemptKey, Epoch, LeaseId, RequestId, SequenceHash, WorkerId
from kvmesh.core.lease_capability import Capability, WorkerCapability
from kvmesh.core.lease_effects import Outcome, TaskCompleted
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.lease_queue import LeaseQueue
from kvmesh.core.lease_task import Grant, TaskSpec
from kvmesh.testing.virtual_clock import VirtualClock

SCHEDULES = 300
"""Enough for every push; set it to 10,000 after a change to the queue (a few minutes)."""
TTL_S, MAX_ATTEMPTS, MAX_DEPTH, MAX_SKIPS, WINDOW = 4.0, 3, 8, 2, 4
LIMITS = QueueLimits(
    max_depth=MAX_DEPTH,
    lease_ttl_s=TTL_S,
    max_attempts=MAX_ATTEMPTS,
    backoff_base_s=1.0,
    backoff_cap_s=3.0,
    max_skips=MAX_SKIPS,
    affinity_window=WINDOW,
    terminal_kept_s=1e9,
)
SKILLS = [frozenset({"llama"}), frozenset({"llama", "qwen"}), frozenset({"qwen"})]
CACHES = [{1}, {2, 3}, set[int]()]
"""Models and cached blocks of worker 0, 1 and 2."""
ENDS = ("completed", "dead", "expired", "cancelled")


@dataclass(frozen=True)
class Ask:
    model: str
    priority: int
    tokens: int
    block: int
    lives_s: float


@dataclass
class TwinTask:
    name: int
    ask: Ask
    expires_at: float
    arrival: int
    state: str = "queued"
    attempts: int = 0
    skips: int = 0
    worker: int = -1
    lease_id: str = ""
    until: float = 1e9
    """End of the lease or of the backoff."""

    @property
    def due(self) -> float:
        return min(self.until, self.expires_at) if self.state not in ENDS else 1e9


@dataclass
class Twin:
    tasks: list[TwinTask] = field(default_factory=list)
    """Every life of every name, in the order of Submit."""
    attached: dict[int, int] = field(default_factory=dict)
    """Worker -> epoch."""
    draining: set[int] = field(default_factory=set)
    arrivals: int = 0
    leases: int = 0

    def line(self) -> list[TwinTask]:
        return sorted((t for t in self.tasks if t.state == "queued"), key=lambda t: (t.ask.priority, t.arrival))

    def latest(self, name: int) -> TwinTask | None:
        return next((t for t in reversed(self.tasks) if t.name == name), None)

    def pass_time(self, now: float) -> None:
        while due := [t for t in self.tasks if t.due <= now]:
            task = min(due, key=lambda t: (t.due, t.arrival))
            if task.expires_at <= task.until:
                task.state = "expired"
            elif task.state == "leased":
                self.lose(task)
            else:
                task.state, task.until, task.arrival = "queued", 1e9, self.arrive()

    def arrive(self) -> int:
        self.arrivals += 1
        return self.arrivals

    def lose(self, task: TwinTask) -> None:
        task.state, task.until = ("dead" if task.attempts == MAX_ATTEMPTS else "queued"), 1e9

    def submit(self, name: int, ask: Ask, now: float) -> object:
        known = self.latest(name)
        if known is not None and known.ask.model != ask.model:
            return "ALREADY_EXISTS"
        if known is not None and known.state != "cancelled":
            return known.state
        active = [w for w in self.attached if w not in self.draining]
        if active and not any(ask.model in SKILLS[w] for w in active):
            return "NO_CAPABLE_WORKER"
        if sum(t.state in ("queued", "delayed") for t in self.tasks) >= MAX_DEPTH:
            return "QUEUE_FULL"
        self.tasks.append(TwinTask(name, ask, now + ask.lives_s, self.arrive()))
        return "queued"

    def lease(self, worker: int, max_tasks: int, max_tokens: int, now: float) -> object:
        if worker not in self.attached:
            return "NOT_ATTACHED"
        granted: list[tuple[int, str, int]] = []
        spent = 0
        while worker not in self.draining and len(granted) < max_tasks:
            able = [t for t in self.line() if t.ask.model in SKILLS[worker]]
            able = [t for t in able if t.ask.priority == able[0].ask.priority][:WINDOW]
            tired = [i for i, t in enumerate(able) if t.skips == MAX_SKIPS]
            able = able[: tired[0] + 1] if tired else able
            if not able:
                break
            task = next((t for t in able if t.ask.block in CACHES[worker]), able[0])
            if granted and spent + task.ask.tokens > max_tokens:
                break
            spent += task.ask.tokens
            for older in able[: able.index(task)]:
                older.skips += 1
            self.leases += 1
            task.state, task.worker, task.lease_id = "leased", worker, f"lease-{self.leases}"
            task.attempts, task.until = task.attempts + 1, min(now + TTL_S, task.expires_at)
            granted.append((task.name, task.lease_id, task.attempts))
        return granted

    def held(self, lease_id: str) -> TwinTask | None:
        return next((t for t in self.tasks if t.state == "leased" and t.lease_id == lease_id), None)

    def extend(self, lease_id: str, now: float) -> object:
        task = self.held(lease_id)
        if task is None:
            return "LEASE_LOST"
        task.until = min(now + TTL_S, task.expires_at)
        return task.until - now

    def complete(self, name: int, lease_id: str) -> object:
        task = self.held(lease_id)
        latest = self.latest(name)
        if task is None:
            again = latest is not None and latest.state == "completed" and latest.lease_id == lease_id
            return None if again else "LEASE_LOST"
        task.state = "completed"
        return None

    def fail(self, lease_id: str, retryable: bool, delay_s: float, now: float) -> object:
        task = self.held(lease_id)
        if task is None:
            return "LEASE_LOST"
        if not retryable or task.attempts == MAX_ATTEMPTS:
            task.state = "dead"
        else:
            task.state, task.until = "delayed", now + min(max(delay_s, [1.0, 2.0][task.attempts - 1]), 3.0)
        return None

    def cancel(self, name: int) -> object:
        task = self.latest(name)
        if task is None:
            return "NOT_FOUND"
        lives = task.state not in ENDS
        if lives:
            task.state = "cancelled"
        return lives

    def leave(self, worker: int) -> bool:
        for task in self.tasks:
            if task.state == "leased" and task.worker == worker:
                self.lose(task)
        self.draining.discard(worker)
        return self.attached.pop(worker, None) is not None


class Pair:
    """Queue and twin under one clock; every method does the same to both and asserts the same answer."""

    def __init__(self) -> None:
        numbers = count(1)
        self.queue = LeaseQueue(LIMITS, new_lease_id=lambda: LeaseId(f"lease-{next(numbers)}"))
        self.twin = Twin()
        self.clock = VirtualClock()
        self.epochs = Counter[int]()
        self.grants: list[Grant] = []
        self.begun = Counter[AttemptKey]()
        self.ended = Counter[AttemptKey]()

    def same(self, call: Callable[[float], object], expected: Callable[[float], object]) -> object:
        now = self.clock.now()
        self.twin.pass_time(now)
        try:
            answer = call(now)
        except MeshError as refusal:
            answer = refusal.reason.value
        wanted = expected(now)
        assert answer == wanted
        self.compare()
        return answer

    def compare(self) -> None:
        self.ended.update(effect.key for effect in self.queue.take_effects() if isinstance(effect, Outcome))
        self.queue.check_integrity()
        seen = [
            (int(view.key.request_id), view.state.value, view.attempts, view.skips, view.position)
            for view in self.queue.snapshot()
        ]
        line = self.twin.line()
        alive = sorted((t for t in self.twin.tasks if t.state not in ENDS), key=lambda t: (t.ask.priority, t.arrival))
        assert seen == [
            (t.name, t.state, t.attempts, t.skips, line.index(t) if t.state == "queued" else None) for t in alive
        ]

    def submit(self, name: int, ask: Ask) -> None:
        spec = TaskSpec(
            key=_key(name),
            content=ask.model.encode(),
            requirement=Capability(ask.model, 16, "float16", "fp"),
            priority=ask.priority,
            uncached_tokens=ask.tokens,
            block_hashes=(SequenceHash(ask.block),),
            expires_at=self.clock.now() + ask.lives_s,
        )

        def call(now: float) -> object:
            result = self.queue.submit(spec, payload=None, now=now)
            self.begun[spec.key] += not result.already
            return result.state.value

        self.same(call, lambda now: self.twin.submit(name, ask, now))

    def lease(self, worker: int, max_tasks: int, max_tokens: int) -> None:
        def call(now: float) -> object:
            grants = self.queue.lease(
                _worker(worker),
                Epoch(self.epochs[worker]),
                max_tasks=max_tasks,
                max_tokens=max_tokens,
                holds=lambda hashes: int(hashes[0] in CACHES[worker]),
                now=now,
            )
            self.grants += grants
            return [(int(grant.key.request_id), grant.lease_id, grant.attempt) for grant in grants]

        self.same(call, lambda now: self.twin.lease(worker, max_tasks, max_tokens, now))

    def extend(self, pick: int) -> None:
        if grant := self.granted(pick):
            self.extended(grant)

    def extended(self, grant: Grant) -> bool:
        answer = self.same(
            lambda now: self.queue.extend(grant.key, grant.lease_id, now=now),
            lambda now: self.twin.extend(grant.lease_id, now),
        )
        return answer != "LEASE_LOST"

    def complete(self, pick: int) -> None:
        if grant := self.granted(pick):
            self.same(
                lambda now: self.queue.complete(grant.key, grant.lease_id, grant.lease_id, now=now),
                lambda _: self.twin.complete(int(grant.key.request_id), grant.lease_id),
            )

    def fail(self, pick: int, retryable: bool, delay_s: float) -> None:
        if grant := self.granted(pick):
            self.same(
                lambda now: self.queue.fail(grant.key, grant.lease_id, retryable=retryable, delay_s=delay_s, now=now),
                lambda now: self.twin.fail(grant.lease_id, retryable, delay_s, now),
            )

    def cancel(self, name: int) -> None:
        self.same(lambda now: self.queue.cancel(_key(name), now=now), lambda _: self.twin.cancel(name))

    def crash(self, worker: int) -> None:
        self.same(
            lambda now: self.queue.detach(_worker(worker), Epoch(self.epochs[worker]), now=now),
            lambda _: self.twin.leave(worker),
        )

    def start(self, worker: int) -> None:
        """Attach with a higher epoch, over the old one if that is still there."""
        self.epochs[worker] += 1

        def come(_: float) -> object:
            self.twin.leave(worker)
            self.twin.attached[worker] = self.epochs[worker]
            return None

        offers = WorkerCapability(SKILLS[worker], 16, "float16", "fp")
        self.same(lambda now: self.queue.attach(_worker(worker), Epoch(self.epochs[worker]), offers, now=now), come)

    def drain(self, worker: int) -> None:
        def expected(_: float) -> object:
            if worker not in self.twin.attached:
                return "NOT_ATTACHED"
            self.twin.draining.add(worker)
            return None

        self.same(lambda now: self.queue.drain(_worker(worker), now=now), expected)

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def granted(self, pick: int) -> Grant | None:
        """One of all grants ever made, mostly a late one."""
        return self.grants[-1 - pick % len(self.grants)] if self.grants else None


def _key(name: int) -> AttemptKey:
    return AttemptKey(RequestId(str(name)), 1)


def _worker(number: int) -> WorkerId:
    return WorkerId(f"node/prefill/{number}")


ACTIONS = st.one_of(
    st.tuples(
        st.just(Pair.submit),
        st.integers(0, 11),
        st.builds(
            Ask,
            model=st.sampled_from(["llama", "llama", "qwen"]),
            priority=st.sampled_from([0, 10, 10]),
            tokens=st.sampled_from([0, 100, 1000, 5000]),
            block=st.integers(1, 4),
            lives_s=st.sampled_from([3.0, 9.25, 30.0, 1000.0]),
        ),
    ),
    st.tuples(st.just(Pair.lease), st.integers(0, 2), st.integers(1, 4), st.sampled_from([100, 4096])),
    st.tuples(st.just(Pair.extend), st.integers(0, 4)),
    st.tuples(st.just(Pair.complete), st.integers(0, 6)),
    st.tuples(st.just(Pair.fail), st.integers(0, 4), st.sampled_from([True, True, False]), st.sampled_from([0.0, 2.5])),
    st.tuples(st.just(Pair.cancel), st.integers(0, 11)),
    st.tuples(st.sampled_from([Pair.crash, Pair.start, Pair.start, Pair.drain]), st.integers(0, 2)),
    st.tuples(st.just(Pair.wait), st.sampled_from([0.25, 1.0, 2.0, 4.0, 25.0])),
)


@settings(max_examples=SCHEDULES, deadline=None, derandomize=True, database=None)
@given(st.lists(ACTIONS, min_size=30, max_size=90))
def test_queue_equals_its_twin_and_every_task_ends_exactly_once(
    schedule: list[tuple[Callable[..., None], ...]],
) -> None:
    pair = Pair()
    for worker in range(3):
        pair.start(worker)

    for action, *arguments in schedule:
        action(pair, *arguments)
    valid = Counter(grant.key for grant in pair.grants if pair.extended(grant))
    pair.wait(2000.0)
    pair.start(0)

    assert set(valid.values()) <= {1}
    assert pair.queue.snapshot() == ()
    assert pair.queue.next_wakeup() is None
    assert pair.ended == pair.begun


@pytest.mark.parametrize("seed", range(20))
def test_tasks_survive_crashing_consumers_and_are_answered_once(seed: int) -> None:
    rng = random.Random(seed)
    numbers = count(1)
    queue = LeaseQueue(QueueLimits(max_attempts=1000), new_lease_id=lambda: LeaseId(f"lease-{next(numbers)}"))
    clock = VirtualClock()
    offers = WorkerCapability(frozenset({"llama"}), 16, "float16", "fp")
    epochs = Counter(dict.fromkeys(range(4), 1))
    holding: dict[int, list[Grant]] = {worker: [] for worker in range(4)}
    for name in range(20):
        spec = TaskSpec(_key(name), b"", Capability("llama", 16, "float16", "fp"), priority=rng.choice([0, 10]))
        queue.submit(spec, payload=name, now=clock.now())
    for worker in range(4):
        queue.attach(_worker(worker), Epoch(1), offers, now=clock.now())
    outcomes: list[Outcome] = []

    for _ in range(4000):
        worker = rng.randrange(4)
        now = clock.advance(rng.choice([0.0, 0.25, 1.0]))
        holding[worker] += queue.lease(_worker(worker), Epoch(epochs[worker]), max_tasks=2, now=now)
        match rng.choice(["crash", "silent", "restart", "fail", "complete"]):
            case "crash":
                queue.detach(_worker(worker), Epoch(epochs[worker]), now=now)
                queue.attach(_worker(worker), Epoch(epochs[worker]), offers, now=now)
            case "restart":
                epochs[worker] += 1
                queue.attach(_worker(worker), Epoch(epochs[worker]), offers, now=now)
            case "fail" if holding[worker]:
                grant = holding[worker].pop(0)
                with contextlib.suppress(MeshError):
                    queue.fail(grant.key, grant.lease_id, retryable=True, now=now)
            case "complete" if holding[worker]:
                grant = holding[worker].pop()
                with contextlib.suppress(MeshError):
                    queue.complete(grant.key, grant.lease_id, grant.lease_id, now=now)
        queue.check_integrity()
        outcomes += [effect for effect in queue.take_effects() if isinstance(effect, Outcome)]

    assert sorted(int(outcome.key.request_id) for outcome in outcomes) == list(range(20))
    assert all(isinstance(outcome, TaskCompleted) for outcome in outcomes)
    assert queue.stats().leased == 0
