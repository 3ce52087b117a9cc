from collections.abc import Iterable

import pytest

from kvmesh.core.errors import ConflictError, NotKnownError, Reason
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.load_report import LoadReport, ReportOutcome, ReportResult, RouterLoad
from kvmesh.core.load_table import LoadTable
from kvmesh.core.prompt_blocks import PromptBlocks

W0, W1 = (WorkerRank(WorkerId(f"n/decode/{number}")) for number in range(2))
OURS, OTHER, THIRD = RouterId("router-1"), RouterId("router-2"), RouterId("router-3")
EPOCH = Epoch(7)
R1, R2, R3 = (AttemptKey(RequestId(f"r{number}"), 1) for number in (1, 2, 3))


@pytest.fixture
def table() -> LoadTable:
    made = LoadTable(OURS)
    made.put_worker(W0, EPOCH, now=0)
    return made


def blocks(*numbers: int) -> tuple[SequenceHash, ...]:
    return tuple(map(SequenceHash, numbers))


def reserve(
    table: LoadTable, key: AttemptKey, *numbers: int, tokens: int = 0, unhashed: int = 0, now: float = 0
) -> int:
    return table.reserve(
        key, W0, block_hashes=blocks(*numbers), prefill_tokens=tokens, unhashed_blocks=unhashed, now=now
    )


def report(
    sequence: int,
    *,
    shows: Iterable[int] = (),
    epoch: Epoch = EPOCH,
    per_router: dict[RouterId, RouterLoad] | None = None,
    unrouted: RouterLoad | None = None,
    at: float = 0,
    total_blocks: int = 0,
) -> LoadReport:
    return LoadReport(
        epoch=epoch,
        sequence=sequence,
        received_at=at,
        per_router=per_router or {},
        unrouted=unrouted or RouterLoad(),
        reservation_ids=frozenset(shows),
        total_blocks=total_blocks,
    )


def carried(table: LoadTable) -> tuple[int, int]:
    """What the first worker carries: blocks, prompt tokens."""
    load = table.estimate(W0)
    return load.decode_blocks, load.prefill_tokens


def test_shared_blocks_are_counted_once_while_any_booking_holds_them(table: LoadTable) -> None:
    seen = []

    reserve(table, R1, 1, 2, 3, tokens=12)
    seen.append(carried(table))
    reserve(table, R2, 4, tokens=4)
    seen.append(carried(table))
    reserve(table, R3, 1, 2, 3, 4)
    seen.append(carried(table))
    for key in (R2, R3, R1):
        table.release(key, now=1)
        seen.append(carried(table))

    assert seen == [(3, 12), (4, 16), (4, 16), (4, 12), (3, 12), (0, 0)]


def test_prefill_completes_once(table: LoadTable) -> None:
    reserve(table, R1, 1, 2, tokens=40)
    reserve(table, R2, 1, tokens=5)

    table.complete_prefill(R1, now=1)
    table.complete_prefill(R1, now=1)

    assert carried(table) == (2, 5)


def test_output_and_unhashed_blocks_are_shared_with_nobody(table: LoadTable) -> None:
    reserve(table, R1, 1, unhashed=2)
    reserve(table, R2, 1, unhashed=2)

    table.add_output_blocks(R1, 3, now=1)

    assert carried(table) == (8, 0)
    table.release(R1, now=1)
    assert carried(table) == (3, 0)


@pytest.mark.parametrize(("total", "counted"), [(100, 100), (0, 3_000)])
def test_output_of_a_booking_counts_for_no_more_than_the_pool_that_the_worker_told_of(
    table: LoadTable, total: int, counted: int
) -> None:
    table.apply_report(W0, report(1, total_blocks=total), now=0)
    reserve(table, R1, 1)

    for _ in range(3):
        table.add_output_blocks(R1, 1_000, now=1)

    assert carried(table) == (1 + counted, 0)
    table.release(R1, now=1)
    assert carried(table) == (0, 0)


