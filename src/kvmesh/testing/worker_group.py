"""Workers and a prefill queue inside a test, without a gateway: real servers on free ports, one memory discovery.

async with worker_group() as group:
    await group.add_queue()
    prefill, decode = await group.add_prefill(), await group.add_decode()
    answer = await group.generate(decode, request("r"))
    await group.wait_idle()
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt

from kvmesh.core.ids import WorkerId
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.remote_prefill import RemotePrefillRules
from kvmesh.core.roster import WorkerRole
from kvmesh.core.waits import Waits
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.engines.engine import Engine, StepResult
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.engines.simulated import SimulatedEngine
from kvmesh.engines.simulated_options import SimulatedOptions
from kvmesh.runtime.decode_work import decode_work
from kvmesh.runtime.prefill_work import prefill_work
from kvmesh.runtime.queue_role import QueueRole
from kvmesh.runtime.role import Listen
from kvmesh.runtime.worker import Work, Worker, WorkerParts
from kvmesh.services.channels import Channels
from kvmesh.transports.memory import MemoryNetwork, MemoryTransport
from kvmesh.transports.transport import Transport
from kvmesh.v1 import (
    decode_worker_pb2,
    decode_worker_pb2_grpc,
    generation_pb2,
    kv_transfer_pb2_grpc,
    prefill_queue_pb2_grpc,
    prefill_worker_pb2_grpc,
    worker_control_pb2,
    worker_control_pb2_grpc,
    worker_events_pb2_grpc,
)

if TYPE_CHECKING:
    from kvmesh.v1.decode_worker_pb2_grpc import DecodeWorkerAsyncStub
    from kvmesh.v1.kv_transfer_pb2_grpc import KvTransferAsyncStub
    from kvmesh.v1.prefill_queue_pb2_grpc import PrefillQueueAsyncStub
    from kvmesh.v1.prefill_worker_pb2_grpc import PrefillWorkerAsyncStub
    from kvmesh.v1.worker_control_pb2_grpc import WorkerControlAsyncStub
    from kvmesh.v1.worker_events_pb2_grpc import WorkerEventsAsyncStub

GENEROUS_S = 20.0
"""Longer than anything here takes: a bound that only a hang meets."""
BLOCK_SIZE = 4
BLOCK_BYTES = 64
SMALL = SimulatedOptions(
    total_blocks=64, block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES, vocab_size=1000, max_sequences=8, speedup=0
)
WAITS = Waits(drain_s=2.0, pin_s=20.0, kv_transfer_s=5.0, prefill_s=10.0, connect_s=5.0)
NAMESPACE = "test"
MODEL = "m"

_HELD_STEP_S = 0.005
_LOOK_AGAIN_S = 0.01


class HeldSimulatedEngine(SimulatedEngine):
    """A simulated engine that takes commands in and computes nothing while it is held."""

    def __init__(
        self, options: SimulatedOptions = SMALL, *, held: bool = False, allocate: Allocate = allocate_here
    ) -> None:
        """Begin held or not."""
        super().__init__(options, allocate=allocate)
        self.held = held
        """May be changed on any thread."""

    def step(self) -> StepResult:
        """Run a step, or let some time pass."""
        return StepResult(duration_s=_HELD_STEP_S) if self.held else super().step()


class HeldTransport(MemoryTransport):
    """A memory transport whose pulls wait until they are let go."""

    def __init__(self, network: MemoryNetwork) -> None:
        """Hold every pull."""
        super().__init__(network)
        self.reached = asyncio.Event()
        """A pull has begun."""
        self.go = asyncio.Event()

    async def pull(
        self,
        agent_name: str,
        *,
        source_block_ids: Sequence[int],
        target: npt.NDArray[np.uint8],
        target_block_ids: Sequence[int],
    ) -> int:
        """Wait to be let go, then copy."""
        self.reached.set()
        await self.go.wait()
        return await super().pull(
            agent_name, source_block_ids=source_block_ids, target=target, target_block_ids=target_block_ids
        )


@dataclass(slots=True)
class Answer:
    """Everything that one DecodeWorker.Generate stream said."""

    events: list[str] = field(default_factory=list)
    """Names, in order; chunks in a row count once."""
    decisions: list[generation_pb2.PrefillDecision] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: generation_pb2.Finished | None = None

    @property
    def usage(self) -> generation_pb2.Usage:
        """Of a stream that ended well."""
        assert self.finished is not None
        return self.finished.usage


def request(
    request_id: str, *, tokens: Sequence[int] = tuple(range(18)), max_tokens: int = 3, **fields: Any
) -> decode_worker_pb2.DecodeRequest:
    """Return a request for a TOKENS worker; the default prompt has four full blocks and two tokens more."""
    fields.setdefault("attempt", 1)
    return decode_worker_pb2.DecodeRequest(
        request_id=request_id,
        token_ids=generation_pb2.TokenIds(token_ids=tokens),
        sampling=generation_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0, top_p=1.0, ignore_eos=True),
        **fields,
    )


class WorkerGroup:
    """What runs in one test. Made by `worker_group`."""

    def __init__(self, waits: Waits) -> None:
        self.discovery = MemoryDiscovery()
        self.network = MemoryNetwork()
        self.workers: list[Worker] = []
        self.queue: QueueRole | None = None
        self._waits = waits
        self._channels = Channels()

    async def add_queue(self, limits: QueueLimits | None = None) -> QueueRole:
        """Start the prefill queue."""
        self.queue = QueueRole(
            worker_id=WorkerId("node/queue/0"),
            namespace=NAMESPACE,
            limits=limits or QueueLimits(),
            discovery=self.discovery,
            listen=Listen(),
            drain_s=0,
        )
        await self.queue.start()
        return self.queue

    async def add_decode(
        self,
        engine: Engine | None = None,
        *,
        waits: Waits | None = None,
        transport: Transport | Sequence[Transport] | None = None,
        rules: RemotePrefillRules | None = None,
        required: bool = False,
        direct: bool = False,
        checksums: bool = False,
    ) -> Worker:
        """Start a decode worker that sends every prefill of a full block or more away, if anybody takes it.

        `direct`: to a prefill worker that it chooses itself, and not to the queue.
        """
        build = decode_work(
            rules=rules or RemotePrefillRules(min_uncached_tokens=1),
            required=required,
            direct=direct,
            checksums=checksums,
        )
        return await self._add(WorkerRole.DECODE, engine, waits=waits, transport=transport, build=build)

    async def add_prefill(
        self,
        engine: Engine | None = None,
        *,
        waits: Waits | None = None,
        transport: Transport | Sequence[Transport] | None = None,
        namespace: str = NAMESPACE,
        max_direct_tasks: int = 32,
        checksums: bool = False,
        pulls: bool = True,
    ) -> Worker:
        """Start a prefill worker and return when it may lease; in another namespace it knows of no queue."""
        build = prefill_work(pulls=pulls, max_direct_tasks=max_direct_tasks, checksums=checksums)
        worker = await self._add(
            WorkerRole.PREFILL, engine, waits=waits, transport=transport, build=build, namespace=namespace
        )
        if self.queue is not None and namespace == NAMESPACE:
            async with asyncio.timeout(GENEROUS_S):
                await worker.wait_ready()
        return worker

    def channel(self, address: str) -> grpc.aio.Channel:
        """Return the channel of this test to an address."""
        return self._channels.get(address)

    def decode(self, worker: Worker) -> "DecodeWorkerAsyncStub":
        """Return a client of both doors."""
        return decode_worker_pb2_grpc.DecodeWorkerStub(self.channel(worker.identity.address))

    def direct(self, worker: Worker) -> "PrefillWorkerAsyncStub":
        """Return a client of a prefill worker's direct mode."""
        return prefill_worker_pb2_grpc.PrefillWorkerStub(self.channel(worker.identity.address))

    def pins(self, worker: Worker) -> "KvTransferAsyncStub":
        """Return a client of a worker's pins."""
        return kv_transfer_pb2_grpc.KvTransferStub(self.channel(worker.identity.address))

    def control(self, worker: Worker) -> "WorkerControlAsyncStub":
        """Return a client of a worker's control."""
        return worker_control_pb2_grpc.WorkerControlStub(self.channel(worker.identity.address))

    def events(self, worker: Worker) -> "WorkerEventsAsyncStub":
        """Return a client of a worker's events."""
        return worker_events_pb2_grpc.WorkerEventsStub(self.channel(worker.identity.address))

    def queue_stub(self) -> "PrefillQueueAsyncStub":
        """Return a client of the queue."""
        assert self.queue is not None
        return prefill_queue_pb2_grpc.PrefillQueueStub(self.channel(self.queue.address))

    async def generate(self, worker: Worker, wanted: decode_worker_pb2.DecodeRequest) -> Answer:
        """Run a request through the Generate door. Raises: grpc.aio.AioRpcError."""
        call = self.decode(worker).Generate(
            decode_worker_pb2.DecodeWorkerGenerateRequest(request=wanted), timeout=GENEROUS_S
        )
        answer = Answer()
        async for response in call:
            event = response.WhichOneof("event") or ""
            if not answer.events or event != answer.events[-1] or event != "chunk":
                answer.events.append(event)
            if event == "prefill":
                answer.decisions.append(response.prefill)
            elif event == "chunk":
                answer.token_ids += response.chunk.token_ids
                answer.text += response.chunk.text
            elif event == "finished":
                answer.finished = response.finished
        return answer

    async def info(self, worker: Worker) -> worker_control_pb2.GetInfoResponse:
        """Ask a worker what it holds."""
        return await self.control(worker).GetInfo(worker_control_pb2.GetInfoRequest(), timeout=GENEROUS_S)

    async def wait_idle(self) -> None:
        """Wait until no worker holds a block, pin, import or request, and the queue nothing."""
        for worker in self.workers:
            await self.wait_until(worker, lambda info: held(info) == (0, 0, 0, 0))
        if self.queue is not None:
            queue = self.queue.queue
            await eventually(lambda: (queue.stats().depth, queue.stats().leased) == (0, 0))

    async def wait_until(
        self, worker: Worker, is_true: Callable[[worker_control_pb2.GetInfoResponse], bool]
    ) -> worker_control_pb2.GetInfoResponse:
        """Wait until `is_true` of what a worker says it holds. Raises: AssertionError with what it says instead."""
        deadline = asyncio.get_running_loop().time() + GENEROUS_S
        while not is_true(info := await self.info(worker)):
            assert asyncio.get_running_loop().time() < deadline, f"not so within {GENEROUS_S:g} s: {info}"
            await asyncio.sleep(_LOOK_AGAIN_S)
        return info

    async def aclose(self) -> None:
        """Stop everything, the workers at once."""
        await self._channels.aclose()
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        if self.queue is not None:
            await self.queue.stop()
        await self.discovery.aclose()

    async def _add(
        self,
        role: WorkerRole,
        engine: Engine | None,
        *,
        waits: Waits | None,
        transport: Transport | Sequence[Transport] | None,
        build: Callable[[WorkerParts], Work],
        namespace: str = NAMESPACE,
    ) -> Worker:
        worker = Worker(
            worker_id=WorkerId(f"node/{role.value}/{len(self.workers)}"),
            role=role,
            models=(MODEL,),
            namespace=namespace,
            engine=engine or HeldSimulatedEngine(),
            transports=_listed(transport or MemoryTransport(self.network)),
            discovery=self.discovery,
            waits=waits or self._waits,
            build=build,
            listen=Listen(),
        )
        await worker.start()
        self.workers.append(worker)
        return worker


def _listed(transport: Transport | Sequence[Transport]) -> Sequence[Transport]:
    return transport if isinstance(transport, Sequence) else (transport,)


def held(info: worker_control_pb2.GetInfoResponse) -> tuple[int, int, int, int]:
    """Return what must be 0 when nothing runs: used blocks, pins, imports, requests."""
    return info.used_blocks, info.pins, info.imports, info.requests


async def eventually(is_true: Callable[[], bool]) -> None:
    """Wait until a fact of this process is one. Raises: AssertionError."""
    deadline = asyncio.get_running_loop().time() + GENEROUS_S
    while not is_true():
        assert asyncio.get_running_loop().time() < deadline, f"not so within {GENEROUS_S:g} s"
        await asyncio.sleep(_LOOK_AGAIN_S)


@asynccontextmanager
async def worker_group(waits: Waits = WAITS) -> AsyncIterator[WorkerGroup]:
    """Run a group for the block; its workers take `waits` unless told otherwise."""
    group = WorkerGroup(waits)
    try:
        yield group
    finally:
        await group.aclose()
