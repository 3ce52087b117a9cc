"""What each worker rank carries, as one router knows it.

    estimate of a worker = own bookings + reported load of all OTHER routers + reported load that came unrouted

Laws:
    - the router's own share of a report never adds load, it only corrects bookings;
    - a block is counted once per worker, however many bookings hold it (equal key = equal block);
    - the output of a booking counts for no more blocks than its worker says that it has;
    - output blocks of a request of which the length is expected count for less the nearer it is to its end;
    - a booking ends exactly once, by one of: release; a report that shows it no more; a report newer than the worker's
      acknowledgement that never showed it; `booking_ttl_s` in which no report showed it; the end of its worker;
    - an ended booking's key stays known for `released_ttl_s`, whatever ended it, and cannot be booked again.
"""

from collections import OrderedDict
from collections.abc import Sequence

from kvmesh.core.active_blocks import ActiveBlocks
from kvmesh.core.bookings import Booking, RankLoad
from kvmesh.core.errors import ConflictError, NotKnownError, Reason
from kvmesh.core.ids import AttemptKey, Epoch, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.load_report import LoadReport, ReportOutcome, ReportResult, RouterLoad
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.rank_columns import (
    BLOCKS,
    HEARD_AT,
    IS_REPORTED,
    MAX_REQUESTS,
    PREFILL_TOKENS,
    REQUESTS,
    TOTAL_BLOCKS,
    WAITING,
    RankColumns,
)

__all__ = ["LoadReport", "LoadTable", "ReportOutcome", "ReportResult", "RouterLoad"]


