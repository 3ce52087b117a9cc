"""Random programs run on the load table and on a naive twin, which recounts everything, must not be told apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.core.errors import ConflictError, MeshError, NotKnownError, Reason
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.load_report import LoadReport, ReportOutcome, ReportResult, RouterLoad
from kvmesh.core.load_table import LoadTable

OURS, OTHER = RouterId("router-1"), RouterId("router-2")
BOOKING_TTL_S, RELEASED_TTL_S = 30.0, 300.0
WORKERS = [WorkerRank(WorkerId(name), rank) for name in ("a", "b") for rank in (0, 1)]
KEYS = [AttemptKey(RequestId(f"r{number}"), attempt) for number in range(3) for attempt in (1, 2)]
NEVER = float("-inf")


@dataclass
class Booked:
    """One booking of the twin."""

    number: int
    worker: WorkerRank
    chain: Sequence[SequenceHash]
    prefill_tokens: int
    unhashed: int
    seen_at: float
    content: object
    expected: float | None = None
    output: int = 0
    shown: bool = False
    accepted: int | None = None


@dataclass
class NaiveLoadTable:
    """The laws of the load table, with no sum, count or index kept up to date."""

    epochs: dict[WorkerRank, Epoch] = field(default_factory=dict)
    reports: dict[WorkerRank, LoadReport] = field(default_factory=dict)
    booked: dict[AttemptKey, Booked] = field(default_factory=dict)
    ended_at: dict[AttemptKey, float] = field(default_factory=dict)
    last_number: int = 0

    def put_worker(self, worker: WorkerRank, epoch: Epoch, *, now: float) -> tuple[AttemptKey, ...]:
        if self.epochs.get(worker) == epoch:
            return ()
        self.epochs[worker] = epoch
        return self._end_on(worker, now)

    def remove_worker(self, worker_id: WorkerId, *, now: float) -> tuple[AttemptKey, ...]:
        gone = [worker for worker in self.epochs if worker.worker_id == worker_id]
        for worker in gone:
            del self.epochs[worker]
        return tuple(key for worker in gone for key in self._end_on(worker, now))

    def reserve(
        self,
        key: AttemptKey,
        worker: WorkerRank,
        *,
        block_hashes: Sequence[SequenceHash],
        prefill_tokens: int,
        unhashed_blocks: int,
        expected_output_blocks: float | None,
        now: float,
    ) -> int:
        content = (worker, block_hashes, prefill_tokens, unhashed_blocks, expected_output_blocks)
        if key in self.booked and self.booked[key].content == content:
            return self.booked[key].number
        if key in self.booked or now - self.ended_at.get(key, NEVER) <= RELEASED_TTL_S:
            raise ConflictError(Reason.ALREADY_EXISTS, "")
        if worker not in self.epochs:
            raise NotKnownError(Reason.NOT_FOUND, "")
        self.last_number += 1
        self.booked[key] = Booked(
            self.last_number,
            worker,
            block_hashes,
            prefill_tokens,
            unhashed_blocks,
            now,
            content,
            expected=expected_output_blocks,
        )
        return self.last_number

    def complete_prefill(self, key: AttemptKey, *, now: float) -> None:
        booking = self._find(key, now)
        if booking is not None:
            booking.prefill_tokens = 0

    def add_output_blocks(self, key: AttemptKey, count: int, *, now: float) -> None:
        booking = self._find(key, now)
        if booking is not None:
            booking.output += count
            report = self.reports.get(booking.worker)
            if report is not None and report.total_blocks:
                booking.output = min(booking.output, report.total_blocks)

    def acknowledge(self, key: AttemptKey, accepted_load_sequence: int, *, now: float) -> bool:
        booking = self._find(key, now)
        if booking is None:
            return False
        if booking.accepted is None:
            booking.accepted = accepted_load_sequence
        report = self.reports.get(booking.worker)
        return bool(self._end([key] if report and self._is_missed(booking, report) else [], now))

    def release(self, key: AttemptKey, *, now: float) -> bool:
        return bool(self._end([key] if self._find(key, now) else [], now))

    def apply_report(self, worker: WorkerRank, report: LoadReport, *, now: float) -> ReportResult:
        if worker not in self.epochs:
            return ReportResult(ReportOutcome.UNKNOWN_WORKER)
        if self.epochs[worker] != report.epoch:
            return ReportResult(ReportOutcome.STALE_EPOCH)
        if worker in self.reports and report.sequence <= self.reports[worker].sequence:
            return ReportResult(ReportOutcome.OLD_SEQUENCE)
        self.reports[worker] = report
        for booking in self.booked.values():
            if booking.worker == worker and booking.number in report.reservation_ids:
                booking.shown, booking.seen_at = True, now
        missed = [key for key, b in self.booked.items() if b.worker == worker and self._is_missed(b, report)]
        return ReportResult(ReportOutcome.APPLIED, self._end(missed, now))

    def expire(self, *, now: float) -> tuple[AttemptKey, ...]:
        return self._end([key for key, b in self.booked.items() if now - b.seen_at >= BOOKING_TTL_S], now)

    def estimate(self, worker: WorkerRank) -> RouterLoad:
        here = [booking for booking in self.booked.values() if booking.worker == worker]
        reported = []
        if worker in self.reports:
            report = self.reports[worker]
            reported = [report.unrouted, *(load for router, load in report.per_router.items() if router != OURS)]
        return RouterLoad(
            len(here) + sum(load.active_requests for load in reported),
            sum(b.prefill_tokens for b in here) + sum(load.prefill_tokens for load in reported),
            len({block for b in here for block in b.chain})
            + sum(b.unhashed for b in here)
            + math.ceil(sum(weight_of_output(b) for b in here))
            + sum(load.decode_blocks for load in reported),
        )

    def active_prefix_blocks(self, worker: WorkerRank, block_hashes: Sequence[SequenceHash]) -> int:
        held = {block for b in self.booked.values() if b.worker == worker for block in b.chain}
        count = 0
        while count < len(block_hashes) and block_hashes[count] in held:
            count += 1
        return count

    def booking_count(self, worker: WorkerRank) -> int:
        return sum(booking.worker == worker for booking in self.booked.values())

    def _end(self, keys: Sequence[AttemptKey], now: float) -> tuple[AttemptKey, ...]:
        for key in keys:
            del self.booked[key]
            self.ended_at[key] = now
        return tuple(keys)

    def _end_on(self, worker: WorkerRank, now: float) -> tuple[AttemptKey, ...]:
        self.reports.pop(worker, None)
        return self._end([key for key, booking in self.booked.items() if booking.worker == worker], now)

    def _find(self, key: AttemptKey, now: float) -> Booked | None:
        if key not in self.booked and now - self.ended_at.get(key, NEVER) > RELEASED_TTL_S:
            raise NotKnownError(Reason.NOT_FOUND, "")
        return self.booked.get(key)

    def _is_missed(self, booking: Booked, report: LoadReport) -> bool:
        is_newer = booking.accepted is not None and report.sequence > booking.accepted
        return booking.number not in report.reservation_ids and (booking.shown or is_newer)


def weight_of_output(booking: Booked) -> Fraction:
    """Recount block by block, exactly."""
    if booking.expected is None:
        return Fraction(booking.output)
    return sum(
        (
            max(1 - Fraction(produced) / Fraction(booking.expected), Fraction(0))
            for produced in range(1, booking.output + 1)
        ),
        Fraction(0),
    )


def chain_of(path: Sequence[int]) -> tuple[SequenceHash, ...]:
    """A number for every prefix of a path: equal prefixes, and only they, have the same."""
    return tuple(SequenceHash(int("1" + "".join(map(str, path[: end + 1])))) for end in range(len(path)))


LOADS = st.builds(RouterLoad, st.integers(0, 9), st.integers(0, 99), st.integers(0, 99))
REPORTS = st.builds(
    LoadReport,
    epoch=st.sampled_from([Epoch(1), Epoch(1), Epoch(2)]),
    sequence=st.integers(1, 12),
    received_at=st.just(0.0),
    per_router=st.fixed_dictionaries({OURS: LOADS}, optional={OTHER: LOADS}),
    unrouted=LOADS,
    reservation_ids=st.frozensets(st.integers(1, 8), max_size=8),
    total_blocks=st.sampled_from([0, 0, 7]),
)
# Prompts are leaves of a narrow tree, so that they share prefixes and branch off one another.
CHAINS = st.lists(st.sampled_from([0, 0, 1]), max_size=6).map(chain_of)


@dataclass(frozen=True)
class Step:
    """One call; each kind uses the fields it needs."""

    kind: str
    key: AttemptKey
    worker: WorkerRank
    chain: tuple[SequenceHash, ...]
    number: int
    expected: float | None
    report: LoadReport
    passes_s: float


STEPS = st.lists(
    st.builds(
        Step,
        kind=st.sampled_from(
            ["reserve"] * 6
            + ["report"] * 3
            + ["accept", "prefill", "output", "release"] * 2
            + ["expire", "put", "remove"]
        ),
        key=st.sampled_from(KEYS),
        worker=st.sampled_from(WORKERS),
        chain=CHAINS,
        number=st.integers(0, 12),
        expected=st.sampled_from([None, None, 4.0, 2.0, 0.5]),
        report=REPORTS,
        passes_s=st.sampled_from([0.0, 0.0, 0.0, 1.0, 10.0, 150.0]),
    ),
    max_size=40,
)


def run(table: LoadTable | NaiveLoadTable, step: Step, *, now: float) -> object:  # noqa: PLR0911  # one per kind
    match step.kind:
        case "reserve":
            return table.reserve(
                step.key,
                step.worker,
                block_hashes=step.chain,
                prefill_tokens=16 * step.number,
                unhashed_blocks=step.number % 3,
                expected_output_blocks=step.expected,
                now=now,
            )
        case "report":
            result = table.apply_report(step.worker, step.report, now=now)
            return result.outcome, set(result.released)
        case "accept":
            return table.acknowledge(step.key, step.number, now=now)
        case "prefill":
            return table.complete_prefill(step.key, now=now)
        case "output":
            return table.add_output_blocks(step.key, step.number, now=now)
        case "release":
            return table.release(step.key, now=now)
        case "put":
            return set(table.put_worker(step.worker, Epoch(1 + step.number % 2), now=now))
        case "remove":
            return set(table.remove_worker(step.worker.worker_id, now=now))
    return set(table.expire(now=now))


def outcome_of(table: LoadTable | NaiveLoadTable, step: Step, *, now: float) -> object:
    try:
        return run(table, step, now=now)
    except MeshError as error:
        return type(error), error.reason


def state_of(table: LoadTable | NaiveLoadTable, chain: tuple[SequenceHash, ...]) -> object:
    return [
        (table.estimate(worker), table.active_prefix_blocks(worker, chain), table.booking_count(worker))
        for worker in WORKERS
    ]


@given(steps=STEPS)
@settings(max_examples=400, deadline=None)
def test_load_table_cannot_be_told_from_a_naive_recount(steps: list[Step]) -> None:
    table = LoadTable(OURS, booking_ttl_s=BOOKING_TTL_S, released_ttl_s=RELEASED_TTL_S)
    twin = NaiveLoadTable()
    now = 0.0
    for worker in WORKERS[:3]:
        table.put_worker(worker, Epoch(1), now=now)
        twin.put_worker(worker, Epoch(1), now=now)

    for step in steps:
        now += step.passes_s

        assert outcome_of(table, step, now=now) == outcome_of(twin, step, now=now)
        assert state_of(table, step.chain) == state_of(twin, step.chain)


@given(steps=STEPS)
@settings(max_examples=200, deadline=None)
def test_no_load_is_ever_negative_and_all_is_gone_once_all_is_released(steps: list[Step]) -> None:
    table = LoadTable(OURS, booking_ttl_s=BOOKING_TTL_S, released_ttl_s=RELEASED_TTL_S)
    now = 0.0
    for worker in WORKERS:
        table.put_worker(worker, Epoch(1), now=now)

    for step in steps:
        now += step.passes_s
        if step.kind != "report":  # what others carry would stay
            outcome_of(table, step, now=now)
        for worker in WORKERS:
            load = table.estimate(worker)
            assert min(load.active_requests, load.prefill_tokens, load.decode_blocks) >= 0

    for key in KEYS:
        try:
            table.release(key, now=now)
            assert table.release(key, now=now) is False
        except NotKnownError:
            pass
    assert [table.estimate(worker) for worker in WORKERS] == [RouterLoad()] * len(WORKERS)
