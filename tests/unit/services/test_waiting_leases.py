import asyncio

import pytest

from kvmesh.core.ids import WorkerId
from kvmesh.services.waiting_leases import WaitingLeases

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


async def woken_order(waiting: WaitingLeases, cached: dict[WorkerId, int] | None) -> list[WorkerId]:
    order: list[WorkerId] = []

    async def wait(worker_id: WorkerId) -> None:
        until = asyncio.get_running_loop().time() + 30
        assert await waiting.wait(worker_id, until=until)
        order.append(worker_id)

    async with asyncio.TaskGroup() as group:
        for worker_id in (A, B, C):
            group.create_task(wait(worker_id))
        await asyncio.sleep(0)
        assert len(waiting) == 3
        waiting.wake(None if cached is None else cached.__getitem__)
    return order


async def test_who_waited_longest_asks_first() -> None:
    assert await woken_order(WaitingLeases(), None) == [A, B, C]


async def test_preferred_worker_asks_first_and_equals_keep_their_order() -> None:
    assert await woken_order(WaitingLeases(), {A: 0, B: 0, C: 5}) == [C, A, B]


async def test_wait_ends_at_its_bound() -> None:
    waiting = WaitingLeases()

    assert not await waiting.wait(A, until=asyncio.get_running_loop().time())
    assert len(waiting) == 0


async def test_cancelled_call_waits_no_more() -> None:
    waiting = WaitingLeases()
    call = asyncio.create_task(waiting.wait(A, until=asyncio.get_running_loop().time() + 30))
    await asyncio.sleep(0)
    assert len(waiting) == 1

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert len(waiting) == 0
    waiting.wake()
