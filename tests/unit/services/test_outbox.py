import asyncio

import pytest

from kvmesh.core.errors import BackOffError, Reason, TryElsewhereError
from kvmesh.services.outbox import Outbox


async def test_messages_come_in_order_and_then_the_end() -> None:
    outbox = Outbox[int]()
    for number in (1, 2):
        outbox.put(number)
    outbox.end()
    outbox.put(3)

    assert [message async for message in outbox] == [1, 2]


async def test_waiting_reader_gets_a_message_put_later() -> None:
    outbox = Outbox[int]()
    reading = asyncio.create_task(anext(outbox))
    await asyncio.sleep(0)
    assert not reading.done()

    outbox.put(7)

    assert await reading == 7


async def test_first_end_stands_and_comes_after_what_was_put() -> None:
    outbox = Outbox[int]()
    outbox.put(1)
    outbox.end(TryElsewhereError(Reason.DRAINING, "first"))
    outbox.end(TryElsewhereError(Reason.PREFILL_FAILED, "second"))

    assert await anext(outbox) == 1
    with pytest.raises(TryElsewhereError, match="first"):
        await anext(outbox)


async def test_reader_that_is_too_far_behind_is_cut_off_with_what_it_may_still_read() -> None:
    outbox = Outbox[int](limit=2)
    for number in range(5):
        outbox.put(number)

    assert [await anext(outbox), await anext(outbox)] == [0, 1]
    with pytest.raises(BackOffError) as cut_off:
        await anext(outbox)
    assert cut_off.value.reason is Reason.SLOW_CONSUMER
