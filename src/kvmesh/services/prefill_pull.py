"""The prefill worker's pull loop: attach to the queue, lease what fits, compute, complete."""

import asyncio
import contextvars
import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from kvmesh import telemetry
from kvmesh.core.errors import FixRequestError, MeshError, Reason
from kvmesh.core.waits import Waits
from kvmesh.services.channels import Channels
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.identity import WorkerIdentity
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.prefill_compute import PrefillCompute
from kvmesh.services.queue_locator import QueueLocator
from kvmesh.services.readiness import Part, Readiness
from kvmesh.services.worker_transports import WorkerTransports
from kvmesh.v1 import prefill_queue_pb2, prefill_queue_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error, to_status
from kvmesh.wire.layout import layout_to_wire
from kvmesh.wire.validation import duration

if TYPE_CHECKING:
    from kvmesh.v1.prefill_queue_pb2_grpc import PrefillQueueAsyncStub

log = telemetry.logger(__name__)

_LEASE_WAIT_S = 10.0
_LEASE_TOKENS = 16_384
_MAX_TASKS = 8
_RETRY_S = (0.05, 1.0)
_UNATTACHED = "not attached to a prefill queue"
_SHORTEST_TTL_S = 0.15
"""A lease near the end of its task's time is extended no more often than one of this TTL."""