@pytest.mark.parametrize(
    ("added", "expected", "blocks_there"),
    [
        pytest.param([1], 4.0, 1, id="three quarters of a block, rounded up"),
        pytest.param([2], 4.0, 2, id="0.75 + 0.5"),
        pytest.param([1, 1, 1], 4.0, 2, id="0.75 + 0.5 + 0.25, in steps"),
        pytest.param([9], 4.0, 2, id="beyond what was expected nothing is added"),
        pytest.param([1], 0.5, 0, id="less than a block was expected"),
        pytest.param([9], None, 9, id="nothing was expected"),
    ],
)
def test_output_blocks_count_for_less_the_nearer_the_request_is_to_its_end(
    table: LoadTable, added: list[int], expected: float | None, blocks_there: int
) -> None:
    table.reserve(R1, W0, block_hashes=(), prefill_tokens=0, expected_output_blocks=expected, now=0)

    for count in added:
        table.add_output_blocks(R1, count, now=1)

    assert carried(table) == (blocks_there, 0)
    table.release(R1, now=1)
    assert carried(table) == (0, 0)


def test_parts_of_output_blocks_are_rounded_once_for_all_requests_of_a_worker(table: LoadTable) -> None:
    for key in (R1, R2, R3):
        table.reserve(key, W0, block_hashes=(), prefill_tokens=0, expected_output_blocks=1.5, now=0)
        table.add_output_blocks(key, 1, now=1)

    assert carried(table) == (1, 0)


def test_blocks_of_prompts_hashed_from_tokens_are_shared_like_any_others(table: LoadTable) -> None:
    prompts = [PromptBlocks.of_local(locals_, 4) for locals_ in ([1, 2, 3], [1, 2, 9], [8, 2, 3])]

    for key, prompt in zip((R1, R2, R3), prompts, strict=True):
        table.reserve(key, W0, block_hashes=prompt, prefill_tokens=0, now=0)

    assert carried(table) == (3 + 1 + 3, 0)
    assert table.active_prefix_blocks(W0, PromptBlocks.of_local([1, 2, 7], 4)) == 2
    assert reserve_again(table, R1, prompts[0]) == 1
    with pytest.raises(ConflictError):
        reserve_again(table, R1, prompts[1])


def reserve_again(table: LoadTable, key: AttemptKey, prompt: PromptBlocks) -> int:
    return table.reserve(key, W0, block_hashes=PromptBlocks.of_local(prompt.local or (), 4), prefill_tokens=0, now=1)


def test_release_is_idempotent_for_300_s_and_then_the_key_is_unknown(table: LoadTable) -> None:
    reserve(table, R1, 1)

    first = table.release(R1, now=10)
    again = table.release(R1, now=310)

    assert (first, again) == (True, False)
    with pytest.raises(NotKnownError) as caught:
        table.release(R1, now=310.1)
    assert caught.value.reason is Reason.NOT_FOUND


def test_ended_booking_takes_progress_without_effect(table: LoadTable) -> None:
    reserve(table, R1, 1, tokens=4)
    table.release(R1, now=1)

    table.complete_prefill(R1, now=2)
    table.add_output_blocks(R1, 5, now=2)

    assert table.acknowledge(R1, 3, now=2) is False
    assert table.estimate(W0) == RouterLoad()


def test_key_never_seen_is_not_found_and_changes_nothing(table: LoadTable) -> None:
    reserve(table, R2, 1, tokens=4)

    for act in (
        lambda: table.release(R1, now=1),
        lambda: table.complete_prefill(R1, now=1),
        lambda: table.add_output_blocks(R1, 1, now=1),
        lambda: table.acknowledge(R1, 1, now=1),
    ):
        with pytest.raises(NotKnownError) as caught:
            act()
        assert caught.value.reason is Reason.NOT_FOUND

    assert table.estimate(W0) == RouterLoad(1, 4, 1)


def test_same_booking_again_gets_the_same_id(table: LoadTable) -> None:
    first = reserve(table, R1, 1, 2, tokens=8)

    again = reserve(table, R1, 1, 2, tokens=8)

    assert again == first
    assert table.estimate(W0) == RouterLoad(1, 8, 2)


def test_same_booking_again_is_the_same_even_after_its_prefill_completed(table: LoadTable) -> None:
    first = reserve(table, R1, 1, 2, tokens=8)
    table.complete_prefill(R1, now=1)
    table.add_output_blocks(R1, 1, now=1)

    again = reserve(table, R1, 1, 2, tokens=8)

    assert again == first
    assert table.estimate(W0) == RouterLoad(1, 0, 3)


