"""Twenty tasks, four consumers that crash at random, the real service: every task ends once."""

import asyncio
import random
from collections import Counter

import grpc
import pytest

from kvmesh.core.errors import Reason
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.prefill_queue import PrefillQueue
from kvmesh.v1 import generation_pb2, prefill_queue_pb2, prefill_queue_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error
from kvmesh.wire.validation import duration

TASKS, CONSUMERS, POISONED = 20, 4, 3
LIMITS = QueueLimits(lease_ttl_s=0.15, max_attempts=50, backoff_base_s=0.02, backoff_cap_s=0.05)


class Consumer:
    """A prefill worker that completes, fails, goes silent or dies, as a seeded die tells it."""

    def __init__(self, name: str, stub: "prefill_queue_pb2_grpc.PrefillQueueAsyncStub", rng: random.Random) -> None:
        self.name = name
        self.stub = stub
        self.rng = rng
        self.epoch = 0
        self.accepted: Counter[str] = Counter()
        """Results the queue took from this consumer, per task."""
        self.crashes = 0
        self._silent: list[prefill_queue_pb2.LeasedTask] = []
        """Leases it has not answered in time, to be answered too late."""

    async def run(self) -> None:
        """Live one incarnation after the other."""
        while True:
            self.epoch += 1
            attachment = self.stub.Attach(
                prefill_queue_pb2.AttachRequest(worker_id=self.name, epoch=self.epoch, models=["llama"]), timeout=60
            )
            try:
                await attachment.read()
                await self._work()
            finally:
                attachment.cancel()
            self.crashes += 1

    async def _work(self) -> None:
        while True:
            request = prefill_queue_pb2.LeaseRequest(
                worker_id=self.name, epoch=self.epoch, max_tasks=self.rng.randint(1, 3), wait=duration(5.0)
            )
            for leased in (await self.stub.Lease(request, timeout=10)).tasks:
                if await self._is_fatal(leased):
                    return

    async def _is_fatal(self, leased: prefill_queue_pb2.LeasedTask) -> bool:
        """Do something with a lease; True: the consumer dies of it."""
        if leased.task.request_id.startswith("poison"):
            await self._answer(leased, retryable=False)
            return False
        ends = ["complete", "complete", "fail", "silent", "crash"]
        match self.rng.choice(ends) if self.crashes else "crash":  # its first lease at least, whatever the die says
            case "complete":
                await self._answer(leased)
            case "fail":
                await self._answer(leased, retryable=True)
            case "silent":
                self._silent.append(leased)
            case "crash":
                return True
        if self._silent and self.rng.random() < 0.5:
            await self._answer(self._silent.pop())
        return False

    async def _answer(self, leased: prefill_queue_pb2.LeasedTask, *, retryable: bool | None = None) -> None:
        """Complete, or fail where `retryable` says how; a lost lease is no error of a consumer's."""
        task = leased.task
        key = prefill_queue_pb2.TaskKey(request_id=task.request_id, attempt=task.attempt)
        try:
            if retryable is not None:
                fail = prefill_queue_pb2.FailRequest(key=key, lease_id=leased.lease_id, retryable=retryable)
                await self.stub.Fail(fail, timeout=10)
                return
            handoff = generation_pb2.KvHandoff(worker_id=self.name, agent_name=leased.lease_id)
            result = prefill_queue_pb2.TaskCompleted(handoff=handoff)
            complete = prefill_queue_pb2.CompleteRequest(key=key, lease_id=leased.lease_id, result=result)
            await self.stub.Complete(complete, timeout=10)
            self.accepted[task.request_id] += 1
        except grpc.aio.AioRpcError as exc:
            if from_rpc_error(exc).reason is not Reason.LEASE_LOST:
                raise


async def submit(stub: "prefill_queue_pb2_grpc.PrefillQueueAsyncStub", name: str) -> list[str]:
    """Hold a task's stream to its end and return every terminal event it brought."""
    task = prefill_queue_pb2.PrefillTask(request_id=name, attempt=1, model="llama", text="hello")
    call = stub.Submit(prefill_queue_pb2.SubmitRequest(task=task), timeout=50)
    ends: list[str] = []
    try:
        while isinstance(message := await call.read(), prefill_queue_pb2.SubmitResponse):
            ends += ["completed"] * (message.WhichOneof("event") == "completed")
    except grpc.aio.AioRpcError as exc:
        ends.append(from_rpc_error(exc).reason.value)
    return ends


@pytest.mark.parametrize("seed", range(20))
async def test_every_task_ends_exactly_once_under_crashing_consumers(seed: int) -> None:
    service = PrefillQueue(LIMITS)
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    prefill_queue_pb2_grpc.add_PrefillQueueServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    names = [f"poison-{n}" if n < POISONED else f"task-{n}" for n in range(TASKS)]

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = prefill_queue_pb2_grpc.PrefillQueueStub(channel)
        consumers = [Consumer(f"node/prefill/{n}", stub, random.Random(100 * seed + n)) for n in range(CONSUMERS)]
        running = [asyncio.create_task(consumer.run()) for consumer in consumers]
        ends = await asyncio.gather(*(submit(stub, name) for name in names))
        for consuming in running:
            consuming.cancel()
        stopped = await asyncio.gather(*running, return_exceptions=True)
    service.close()
    await server.stop(None)

    assert all(isinstance(stop, asyncio.CancelledError) for stop in stopped), stopped
    assert ends == [["PREFILL_FAILED"]] * POISONED + [["completed"]] * (TASKS - POISONED)
    accepted = sum((consumer.accepted for consumer in consumers), Counter[str]())
    assert accepted == Counter(names[POISONED:])
    stats = service.stats()
    assert (stats.submitted, stats.completed, stats.dead) == (TASKS, TASKS - POISONED, POISONED)
    assert (stats.depth, stats.leased, stats.cancelled, stats.timed_out) == (0, 0, 0, 0)
    assert sum(consumer.crashes for consumer in consumers) > 0
    service._core.check_integrity()