class LoadTable:
    """Bookings of one router and the load reports of its workers; not thread-safe."""

    def __init__(
        self,
        router_id: RouterId,
        *,
        first_reservation_id: int = 1,
        booking_ttl_s: float = 30.0,
        released_ttl_s: float = 300.0,
        max_released: int = 500_000,
    ) -> None:
        """Start empty; a router_id that outlives its process needs a `first_reservation_id` never used before."""
        self._router_id = router_id
        self._next_reservation_id = first_reservation_id
        self._booking_ttl_s = booking_ttl_s
        self._released_ttl_s = released_ttl_s
        self._max_released = max_released
        self.columns = RankColumns()
        """One row per followed rank; the load table writes all of it but INDEX_CHANGED_AT."""
        self._active = ActiveBlocks()
        self._ranks: dict[WorkerRank, RankLoad] = {}
        self._bookings: dict[AttemptKey, Booking] = {}
        self._released_at: OrderedDict[AttemptKey, float] = OrderedDict()  # the oldest first

    @property
    def router_id(self) -> RouterId:
        """Whose bookings these are."""
        return self._router_id

    def put_worker(self, worker: WorkerRank, epoch: Epoch, *, now: float) -> tuple[AttemptKey, ...]:
        """Follow a rank; another epoch of it ends the bookings of the one before, which are returned."""
        load = self._ranks.get(worker)
        if load is not None and load.epoch == epoch:
            return ()
        ended = self._end_all(load, now=now) if load is not None else ()
        self._ranks[worker] = RankLoad(epoch, since=now, row=self.columns.add(worker, now=now))
        return ended

    def remove_worker(self, worker_id: WorkerId, *, now: float) -> tuple[AttemptKey, ...]:
        """Forget every rank of a worker; returns the bookings that this ended."""
        gone = [worker for worker in self._ranks if worker.worker_id == worker_id]
        ended: list[AttemptKey] = []
        for worker in gone:
            ended += self._end_all(self._ranks.pop(worker), now=now)
            self.columns.remove(worker)
        return tuple(ended)

    def reserve(
        self,
        key: AttemptKey,
        worker: WorkerRank,
        *,
        block_hashes: Sequence[SequenceHash],
        prefill_tokens: int,
        unhashed_blocks: int = 0,
        expected_output_blocks: float | None = None,
        now: float,
    ) -> int:
        """Book a request and return its reservation id; the same again changes nothing and returns the same.

        `block_hashes` are a chain from block 0. `prefill_tokens` are those still to compute on this worker;
        `unhashed_blocks` are blocks shared with nobody. With `expected_output_blocks`, output blocks decay.
        Raises: ConflictError(ALREADY_EXISTS) if the key is booked with other content or has ended;
        NotKnownError(NOT_FOUND) if the worker is not followed.
        """
        assert prefill_tokens >= 0, prefill_tokens
        assert unhashed_blocks >= 0, unhashed_blocks
        keys = _keys_of(block_hashes)
        content = (worker, keys, prefill_tokens, unhashed_blocks, expected_output_blocks)
        held = self._bookings.get(key)
        if held is not None:
            if held.content != content:
                raise ConflictError(Reason.ALREADY_EXISTS, f"{key}: reserved with other content")
            return held.reservation_id
        self.require_unused(key, now=now)
        load = self._ranks.get(worker)
        if load is None:
            raise NotKnownError(Reason.NOT_FOUND, f"{worker} is not followed")
        booking = Booking(
            key,
            self._next_reservation_id,
            worker,
            keys,
            unhashed_blocks,
            content,
            prefill_tokens,
            expected_output_blocks,
            seen_at=now,
        )
        self._next_reservation_id += 1
        self._bookings[key] = load.bookings[key] = booking
        load.held_blocks += self._active.add(load.row, keys)
        load.unhashed_blocks += unhashed_blocks
        load.prefill_tokens += prefill_tokens
        self._publish(load)
        return booking.reservation_id

    def require_unused(self, key: AttemptKey, *, now: float) -> None:
        """Raise ConflictError(ALREADY_EXISTS) if this key is booked, or was and ended lately."""
        if key in self._bookings:
            raise ConflictError(Reason.ALREADY_EXISTS, f"{key}: reserved already")
        if self._ended_lately(key, now=now):
            raise ConflictError(
                Reason.ALREADY_EXISTS,
                f"{key}: its reservation has ended, and is not made again with any content; the next attempt is free",
            )

    def complete_prefill(self, key: AttemptKey, *, now: float) -> None:
        """Take a booking's prefill tokens off its worker. Idempotent. Raises: NotKnownError(NOT_FOUND)."""
        booking = self._find(key, now=now)
        if booking is not None:
            load = self._ranks[booking.worker]
            load.prefill_tokens -= booking.prefill_tokens
            booking.prefill_tokens = 0
            self._publish(load)

    def add_output_blocks(self, key: AttemptKey, count: int, *, now: float) -> None:
        """Add blocks of generated tokens, which may decay; NOT idempotent. Raises: NotKnownError(NOT_FOUND)."""
        assert count >= 0, count
        booking = self._find(key, now=now)
        if booking is None or not count:
            return
        load = self._ranks[booking.worker]
        load.output_parts -= booking.output_parts
        booking.output_blocks += count
        if load.report is not None and load.report.total_blocks:  # 0 = not said
            booking.output_blocks = min(booking.output_blocks, load.report.total_blocks)
        load.output_parts += booking.output_parts
        self._publish(load)

    def acknowledge(self, key: AttemptKey, accepted_load_sequence: int, *, now: float) -> bool:
        """Note that the worker took the request in; True if its latest report, being newer, ended the booking already.

        Idempotent: the first sequence counts. Raises: NotKnownError(NOT_FOUND).
        """
        booking = self._find(key, now=now)
        if booking is None:
            return False
        if booking.accepted_sequence is None:
            booking.accepted_sequence = accepted_load_sequence
        report = self._ranks[booking.worker].report
        if report is None or not booking.is_ended_by(report):
            return False
        self._end(booking, now=now)
        return True

    def release(self, key: AttemptKey, *, now: float) -> bool:
        """End a booking; False if it had ended before. Raises: NotKnownError(NOT_FOUND) if it was never seen."""
        booking = self._find(key, now=now)
        if booking is None:
            return False
        self._end(booking, now=now)
        return True

    def apply_report(self, worker: WorkerRank, report: LoadReport, *, now: float) -> ReportResult:
        """Take a worker's report in and end the bookings it proves to be over."""
        load = self._ranks.get(worker)
        if load is None:
            return ReportResult(ReportOutcome.UNKNOWN_WORKER)
        if load.epoch != report.epoch:
            return ReportResult(ReportOutcome.STALE_EPOCH)
        if load.report is not None and report.sequence <= load.report.sequence:
            return ReportResult(ReportOutcome.OLD_SEQUENCE)
        load.report = report
        others = (share for router_id, share in report.per_router.items() if router_id != self._router_id)
        load.others = sum(others, start=report.unrouted)
        column = self.columns.values[:, load.row]
        column[WAITING] = report.waiting_requests
        column[TOTAL_BLOCKS] = report.total_blocks
        column[MAX_REQUESTS] = report.max_requests
        column[HEARD_AT] = report.received_at
        column[IS_REPORTED] = 1
        self._publish(load)
        ended = [booking for booking in load.bookings.values() if booking.is_ended_by(report)]
        for booking in ended:
            self._end(booking, now=now)
        for booking in load.bookings.values():
            if booking.reservation_id in report.reservation_ids:
                booking.was_shown, booking.seen_at = True, now
        return ReportResult(ReportOutcome.APPLIED, tuple(booking.key for booking in ended))

    def expire(self, *, now: float) -> tuple[AttemptKey, ...]:
        """End the bookings that no report has shown for `booking_ttl_s`, and forget keys that ended long ago."""
        overdue = [b for b in self._bookings.values() if now - b.seen_at >= self._booking_ttl_s]
        for booking in overdue:
            self._end(booking, now=now)
        self._forget_ended(now=now)
        return tuple(booking.key for booking in overdue)

    def estimate(self, worker: WorkerRank) -> RouterLoad:
        """Return the load of a rank as this router knows it, nothing for one it does not follow. O(1)."""
        load = self._ranks.get(worker)
        return load.estimate if load is not None else RouterLoad()

    def active_prefix_blocks(self, worker: WorkerRank, block_hashes: Sequence[SequenceHash]) -> int:
        """Count the leading blocks of a chain that bookings hold on this rank. O(log blocks)."""
        load = self._ranks.get(worker)
        return self._active.depth(load.row, _keys_to_read(block_hashes)) if load is not None else 0

    def match_active(self, block_hashes: Sequence[SequenceHash]) -> Sequence[tuple[int, int]]:
        """Return (rows as bits, leading blocks of a chain that bookings hold there), each row once, none at 0."""
        return self._active.match_masks(_keys_to_read(block_hashes))

    def booking_count(self, worker: WorkerRank) -> int:
        """Count the bookings on a rank."""
        load = self._ranks.get(worker)
        return len(load.bookings) if load is not None else 0

    def report(self, worker: WorkerRank) -> LoadReport | None:
        """Return the last report applied, or None."""
        load = self._ranks.get(worker)
        return load.report if load is not None else None

    def age_s(self, worker: WorkerRank, *, now: float) -> float:
        """Return the age of what is known of this rank: since its last report, or since it is followed."""
        load = self._ranks.get(worker)
        if load is None:
            return float("inf")
        return now - (load.report.received_at if load.report is not None else load.since)

    def _find(self, key: AttemptKey, *, now: float) -> Booking | None:
        booking = self._bookings.get(key)
        if booking is None and not self._ended_lately(key, now=now):
            raise NotKnownError(Reason.NOT_FOUND, f"no reservation {key}")
        return booking

    def _ended_lately(self, key: AttemptKey, *, now: float) -> bool:
        ended_at = self._released_at.get(key)
        return ended_at is not None and now - ended_at <= self._released_ttl_s

    def _end(self, booking: Booking, *, now: float) -> None:
        load = self._ranks[booking.worker]
        del load.bookings[booking.key]
        load.held_blocks -= self._active.remove(load.row, booking.keys)
        load.unhashed_blocks -= booking.unhashed_blocks
        load.output_parts -= booking.output_parts
        load.prefill_tokens -= booking.prefill_tokens
        self._publish(load)
        self._note_ended(booking.key, now=now)

    def _end_all(self, load: RankLoad, *, now: float) -> tuple[AttemptKey, ...]:
        """End the bookings of a rank that is going away: its sums go with it."""
        for booking in load.bookings.values():
            self._active.remove(load.row, booking.keys)
            self._note_ended(booking.key, now=now)
        return tuple(load.bookings)

    def _publish(self, load: RankLoad) -> None:
        """Write the load of a rank where decisions read it."""
        estimate, values = load.estimate, self.columns.values
        values[REQUESTS, load.row] = estimate.active_requests
        values[PREFILL_TOKENS, load.row] = estimate.prefill_tokens
        values[BLOCKS, load.row] = estimate.decode_blocks

    def _note_ended(self, key: AttemptKey, *, now: float) -> None:
        del self._bookings[key]
        self._released_at[key] = now
        self._released_at.move_to_end(key)  # it may have been here long ago
        self._forget_ended(now=now)

    def _forget_ended(self, *, now: float) -> None:
        while self._released_at:
            key = next(iter(self._released_at))
            is_known = now - self._released_at[key] <= self._released_ttl_s
            if is_known and len(self._released_at) <= self._max_released:
                return
            del self._released_at[key]


def _keys_of(blocks: Sequence[SequenceHash]) -> list[int]:
    """Return the key of every block, each once: hashes that strangers made may repeat."""
    if isinstance(blocks, PromptBlocks) and blocks.key_array is not None:
        return blocks.keys
    return list(dict.fromkeys(blocks))


def _keys_to_read(blocks: Sequence[SequenceHash]) -> Sequence[int]:
    """Return the same keys, none of them made before it is read."""
    if not isinstance(blocks, PromptBlocks):
        return blocks
    view = blocks.key_view
    return blocks.keys if view is None else view