def test_same_key_with_other_content_conflicts_and_changes_nothing(table: LoadTable) -> None:
    reserve(table, R1, 1, 2, tokens=8)

    with pytest.raises(ConflictError) as caught:
        reserve(table, R1, 1, 2, 3, tokens=8)

    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert table.estimate(W0) == RouterLoad(1, 8, 2)


def test_key_of_an_ended_booking_cannot_be_booked_again(table: LoadTable) -> None:
    reserve(table, R1, 1)
    table.release(R1, now=1)

    with pytest.raises(ConflictError, match="has ended") as caught:
        reserve(table, R1, 1, now=2)

    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert reserve(table, AttemptKey(R1.request_id, 2), 1, now=2) == 2


def test_worker_that_is_not_followed_takes_no_booking(table: LoadTable) -> None:
    with pytest.raises(NotKnownError):
        table.reserve(R1, W1, block_hashes=(), prefill_tokens=1, now=0)

    assert table.estimate(W1) == RouterLoad()
    with pytest.raises(NotKnownError):
        table.release(R1, now=0)


def test_estimate_is_own_bookings_plus_the_load_of_all_others(table: LoadTable) -> None:
    reserve(table, R1, 1, 2, tokens=10)

    table.apply_report(
        W0,
        report(
            1,
            shows=[1],
            per_router={OURS: RouterLoad(50, 500, 5000), OTHER: RouterLoad(1, 20, 3), THIRD: RouterLoad(2, 30, 4)},
            unrouted=RouterLoad(1, 5, 6),
        ),
        now=1,
    )

    assert table.estimate(W0) == RouterLoad(1 + 1 + 2 + 1, 10 + 20 + 30 + 5, 2 + 3 + 4 + 6)


def test_report_replaces_the_one_before(table: LoadTable) -> None:
    table.apply_report(W0, report(1, per_router={OTHER: RouterLoad(1, 20, 3)}), now=1)

    table.apply_report(W0, report(2, per_router={THIRD: RouterLoad(2, 2, 2)}), now=2)

    assert table.estimate(W0) == RouterLoad(2, 2, 2)


@pytest.mark.parametrize(
    ("worker", "sent", "expected"),
    [
        pytest.param(W1, report(9), ReportOutcome.UNKNOWN_WORKER, id="not followed"),
        pytest.param(W0, report(9, epoch=Epoch(6)), ReportOutcome.STALE_EPOCH, id="another incarnation"),
        pytest.param(W0, report(4), ReportOutcome.OLD_SEQUENCE, id="the same sequence"),
        pytest.param(W0, report(3), ReportOutcome.OLD_SEQUENCE, id="an older sequence"),
    ],
)
def test_report_that_is_not_news_changes_nothing(
    table: LoadTable, worker: WorkerRank, sent: LoadReport, expected: ReportOutcome
) -> None:
    reserve(table, R1, 1)
    table.apply_report(W0, report(4, shows=[1], unrouted=RouterLoad(1, 2, 3), at=1), now=1)

    result = table.apply_report(worker, sent, now=2)

    assert result == ReportResult(expected)
    assert table.estimate(W0) == RouterLoad(2, 2, 4)
    assert table.age_s(W0, now=2) == 1


def test_booking_ends_when_a_report_after_the_acknowledgement_misses_it(table: LoadTable) -> None:
    reserve(table, R1, 1, tokens=4)
    table.acknowledge(R1, 5, now=1)

    same = table.apply_report(W0, report(5), now=1)
    later = table.apply_report(W0, report(6), now=1)

    assert same.released == ()
    assert later.released == (R1,)
    assert table.estimate(W0) == RouterLoad()
    assert table.release(R1, now=2) is False


def test_booking_ends_when_a_report_shows_it_no_more(table: LoadTable) -> None:
    number = reserve(table, R1, 1, tokens=4)
    shown = table.apply_report(W0, report(5, shows=[number]), now=1)

    gone = table.apply_report(W0, report(6), now=1)

    assert shown.released == ()
    assert gone.released == (R1,)


