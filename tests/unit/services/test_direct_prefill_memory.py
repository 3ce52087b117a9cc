"""What a decode worker that asks prefill workers directly remembers of them."""

import asyncio
import random

import pytest

from kvmesh.core.errors import MeshError, Reason
from kvmesh.core.ids import Epoch, SequenceHash, WorkerId, WorkerRank
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.services.channels import Channels
from kvmesh.services.direct_prefills import DirectPrefills
from kvmesh.services.peers import Peers
from kvmesh.services.prefills import Patience
from kvmesh.v1 import prefill_queue_pb2

HASHES = (SequenceHash(1), SequenceHash(2))


def record(number: int) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(f"node/prefill/{number}"), epoch=Epoch(1), role=WorkerRole.PREFILL, models=("m",),
        block_size=4, address="127.0.0.1:1",
    )  # fmt: skip


async def reason_of(prefills: DirectPrefills) -> Reason:
    task = prefill_queue_pb2.PrefillTask(request_id="r", attempt=1, model="m", uncached_tokens=8, block_hashes=HASHES)
    with pytest.raises(MeshError) as refused:
        await prefills.compute(task, patience=Patience(lease_s=5.0, total_s=10.0))
    return refused.value.reason


async def test_workers_that_left_are_forgotten() -> None:
    peers = Peers(MemoryDiscovery(), namespace="default")
    channels = Channels()
    prefills = DirectPrefills(peers=peers, channels=channels, waits=Waits(), block_size=4, rng=random.Random(0))
    for number in range(5):
        peers.roster.put(record(number))

    lost = await reason_of(prefills)
    prefills._caches.record(WorkerRank(WorkerId("node/prefill/0")), HASHES, asyncio.get_running_loop().time())
    known = set(prefills._epochs)
    for number in range(4):
        peers.roster.remove(WorkerId(f"node/prefill/{number}"), Epoch(1))
    await reason_of(prefills)
    await prefills.aclose()
    await channels.aclose()

    assert lost is Reason.WORKER_LOST
    assert len(known) == 5
    assert set(prefills._epochs) == {"node/prefill/4"}
    assert prefills._caches.match(HASHES) == {}
    assert dict(prefills._tokens_in_flight) == {}
    assert dict(prefills._tasks_in_flight) == {}
