"""Workers and a queue in one process, for the tests that want them with the usual waits."""

from collections.abc import AsyncIterator

import pytest

from kvmesh.testing.worker_group import WorkerGroup, worker_group


@pytest.fixture
async def group() -> AsyncIterator[WorkerGroup]:
    async with worker_group() as group:
        yield group
