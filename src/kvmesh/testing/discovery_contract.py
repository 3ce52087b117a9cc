"""What every Discovery must do: subclass it in a test module and give it a `discovery` fixture."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from kvmesh.core.errors import ConflictError, FixRequestError, MeshError, NotKnownError, Reason
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord
from kvmesh.discovery.discovery import Deleted, Discovery, DiscoveryEvent, Put, Registration, Snapshot

NAMESPACE = "contract"
WAIT_S = 10.0


def make_record(number: int = 0, *, epoch: int = 1, **changes: Any) -> WorkerRecord:
    """Return a valid record of worker `number`."""
    record = WorkerRecord(
        worker_id=WorkerId(f"node/decode/{number:04}"),
        epoch=Epoch(epoch),
        models=("m",),
        namespace=NAMESPACE,
        block_size=16,
        address=f"127.0.0.1:{1000 + number}",
    )
    return replace(record, **changes)


class DiscoveryContract:
    """The suite; `discovery` is a fixture of the subclass, closed by it."""

    async def lose(self, registration: Registration) -> None:
        """Make the store delete the record on its own, as when a lease is lost."""
        raise NotImplementedError

    async def test_watch_begins_with_a_snapshot_and_goes_on_with_changes(self, discovery: Discovery) -> None:
        """No record falls between the snapshot and the changes."""
        await discovery.register(make_record(0))
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            first = await _next(events)
            await discovery.register(make_record(1))
            second = await _next(events)

        assert first == Snapshot((make_record(0),))
        assert second == Put(make_record(1))

    async def test_what_the_store_holds_is_registered(self, discovery: Discovery) -> None:
        """Who waits for its record to stand goes on."""
        registration = await discovery.register(make_record(0))

        async with asyncio.timeout(WAIT_S):
            await registration.wait_registered()

    async def test_empty_store_answers_an_empty_snapshot(self, discovery: Discovery) -> None:
        """A watcher learns that nobody is there, rather than nothing."""
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            assert await _next(events) == Snapshot(())

    async def test_update_is_a_put_of_the_same_epoch(self, discovery: Discovery) -> None:
        """Draining, for one, is told this way."""
        registration = await discovery.register(make_record(0))
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            await _next(events)
            await registration.update(make_record(0, draining=True))

            assert await _next(events) == Put(make_record(0, draining=True))

    async def test_update_to_another_identity_is_refused(self, discovery: Discovery) -> None:
        """A registration is of one worker, epoch and namespace."""
        registration = await discovery.register(make_record(0))

        for other in (make_record(1), make_record(0, epoch=2), make_record(0, namespace="other")):
            with pytest.raises(FixRequestError) as caught:
                await registration.update(other)
            assert caught.value.reason is Reason.INVALID_FIELD

        assert await _records(discovery) == (make_record(0),)

    async def test_graceful_stop_is_told_as_such_and_only_once(self, discovery: Discovery) -> None:
        """Stop is idempotent."""
        registration = await discovery.register(make_record(0))
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            await _next(events)
            await registration.stop()
            await registration.stop()
            await discovery.register(make_record(1))

            assert await _next(events) == Deleted(make_record(0).worker_id, Epoch(1), graceful=True)
            assert await _next(events) == Put(make_record(1))

    async def test_update_after_stop_is_refused(self, discovery: Discovery) -> None:
        """A stopped worker does not come back by a late update."""
        registration = await discovery.register(make_record(0))
        await registration.stop()

        with pytest.raises(NotKnownError):
            await registration.update(make_record(0))

        assert await _records(discovery) == ()

    async def test_lost_record_is_told_as_not_graceful_and_update_puts_it_back(self, discovery: Discovery) -> None:
        """The worker may well be alive: only the store forgot it."""
        registration = await discovery.register(make_record(0))
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            await _next(events)
            await self.lose(registration)
            lost = await _next(events)
            await registration.update(make_record(0))

            assert lost == Deleted(make_record(0).worker_id, Epoch(1), graceful=False)
            assert await _next(events) == Put(make_record(0))

    async def test_higher_epoch_takes_the_place_of_the_lower(self, discovery: Discovery) -> None:
        """The old incarnation can no longer change or delete the record."""
        old = await discovery.register(make_record(0, epoch=1))
        await discovery.register(make_record(0, epoch=2))

        with pytest.raises(ConflictError) as caught:
            await old.update(make_record(0, epoch=1))
        await old.stop()

        assert caught.value.reason is Reason.STALE_EPOCH
        assert await _records(discovery) == (make_record(0, epoch=2),)

    async def test_lower_epoch_is_refused_and_told_so(self, discovery: Discovery) -> None:
        """The live record stays."""
        await discovery.register(make_record(0, epoch=2))

        with pytest.raises(ConflictError) as caught:
            await discovery.register(make_record(0, epoch=1))

        assert caught.value.reason is Reason.STALE_EPOCH
        assert await _records(discovery) == (make_record(0, epoch=2),)

    async def test_two_watchers_see_the_same_changes(self, discovery: Discovery) -> None:
        """Neither takes an event from the other."""
        async with aclosing(discovery.watch(NAMESPACE)) as one, aclosing(discovery.watch(NAMESPACE)) as two:
            await _next(one)
            await _next(two)
            registration = await discovery.register(make_record(0))
            await registration.stop()

            expected = [Put(make_record(0)), Deleted(make_record(0).worker_id, Epoch(1), graceful=True)]
            assert [await _next(one), await _next(one)] == expected
            assert [await _next(two), await _next(two)] == expected

    async def test_namespaces_do_not_see_each_other(self, discovery: Discovery) -> None:
        """The same worker_id may live in two of them."""
        await discovery.register(make_record(0, namespace="other"))
        await discovery.register(make_record(0))

        assert await _records(discovery) == (make_record(0),)

    async def test_watcher_that_reads_late_still_ends_with_the_truth(self, discovery: Discovery) -> None:
        """However many changes were dropped on the way."""
        registrations = [await discovery.register(make_record(number)) for number in range(40)]
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            known = _apply({}, await _next(events))
            for round_number in range(20):
                for number, registration in enumerate(registrations):
                    await registration.update(make_record(number, metadata={"round": str(round_number)}))
            for registration in registrations[10:]:
                await registration.stop()
            await discovery.register(make_record(99))
            while make_record(99).worker_id not in known:
                known = _apply(known, await _next(events))

        expected = [make_record(number, metadata={"round": "19"}) for number in range(10)] + [make_record(99)]
        assert known == {record.worker_id: record for record in expected}

    async def test_closing_ends_watches_and_refuses_registrations(self, discovery: Discovery) -> None:
        """Nobody waits for a closed store."""
        async with aclosing(discovery.watch(NAMESPACE)) as events:
            await _next(events)
            await discovery.aclose()

            with pytest.raises(StopAsyncIteration):
                await _next(events)
        with pytest.raises(MeshError):
            await discovery.register(make_record(0))


async def _next(events: AsyncGenerator[DiscoveryEvent, None]) -> DiscoveryEvent:
    async with asyncio.timeout(WAIT_S):
        return await anext(events)


async def _records(discovery: Discovery) -> tuple[WorkerRecord, ...]:
    async with aclosing(discovery.watch(NAMESPACE)) as events:
        first = await _next(events)
    assert isinstance(first, Snapshot)
    return first.records


def _apply(known: dict[WorkerId, WorkerRecord], event: DiscoveryEvent) -> dict[WorkerId, WorkerRecord]:
    match event:
        case Snapshot(records):
            return {record.worker_id: record for record in records}
        case Put(record):
            return {**known, record.worker_id: record}
        case Deleted(worker_id):
            return {other: record for other, record in known.items() if other != worker_id}
