"""When an upstream counts as out of service, and how it comes back."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvmesh.core.errors import BackOffError, FixRequestError, MeshError, Reason, TryElsewhereError
from kvmesh.engines.openai_upstream_breaker import Breaker

GONE = TryElsewhereError(Reason.WORKER_LOST, "nobody there")


class _Probe:
    """Succeeds once `is_well`; each call can be waited for."""

    def __init__(self) -> None:
        self.is_well = False
        self.asked: asyncio.Queue[None] = asyncio.Queue()

    async def __call__(self) -> None:
        self.asked.put_nowait(None)
        if not self.is_well:
            raise GONE


@pytest.fixture
def probe() -> _Probe:
    return _Probe()


@pytest.fixture
async def breaker(probe: _Probe) -> AsyncIterator[Breaker]:
    breaker = Breaker(probe, pause_s=0.01)
    yield breaker
    await breaker.aclose()


async def test_one_that_cannot_be_reached_is_out_at_once(breaker: Breaker) -> None:
    breaker.failed(GONE, is_unreachable=True)

    assert breaker.out_of_service == "WORKER_LOST: nobody there"


async def test_a_success_between_failures_starts_the_count_again(breaker: Breaker) -> None:
    breaker.failed(GONE, is_unreachable=False)
    breaker.failed(GONE, is_unreachable=False)
    breaker.succeeded()
    breaker.failed(GONE, is_unreachable=False)
    breaker.failed(GONE, is_unreachable=False)
    before_the_third = breaker.out_of_service
    breaker.failed(GONE, is_unreachable=False)

    assert (before_the_third, breaker.out_of_service) == ("", "WORKER_LOST: nobody there")


@pytest.mark.parametrize(
    "error", [FixRequestError(Reason.INVALID_FIELD, "too long"), BackOffError(Reason.OVERLOADED, "full")]
)
async def test_faults_of_the_request_and_a_full_upstream_do_not_count(error: MeshError, breaker: Breaker) -> None:
    for _ in range(10):
        breaker.failed(error, is_unreachable=False)

    assert breaker.out_of_service == ""


async def test_it_is_back_with_the_first_probe_that_succeeds(breaker: Breaker, probe: _Probe) -> None:
    breaker.failed(GONE, is_unreachable=True)
    async with asyncio.timeout(5):
        await probe.asked.get()
        await probe.asked.get()
        still_out = breaker.out_of_service
        probe.is_well = True
        await probe.asked.get()
        await asyncio.sleep(0)

    assert (bool(still_out), breaker.out_of_service) == (True, "")


async def test_let_in_by_a_probe_it_is_out_again_after_one_failure(breaker: Breaker, probe: _Probe) -> None:
    probe.is_well = True
    breaker.failed(GONE, is_unreachable=True)
    async with asyncio.timeout(5):
        await probe.asked.get()
        await asyncio.sleep(0)
    was_out = breaker.out_of_service

    breaker.failed(GONE, is_unreachable=False)

    assert (was_out, bool(breaker.out_of_service)) == ("", True)


async def test_a_request_that_succeeds_brings_it_back_and_ends_the_probes(breaker: Breaker) -> None:
    breaker.failed(GONE, is_unreachable=True)

    breaker.succeeded()
    await asyncio.sleep(0)

    assert breaker.out_of_service == ""
    assert [task for task in asyncio.all_tasks() if task.get_name() == "upstream-probe"] == []