class PrefillPull:
    """Pulls tasks for one prefill worker for its life; a lost queue is looked for again."""

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        models: tuple[str, ...],
        driver: EngineDriver,
        compute: PrefillCompute,
        peers: Peers,
        channels: Channels,
        transports: WorkerTransports,
        readiness: Readiness,
        waits: Waits,
    ) -> None:
        """Pull for `identity`, from `start` on; tell `readiness` whether a queue gives it tasks."""
        self.draining = False
        self._identity = identity
        self._models = models
        self._driver = driver
        self._compute = compute
        self._peers = peers
        self._queues = QueueLocator(peers=peers, channels=channels)
        self._channels = channels
        self._transports = transports
        self._readiness = readiness
        self._waits = waits
        self._loop_tasks = OwnedTasks()
        self._work = OwnedTasks()
        self._running: dict[str, asyncio.Task[None]] = {}
        """By lease_id."""
        self._slot_free = asyncio.Event()
        self._pulling: asyncio.Task[None] | None = None
        """None before `start`, and once a drain has ended it."""
        self._leasing: asyncio.Task[None] | None = None
        self._attached = asyncio.Event()
        self._undrained = asyncio.Event()

    def __len__(self) -> int:
        return len(self._running)

    def start(self) -> None:
        """Begin to pull."""
        self._readiness.expect(Part.QUEUE, _UNATTACHED)
        self._pulling = self._loop_tasks.start(self._pull(), name=f"pull-{self._identity.worker_id}")

    async def wait_attached(self) -> None:
        """Wait until the queue can give it tasks."""
        await self._attached.wait()

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Lease nothing new, finish what runs within `timeout_s`; return (finished, cancelled)."""
        self.draining = True
        self._undrained.clear()
        if self._leasing is not None:
            self._leasing.cancel()  # the attachment stays: its end would requeue what runs
        running = list(self._running.values())
        left = (await asyncio.wait(running, timeout=timeout_s))[1] if running else set()
        if left:
            telemetry.WAIT_ENDED.labels(wait="drain_s").inc()
        self._pulling = None
        await self._loop_tasks.aclose()
        await self._work.aclose()
        return len(running) - len(left), len(left)

    def undrain(self) -> None:
        """Lease again at once: under the attachment that what still runs has held, else under a new one. Idempotent."""
        if self.draining:
            self.draining = False
            self._undrained.set()
            if self._pulling is None or self._pulling.done():
                # A context of its own: the log lines of tasks to come do not belong to the call that ends the drain.
                contextvars.Context().run(self.start)

    async def aclose(self) -> None:
        """Stop pulling; what runs is given up, and requeued by the end of the attachment."""
        await self._loop_tasks.aclose()
        await self._work.aclose()

    async def _pull(self) -> None:
        delay_s = _RETRY_S[0]
        while not self.draining:
            address = self._queues.address()
            if address is None:
                await self._peers.changed()
                continue
            try:
                await self._serve(address)
                delay_s = _RETRY_S[0]
            except* (grpc.aio.AioRpcError, TimeoutError) as lost:
                _count_wait(lost.exceptions[0])
                log.warning("queue.lost", worker_id=self._identity.worker_id, error=_one_line(lost.exceptions[0]))
                delay_s = min(delay_s * 2, _RETRY_S[1])
            if not self.draining:
                self._readiness.set_lack(Part.QUEUE, _UNATTACHED)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # jitter of a retry, no secret

    async def _serve(self, address: str) -> None:
        """Hold the attachment and lease under it until either ends, or another queue is the active one."""
        stub = prefill_queue_pb2_grpc.PrefillQueueStub(self._channels.get(address))
        attach = prefill_queue_pb2.AttachRequest(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            models=self._models,
            transports=self._transports.served_reaches,
        )
        if self._driver.info.layout is not None:
            attach.layout.CopyFrom(layout_to_wire(self._driver.info.layout))
        notices = stub.Attach(attach)
        heard = aiter(notices)
        try:
            async with asyncio.timeout(self._waits.connect_s):
                if await anext(heard, None) is None:
                    return  # a queue that ends the stream at once: ask again, as after any loss
            self._attached.set()
            self._readiness.set_lack(Part.QUEUE, "")
            log.info("prefill.attached", worker_id=self._identity.worker_id)
            async with asyncio.TaskGroup() as group:
                hearing = group.create_task(self._hear(heard))
                while not hearing.done() and self._queues.address() == address:
                    self._leasing = group.create_task(self._lease(stub, address))
                    await _first_of(hearing, self._leasing)
                    self._leasing.cancel()
                    if self.draining:  # the attachment stays for what runs, and for what an undrain lets it lease
                        idle, undrained = (
                            group.create_task(wait) for wait in (self._wait_idle(), self._wait_undrained())
                        )
                        await _first_of(hearing, idle, undrained)
                        idle.cancel()
                        undrained.cancel()
                        if self.draining and not self._running:
                            break
                # A queue that drains keeps the attachment for what still runs: its end would requeue it. A queue that
                # ends it first is gone, and the next one is not to wait for what was leased by this one.
                hearing = group.create_task(self._hear(heard)) if hearing.done() else hearing
                parts = [hearing, group.create_task(self._wait_idle())]
                await _first_of(*parts)
                for part in parts:
                    part.cancel()
        finally:
            self._attached.clear()
            notices.cancel()

    async def _wait_idle(self) -> None:
        while self._running:
            self._slot_free.clear()
            await self._slot_free.wait()

    async def _wait_undrained(self) -> None:
        await self._undrained.wait()

    async def _hear(self, notices: AsyncIterator[prefill_queue_pb2.AttachResponse]) -> None:
        async for notice in notices:
            match notice.WhichOneof("notice"):
                case "cancelled":
                    work = self._running.get(notice.cancelled.lease_id)
                    if work is not None:
                        work.cancel()
                case "draining":
                    return
                case _:
                    continue

    async def _lease(self, stub: "PrefillQueueAsyncStub", address: str) -> None:
        """Lease until this worker drains, or another queue is the active one."""
        while not self.draining and self._queues.address() == address:
            free = _MAX_TASKS - len(self._running)
            if free <= 0:
                self._slot_free.clear()
                await self._slot_free.wait()
                continue
            request = prefill_queue_pb2.LeaseRequest(
                worker_id=self._identity.worker_id,
                epoch=self._identity.epoch,
                max_tasks=free,
                max_tokens=_LEASE_TOKENS,
                wait=duration(_LEASE_WAIT_S),
            )
            leased = await stub.Lease(request, timeout=_LEASE_WAIT_S + self._waits.connect_s)
            for task in leased.tasks:
                self._start(stub, task)

    def _start(self, stub: "PrefillQueueAsyncStub", leased: prefill_queue_pb2.LeasedTask) -> None:
        work = self._work.start(self._do(stub, leased), name=f"prefill-{leased.task.request_id}")
        self._running[leased.lease_id] = work
        # Not in the work itself: a task that is cancelled before its first step never gets to its `finally`.
        work.add_done_callback(lambda _: self._ended(leased.lease_id))

    def _ended(self, lease_id: str) -> None:
        self._running.pop(lease_id, None)
        self._slot_free.set()

    async def _do(self, stub: "PrefillQueueAsyncStub", leased: prefill_queue_pb2.LeasedTask) -> None:
        task = leased.task
        where = {
            "worker_id": self._identity.worker_id, "request_id": task.request_id, "attempt": task.attempt,
            "lease_attempt": leased.lease_attempt,
        }  # fmt: skip
        log.info("prefill.leased", uncached_tokens=task.uncached_tokens, **where)
        keeper = self._work.start(self._keep(stub, leased, asyncio.current_task()), name=f"keep-{task.request_id}")
        try:
            result = await self._compute.compute(task)
            await self._complete(stub, leased, result)
            log.info("prefill.completed", computed_tokens=result.computed_tokens, **where)
        except MeshError as error:
            log.warning("prefill.failed", reason=error.reason.value, error=error.message, **where)
            await self._fail(stub, leased, error)
        finally:
            keeper.cancel()

    async def _keep(
        self, stub: "PrefillQueueAsyncStub", leased: prefill_queue_pb2.LeasedTask, work: asyncio.Task[None] | None
    ) -> None:
        """Extend the lease at a third of its TTL; when it is lost, stop the work: its result would be refused."""
        ttl_s = leased.ttl.ToNanoseconds() / 1e9
        while True:
            wait_s = max(ttl_s, _SHORTEST_TTL_S) / 3
            await asyncio.sleep(wait_s)
            try:
                extended = await stub.Extend(
                    prefill_queue_pb2.ExtendRequest(key=_key(leased), lease_id=leased.lease_id), timeout=wait_s
                )
                ttl_s = extended.ttl.ToNanoseconds() / 1e9
            except grpc.aio.AioRpcError as exc:
                error = from_rpc_error(exc)
                if error.reason in (Reason.LEASE_LOST, Reason.NOT_FOUND) and work is not None:
                    log.warning("prefill.lease_lost", request_id=leased.task.request_id)
                    work.cancel()
                    return

    async def _complete(
        self,
        stub: "PrefillQueueAsyncStub",
        leased: prefill_queue_pb2.LeasedTask,
        result: prefill_queue_pb2.TaskCompleted,
    ) -> None:
        complete = prefill_queue_pb2.CompleteRequest(key=_key(leased), lease_id=leased.lease_id, result=result)
        try:
            await stub.Complete(complete, timeout=self._waits.connect_s)
        except BaseException as exc:
            self._compute.give_back(result)
            if isinstance(exc, grpc.aio.AioRpcError):
                _count_wait(exc)
                raise from_rpc_error(exc) from exc
            raise

    async def _fail(
        self, stub: "PrefillQueueAsyncStub", leased: prefill_queue_pb2.LeasedTask, error: MeshError
    ) -> None:
        if error.reason is Reason.LEASE_LOST:
            return
        fail = prefill_queue_pb2.FailRequest(
            key=_key(leased),
            lease_id=leased.lease_id,
            retryable=not isinstance(error, FixRequestError),
            error=to_status(error),
        )
        try:
            await stub.Fail(fail, timeout=self._waits.connect_s)
        except grpc.aio.AioRpcError as exc:
            _count_wait(exc)
            log.warning("prefill.fail_not_told", error=_one_line(exc))  # the lease expires instead


async def _first_of(*tasks: asyncio.Task[None]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _key(leased: prefill_queue_pb2.LeasedTask) -> prefill_queue_pb2.TaskKey:
    return prefill_queue_pb2.TaskKey(request_id=leased.task.request_id, attempt=leased.task.attempt)


def _count_wait(error: BaseException) -> None:
    """Count a queue that took too long to answer; each of its answers is waited for within `waits.connect_s`."""
    is_late = isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    if is_late or isinstance(error, TimeoutError):
        telemetry.WAIT_ENDED.labels(wait="connect_s").inc()


def _one_line(error: BaseException) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else repr(error)
