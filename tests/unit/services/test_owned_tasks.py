"""Tasks end with their owner, and none fails unheard."""

import asyncio

import pytest
import structlog

from kvmesh.services.owned_tasks import OwnedTasks


async def test_close_cancels_what_runs_and_waits_for_its_cleanup() -> None:
    tasks = OwnedTasks()
    entered, cleaned = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            entered.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    tasks.start(work(), name="work")
    await entered.wait()

    await tasks.aclose()

    assert cleaned.is_set()
    assert len(tasks) == 0


async def test_close_ends_where_everything_has_just_ended() -> None:
    tasks = OwnedTasks()

    async def work() -> None:
        return

    ended = tasks.start(work(), name="work")
    await asyncio.sleep(0)
    assert ended.done()
    was_held = len(tasks)

    await tasks.aclose()

    assert (was_held, len(tasks)) == (1, 0)


async def test_close_also_ends_what_a_cleanup_starts() -> None:
    tasks = OwnedTasks()
    started: list[asyncio.Task[None]] = []
    entered = asyncio.Event()

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    async def work() -> None:
        try:
            entered.set()
            await asyncio.Event().wait()
        finally:
            started.append(tasks.start(wait_for_ever(), name="late"))

    tasks.start(work(), name="work")
    await entered.wait()

    await tasks.aclose()

    assert [task.cancelled() for task in started] == [True]


async def test_task_that_fails_is_logged_by_its_name_and_forgotten() -> None:
    tasks = OwnedTasks()
    error = ValueError("broken")

    async def work() -> None:
        raise error

    with structlog.testing.capture_logs() as logs:
        task = tasks.start(work(), name="lease-7")
        with pytest.raises(ValueError, match="broken"):
            await task

    assert [(line["event"], line["task"], line["exc_info"]) for line in logs] == [("task.failed", "lease-7", error)]
    assert len(tasks) == 0


async def test_close_without_tasks_returns() -> None:
    tasks = OwnedTasks()

    await tasks.aclose()
    await tasks.aclose()

    assert len(tasks) == 0
