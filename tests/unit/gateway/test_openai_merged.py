"""Several choices of one reply: merged as they come, and ended together."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from kvmesh.core.errors import MeshError, Reason, TryElsewhereError
from kvmesh.gateway.openai_choices import merged
from kvmesh.v1 import frontend_pb2, generation_pb2
from kvmesh.wire.generation import Delta, Event

STARTED = frontend_pb2.Started(model="m")
FINISHED = generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_STOP)


class Run:
    """A request whose events a test writes; `None` waits for ever."""

    def __init__(self, *events: Event | Exception | None) -> None:
        self.is_closed = False
        self.begun = asyncio.Event()
        self._events = events

    async def generate(self) -> AsyncGenerator[Event, None]:
        try:
            for event in self._events:
                if event is None:
                    self.begun.set()
                    await asyncio.Event().wait()
                elif isinstance(event, Exception):
                    raise event
                else:
                    yield event
        finally:
            self.is_closed = True


async def test_every_choices_events_come_in_their_order() -> None:
    runs = [Run(STARTED, Delta([name], [1]), Delta([name * 2], [2]), FINISHED) for name in "ab"]

    events = [event async for event in merged([run.generate() for run in runs])]

    for index, name in enumerate("ab"):
        own = [event for each, event in events if each == index]
        assert own == [STARTED, Delta([name], [1]), Delta([name * 2], [2]), FINISHED]
    assert all(run.is_closed for run in runs)


async def test_the_failure_of_one_ends_all_and_is_raised() -> None:
    lost, other = Run(STARTED, TryElsewhereError(Reason.WORKER_LOST, "gone")), Run(STARTED, None)

    with pytest.raises(TryElsewhereError, match="gone"):
        async for _ in merged([other.generate(), lost.generate()]):
            pass

    assert lost.is_closed
    assert other.is_closed


async def test_closing_closes_all() -> None:
    runs = [Run(STARTED, None), Run(STARTED, None)]

    async with aclosing(merged([run.generate() for run in runs])) as events:
        await anext(events)
        await asyncio.gather(*(run.begun.wait() for run in runs))

    assert all(run.is_closed for run in runs)


async def test_a_choice_without_an_end_passes_for_no_whole_one() -> None:
    with pytest.raises(MeshError) as failed:
        async for _ in merged([Run(STARTED, Delta(["a"], [1])).generate()]):
            pass

    assert failed.value.reason is Reason.INTERNAL
