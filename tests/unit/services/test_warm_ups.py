"""The warm-ups of a worker: one after the other, whatever becomes of each."""

import asyncio
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.services.peers import Peers
from kvmesh.services.warm_ups import WarmUps
from kvmesh.services.worker_transports import WorkerTransports
from kvmesh.transports.transport import Transport


class Failing:
    """A transport that fails with every source but the last."""

    reach = "failing"

    def __init__(self, failure: Exception) -> None:
        self.failure = failure
        self.asked: list[str] = []
        self.is_through = asyncio.Event()

    async def warm_up(self, agent_name: str, target: npt.NDArray[np.uint8]) -> None:
        self.asked.append(agent_name)
        if len(self.asked) == 3:
            self.is_through.set()
            return
        raise self.failure

    async def aclose(self) -> None:
        """Has nothing."""


@pytest.mark.parametrize(
    "failure", [ValueError("not a name"), TryElsewhereError(Reason.WORKER_LOST, ""), TimeoutError()], ids=repr
)
async def test_a_source_that_fails_does_not_take_the_next_ones_turn(failure: Exception) -> None:
    peers = Peers(MemoryDiscovery(), namespace="default")
    for number in range(3):
        peers.roster.put(
            WorkerRecord(
                worker_id=WorkerId(f"node/prefill/{number}"), epoch=Epoch(1), role=WorkerRole.PREFILL, models=("m",),
                block_size=4, metadata={"kv.failing": f"agent{number}"},
            )
        )  # fmt: skip
    transport = Failing(failure)
    transports = WorkerTransports([cast("Transport", transport)])
    warm_ups = WarmUps(peers=peers, sources=WorkerRole.PREFILL, transports=transports, waits=Waits())

    warm_ups.start(np.zeros(8, dtype=np.uint8))
    async with asyncio.timeout(10):
        await transport.is_through.wait()
    await warm_ups.aclose()

    assert transport.asked == ["agent0", "agent1", "agent2"]
