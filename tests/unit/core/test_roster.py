import itertools

import pytest

from kvmesh.core.errors import FixRequestError
from kvmesh.core.ids import Epoch, WorkerId, WorkerRank
from kvmesh.core.roster import Roster, RosterOutcome, WorkerRecord, WorkerRole

A, B, C = (WorkerId(f"n/decode/{number}") for number in range(3))


def record(
    worker_id: WorkerId,
    epoch: int = 1,
    *,
    role: WorkerRole = WorkerRole.DECODE,
    models: tuple[str, ...] = ("m",),
    ranks: int = 1,
    draining: bool = False,
    block_size: int = 16,
) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        epoch=Epoch(epoch),
        role=role,
        models=models,
        block_size=block_size,
        ranks=ranks,
        draining=draining,
    )


def test_higher_epoch_takes_the_place_of_the_one_before() -> None:
    roster = Roster()

    outcomes = [roster.put(record(A, 1)), roster.put(record(A, 1, draining=True)), roster.put(record(A, 2))]

    assert outcomes == [RosterOutcome.ADDED, RosterOutcome.UPDATED, RosterOutcome.RESTARTED]
    assert roster.get(A) == record(A, 2)
    assert len(roster) == 1


def test_lower_epoch_is_ignored_and_told_so() -> None:
    roster = Roster()
    roster.put(record(A, 2))

    outcome = roster.put(record(A, 1, draining=True))

    assert outcome is RosterOutcome.STALE_EPOCH
    assert roster.get(A) == record(A, 2)


@pytest.mark.parametrize(("worker_id", "epoch"), [(A, 1), (A, 3), (B, 2)])
def test_removal_of_what_is_not_live_changes_nothing(worker_id: WorkerId, epoch: int) -> None:
    roster = Roster()
    roster.put(record(A, 2))

    outcome = roster.remove(worker_id, Epoch(epoch))

    assert outcome is RosterOutcome.STALE_EPOCH
    assert roster.get(A) == record(A, 2)


def test_removed_worker_is_gone_and_its_name_is_free() -> None:
    roster = Roster()
    roster.put(record(A, 2))
    assert roster.of(WorkerRole.DECODE, "m") == (record(A, 2),)

    outcome = roster.remove(A, Epoch(2))

    assert outcome is RosterOutcome.REMOVED
    assert roster.get(A) is None
    assert roster.of(WorkerRole.DECODE, "m") == ()
    assert roster.put(record(A, 1)) is RosterOutcome.ADDED


@pytest.mark.parametrize("arrival", list(itertools.permutations([A, B, C])))
def test_workers_are_listed_by_name_whatever_the_order_of_arrival(arrival: tuple[WorkerId, ...]) -> None:
    roster = Roster()

    for worker_id in arrival:
        roster.put(record(worker_id))

    assert [each.worker_id for each in roster.of(WorkerRole.DECODE, "m")] == [A, B, C]
    assert [each.worker_id for each in roster.records()] == [A, B, C]


def test_workers_are_found_by_role_and_model_as_they_change() -> None:
    roster = Roster()
    roster.put(record(A, models=("m", "n")))
    roster.put(record(B, role=WorkerRole.PREFILL))
    before = roster.of(WorkerRole.DECODE, "n")

    roster.put(record(A, models=("m",)))

    assert [each.worker_id for each in before] == [A]
    assert roster.of(WorkerRole.DECODE, "n") == ()
    assert [each.worker_id for each in roster.of(WorkerRole.PREFILL, "m")] == [B]
    assert roster.records(WorkerRole.PREFILL) == (record(B, role=WorkerRole.PREFILL),)
    assert roster.models() == {"m"}


def test_block_sizes_are_those_of_the_workers_as_they_change() -> None:
    roster = Roster()
    roster.put(record(A))
    roster.put(record(B, block_size=64))
    before = roster.block_sizes(WorkerRole.DECODE, "m")

    roster.remove(A, Epoch(1))

    assert before == {16, 64}
    assert roster.block_sizes(WorkerRole.DECODE, "m") == {64}
    assert roster.block_sizes(WorkerRole.PREFILL, "m") == frozenset()


def test_a_model_that_nobody_served_is_found_once_somebody_does() -> None:
    roster = Roster()
    assert roster.of(WorkerRole.DECODE, "m") == ()

    roster.put(record(A))

    assert roster.of(WorkerRole.DECODE, "m") == (record(A),)


@pytest.mark.parametrize(
    ("rank", "epoch", "is_live"), [(0, 2, True), (1, 2, True), (2, 2, False), (-1, 2, False), (0, 1, False)]
)
def test_only_ranks_of_the_live_incarnation_are_live(rank: int, epoch: int, *, is_live: bool) -> None:
    roster = Roster()
    roster.put(record(A, 2, ranks=2))

    assert roster.is_live(WorkerRank(A, rank), Epoch(epoch)) == is_live
    assert not roster.is_live(WorkerRank(B, rank), Epoch(epoch))


def test_record_names_every_rank_in_order() -> None:
    assert record(A, ranks=3).worker_ranks == (WorkerRank(A, 0), WorkerRank(A, 1), WorkerRank(A, 2))


@pytest.mark.parametrize(("field", "ranks", "block_size"), [("ranks", 0, 16), ("block_size", 1, 0)])
def test_record_without_ranks_or_block_size_is_refused(field: str, ranks: int, block_size: int) -> None:
    with pytest.raises(FixRequestError) as caught:
        WorkerRecord(worker_id=A, epoch=Epoch(1), models=("m",), block_size=block_size, ranks=ranks)

    assert caught.value.field == field