def test_booking_that_no_report_can_know_of_survives_every_report(table: LoadTable) -> None:
    reserve(table, R1, 1, tokens=4)

    results = [table.apply_report(W0, report(sequence), now=1) for sequence in (5, 6, 7)]

    assert [result.released for result in results] == [(), (), ()]
    assert table.estimate(W0) == RouterLoad(1, 4, 1)


def test_acknowledgement_that_comes_after_a_newer_report_ends_the_booking(table: LoadTable) -> None:
    reserve(table, R1, 1)
    table.apply_report(W0, report(6), now=1)

    ended = table.acknowledge(R1, 5, now=1)

    assert ended is True
    assert table.estimate(W0) == RouterLoad()


def test_first_acknowledgement_counts(table: LoadTable) -> None:
    reserve(table, R1, 1)
    table.acknowledge(R1, 5, now=1)

    table.acknowledge(R1, 100, now=1)

    assert table.apply_report(W0, report(6), now=1).released == (R1,)


def test_booking_that_no_report_shows_expires_after_30_s(table: LoadTable) -> None:
    reserve(table, R1, 1, tokens=4, now=0)
    shown = reserve(table, R2, 2, tokens=4, now=0)
    table.apply_report(W0, report(1, shows=[shown]), now=20)

    early, due, last = (table.expire(now=now) for now in (29.9, 30, 50))

    assert (early, due, last) == ((), (R1,), (R2,))
    assert table.estimate(W0) == RouterLoad()
    assert table.release(R1, now=51) is False


def test_end_of_a_worker_ends_its_bookings(table: LoadTable) -> None:
    second = WorkerRank(W0.worker_id, 1)
    table.put_worker(second, EPOCH, now=0)
    reserve(table, R1, 1)
    table.reserve(R2, second, block_hashes=blocks(1), prefill_tokens=1, now=0)

    ended = table.remove_worker(W0.worker_id, now=1)

    assert set(ended) == {R1, R2}
    assert table.estimate(W0) == table.estimate(second) == RouterLoad()
    assert table.release(R1, now=2) is False
    assert table.apply_report(W0, report(1), now=2).outcome is ReportOutcome.UNKNOWN_WORKER


def test_new_incarnation_starts_with_nothing(table: LoadTable) -> None:
    reserve(table, R1, 1)
    table.apply_report(W0, report(900, shows=[1], unrouted=RouterLoad(1, 1, 1)), now=1)

    same, other = table.put_worker(W0, EPOCH, now=2), table.put_worker(W0, Epoch(8), now=3)

    assert (same, other) == ((), (R1,))
    assert table.estimate(W0) == RouterLoad()
    assert table.report(W0) is None
    assert table.apply_report(W0, report(1, epoch=Epoch(8)), now=4).outcome is ReportOutcome.APPLIED


def test_age_counts_from_the_last_report_or_from_when_the_worker_is_followed(table: LoadTable) -> None:
    before = table.age_s(W0, now=4)

    table.apply_report(W0, report(1, at=5), now=5)

    assert (before, table.age_s(W0, now=7)) == (4, 2)
    assert table.age_s(W1, now=7) == float("inf")


def test_active_prefix_is_the_part_of_a_chain_that_bookings_hold(table: LoadTable) -> None:
    reserve(table, R1, 1, 2, 3)

    assert [table.active_prefix_blocks(W0, blocks(*range(1, end))) for end in range(1, 7)] == [0, 1, 2, 3, 3, 3]
    assert table.active_prefix_blocks(W0, blocks(9, 2, 3)) == 0
    assert table.active_prefix_blocks(W1, blocks(1)) == 0


def test_memory_of_ended_keys_is_bounded_and_drops_the_oldest() -> None:
    table = LoadTable(OURS, max_released=2)
    table.put_worker(W0, EPOCH, now=0)
    for key in (R1, R2, R3):
        reserve(table, key, 1)

    for key in (R1, R2, R3):
        table.release(key, now=1)

    with pytest.raises(NotKnownError):
        table.release(R1, now=1)
    assert table.release(R2, now=1) is False


def test_reservation_ids_start_where_they_are_told() -> None:
    table = LoadTable(OURS, first_reservation_id=1_000)
    table.put_worker(W0, EPOCH, now=0)

    assert (reserve(table, R1, 1), reserve(table, R2, 1)) == (1_000, 1_001)
    assert table.booking_count(W0) == 2
    assert table.router_id == OURS
