"""The prefill queue as its clients meet it: a real server and real streams."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from kvmesh.core.errors import MeshError, Reason
from kvmesh.core.ids import SequenceHash, WorkerId
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.runtime.interceptors import CallInterceptor
from kvmesh.services.prefill_queue import PrefillQueue
from kvmesh.v1 import generation_pb2, prefill_queue_pb2, prefill_queue_pb2_grpc
from kvmesh.wire.error_catalog import from_rpc_error, to_status
from kvmesh.wire.validation import duration

A, B = "node/prefill/0", "node/prefill/1"
LAYOUT = generation_pb2.KvLayout(
    dtype="float16", layers=2, block_size=16, kv_heads=2, head_dim=8, order="layer,kv,token,head,dim",
    model_fingerprint="fp-1", bytes_per_block=4096,
)  # fmt: skip
LONG_S = 20.0
"""A wait that no test sits out: a call that returns at all returned before it."""

Submission = grpc.aio.UnaryStreamCall[prefill_queue_pb2.SubmitRequest, prefill_queue_pb2.SubmitResponse]
Attachment = grpc.aio.UnaryStreamCall[prefill_queue_pb2.AttachRequest, prefill_queue_pb2.AttachResponse]


class Bench:
    """A served queue and the calls on it with their defaults filled in."""

    def __init__(self, service: PrefillQueue, stub: "prefill_queue_pb2_grpc.PrefillQueueAsyncStub") -> None:
        self.service = service
        self.stub = stub

    def submit(self, name: str, *, attempt: int = 1, **fields: Any) -> Submission:
        defaults: dict[str, Any] = {"model": "llama", "layout": LAYOUT, "transports": ["tcp", "shared_memory"]}
        task = prefill_queue_pb2.PrefillTask(request_id=name, attempt=attempt, **(defaults | fields))
        if task.WhichOneof("input") is None:
            task.token_ids.token_ids.extend(range(40))
        return self.stub.Submit(prefill_queue_pb2.SubmitRequest(task=task), timeout=30)

    async def queue_up(self, *names: str, **fields: Any) -> list[Submission]:
        """Submit, and return once every task is in line."""
        submissions = []
        for name in names:
            submissions.append(self.submit(name, **fields))
            assert (await read(submissions[-1])).WhichOneof("event") == "queued"
        return submissions

    async def attach(self, worker: str, *, epoch: int = 1, **fields: Any) -> Attachment:
        """Attach, and return once the worker may lease."""
        defaults: dict[str, Any] = {"models": ["llama"], "layout": LAYOUT, "transports": ["tcp"]}
        request = prefill_queue_pb2.AttachRequest(worker_id=worker, epoch=epoch, **(defaults | fields))
        attachment = self.stub.Attach(request, timeout=30)
        assert (await read(attachment)).WhichOneof("notice") == "ready"
        return attachment

    async def lease(
        self, worker: str, *, epoch: int = 1, max_tasks: int = 1, max_tokens: int = 0, wait_s: float = 0.0
    ) -> list[prefill_queue_pb2.LeasedTask]:
        request = prefill_queue_pb2.LeaseRequest(
            worker_id=worker, epoch=epoch, max_tasks=max_tasks, max_tokens=max_tokens, wait=duration(wait_s)
        )
        return list((await self.stub.Lease(request, timeout=30)).tasks)

    async def lease_one(self, worker: str, **options: Any) -> prefill_queue_pb2.LeasedTask:
        (leased,) = await self.lease(worker, **({"wait_s": LONG_S} | options))
        return leased

    async def complete(self, leased: prefill_queue_pb2.LeasedTask, *, by: str = A) -> None:
        result = prefill_queue_pb2.TaskCompleted(handoff=generation_pb2.KvHandoff(worker_id=by), computed_tokens=40)
        await self.stub.Complete(
            prefill_queue_pb2.CompleteRequest(key=key_of(leased), lease_id=leased.lease_id, result=result), timeout=10
        )

    async def extend(self, leased: prefill_queue_pb2.LeasedTask) -> float:
        extended = await self.stub.Extend(
            prefill_queue_pb2.ExtendRequest(key=key_of(leased), lease_id=leased.lease_id), timeout=10
        )
        return extended.ttl.ToNanoseconds() / 1e9

    async def fail(
        self,
        leased: prefill_queue_pb2.LeasedTask,
        *,
        retryable: bool = True,
        delay_s: float = 0.0,
        error: MeshError | None = None,
    ) -> None:
        request = prefill_queue_pb2.FailRequest(
            key=key_of(leased), lease_id=leased.lease_id, retryable=retryable, delay=duration(delay_s)
        )
        if error is not None:
            request.error.CopyFrom(to_status(error))
        await self.stub.Fail(request, timeout=10)

    async def cancel(self, name: str) -> None:
        key = prefill_queue_pb2.TaskKey(request_id=name, attempt=1)
        await self.stub.Cancel(prefill_queue_pb2.CancelRequest(key=key), timeout=10)

    async def waiting_calls(self, count: int) -> None:
        """Return once so many Lease calls wait for work."""
        await eventually(lambda: len(self.service._waiting) == count)


@asynccontextmanager
async def served(limits: QueueLimits | None = None, **options: Any) -> AsyncIterator[Bench]:
    service = PrefillQueue(limits, **options)
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    prefill_queue_pb2_grpc.add_PrefillQueueServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Bench(service, prefill_queue_pb2_grpc.PrefillQueueStub(channel))
    finally:
        service.close()
        await server.stop(None)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with served() as bench:
        yield bench


async def read(call: Any) -> Any:
    async with asyncio.timeout(10):
        message = await call.read()
    assert message is not grpc.aio.EOF
    return message


async def completed(submission: Submission) -> prefill_queue_pb2.TaskCompleted:
    """Read to the end of a good stream and return what it ended with."""
    async with asyncio.timeout(10):
        messages: list[prefill_queue_pb2.SubmitResponse] = await read_all(submission)
    assert [message.WhichOneof("event") for message in messages].index("completed") == len(messages) - 1
    return messages[-1].completed


async def refused(call: Awaitable[object], reason: Reason, code: grpc.StatusCode) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 10)
    error = from_rpc_error(caught.value)
    assert (error.reason, caught.value.code()) == (reason, code)
    return error


async def read_all(call: Any) -> list[Any]:
    """Read to the end, whatever it is; raises what the stream ended with."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what another process would see has no event to wait for
            await asyncio.sleep(0.001)


def key_of(leased: prefill_queue_pb2.LeasedTask) -> prefill_queue_pb2.TaskKey:
    return prefill_queue_pb2.TaskKey(request_id=leased.task.request_id, attempt=leased.task.attempt)


# A task's life.


async def test_submitter_follows_its_task_from_queued_to_completed(bench: Bench) -> None:
    (before,) = await bench.queue_up("before")
    submission = bench.submit("a", uncached_tokens=40)
    position = (await read(submission)).queued.position
    await bench.attach(A)

    first, leased = await bench.lease(A, max_tasks=2)
    await bench.complete(leased)

    assert position == 1
    assert (await read(submission)).leased == prefill_queue_pb2.TaskLeased(worker_id=A, lease_attempt=1)
    result = (await read(submission)).completed
    assert (result.handoff.worker_id, result.computed_tokens) == (A, 40)
    assert await submission.read() == grpc.aio.EOF
    assert await submission.code() is grpc.StatusCode.OK
    assert (first.task.request_id, leased.lease_attempt, leased.ttl.seconds) == ("before", 1, 10)
    assert list(leased.task.token_ids.token_ids) == list(range(40))
    before.cancel()


async def test_expired_lease_is_redelivered_and_the_second_holders_result_stands() -> None:
    async with served(QueueLimits(lease_ttl_s=0.2)) as bench:
        notices = await bench.attach(A)
        await bench.attach(B)
        (submission,) = await bench.queue_up("a")
        first = await bench.lease_one(A)

        second = await bench.lease_one(B)
        await refused(bench.complete(first, by=A), Reason.LEASE_LOST, grpc.StatusCode.FAILED_PRECONDITION)
        await bench.complete(second, by=B)

        assert (first.lease_attempt, second.lease_attempt) == (1, 2)
        assert first.lease_id != second.lease_id
        assert (await read(notices)).cancelled.lease_id == first.lease_id
        assert (await completed(submission)).handoff.worker_id == B
        await refused(bench.complete(first, by=A), Reason.LEASE_LOST, grpc.StatusCode.FAILED_PRECONDITION)


async def test_extended_lease_outlives_its_ttl() -> None:
    async with served(QueueLimits(lease_ttl_s=0.5)) as bench:
        await bench.attach(A)
        (submission,) = await bench.queue_up("a")
        leased = await bench.lease_one(A)

        loop = asyncio.get_running_loop()
        began = loop.time()
        while loop.time() - began < 1.0:
            assert await bench.extend(leased) == pytest.approx(0.5)
            assert await bench.lease(A, wait_s=0.1) == []
        await bench.complete(leased)

        assert (await completed(submission)).handoff.worker_id == A


async def test_extend_never_passes_the_time_to_live(bench: Bench) -> None:
    await bench.attach(A)
    await bench.queue_up("a", time_to_live=duration(6.0))
    leased = await bench.lease_one(A)

    extended_s = await bench.extend(leased)

    assert extended_s <= leased.ttl.ToNanoseconds() / 1e9 <= 6.0


async def test_failed_task_comes_back_after_its_delay_with_the_next_attempt() -> None:
    async with served(QueueLimits(backoff_base_s=0.1)) as bench:
        await bench.attach(A)
        await bench.queue_up("a")
        began = asyncio.get_running_loop().time()

        await bench.fail(await bench.lease_one(A), delay_s=0.3)
        at_once = await bench.lease(A)
        again = await bench.lease_one(A)

        assert at_once == []
        assert again.lease_attempt == 2
        assert asyncio.get_running_loop().time() - began >= 0.3


async def test_dead_task_is_told_to_its_submitter_at_once_and_listed(bench: Bench) -> None:
    await bench.attach(A)
    first, second = await bench.queue_up("a", "b")
    cause = MeshError(Reason.LAYOUT_MISMATCH, "fp-1 is not fp-2")

    await bench.fail(await bench.lease_one(A), retryable=False, error=cause)
    await refused(read_all(first), Reason.PREFILL_FAILED, grpc.StatusCode.UNAVAILABLE)
    await bench.fail(await bench.lease_one(A), retryable=False)
    await refused(read_all(second), Reason.PREFILL_FAILED, grpc.StatusCode.UNAVAILABLE)

    listed = (await bench.stub.ListDead(prefill_queue_pb2.ListDeadRequest(), timeout=10)).tasks
    latest = (await bench.stub.ListDead(prefill_queue_pb2.ListDeadRequest(limit=1), timeout=10)).tasks
    assert [dead.key.request_id for dead in listed] == ["b", "a"]
    assert [dead.key.request_id for dead in latest] == ["b"]
    assert listed[1].lease_attempts == 1
    assert "LAYOUT_MISMATCH: fp-1 is not fp-2" in listed[1].reason
    assert listed[0].died_at.ToNanoseconds() >= listed[1].died_at.ToNanoseconds() > 1_700_000_000 * 10**9


async def test_task_whose_leases_all_expire_is_dead() -> None:
    async with served(QueueLimits(lease_ttl_s=0.1, max_attempts=2)) as bench:
        await bench.attach(A)
        (submission,) = await bench.queue_up("a")

        attempts = [(await bench.lease_one(A)).lease_attempt for _ in range(2)]

        await refused(read_all(submission), Reason.PREFILL_FAILED, grpc.StatusCode.UNAVAILABLE)
        assert attempts == [1, 2]
        assert (bench.service.stats().expired_leases, bench.service.stats().dead) == (2, 1)


async def test_task_past_its_time_to_live_is_never_leased(bench: Bench) -> None:
    (submission,) = await bench.queue_up("a", time_to_live=duration(0.1))

    await refused(read_all(submission), Reason.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED)

    await bench.attach(A)
    assert await bench.lease(A) == []
    assert bench.service.stats().timed_out == 1


# Lease.


async def test_waiting_lease_is_served_as_soon_as_work_arrives(bench: Bench) -> None:
    await bench.attach(A)
    leasing = asyncio.create_task(bench.lease(A, wait_s=LONG_S))
    await bench.waiting_calls(1)
    submitted_at = asyncio.get_running_loop().time()

    await bench.queue_up("a")
    (leased,) = await leasing

    assert leased.task.request_id == "a"
    assert asyncio.get_running_loop().time() - submitted_at < LONG_S / 4


async def test_lease_on_an_empty_queue_returns_empty_when_its_wait_ends(bench: Bench) -> None:
    await bench.attach(A)
    began = asyncio.get_running_loop().time()

    leased = await bench.lease(A, wait_s=0.3)

    assert leased == []
    assert 0.3 <= asyncio.get_running_loop().time() - began < 3.0


async def test_lease_call_that_is_dropped_takes_no_task_with_it(bench: Bench) -> None:
    await bench.attach(A)
    await bench.attach(B)
    dropped = asyncio.create_task(bench.lease(A, wait_s=LONG_S))
    await bench.waiting_calls(1)
    kept = asyncio.create_task(bench.lease(B, wait_s=LONG_S))
    await bench.waiting_calls(2)
    dropped.cancel()
    await bench.waiting_calls(1)

    await bench.queue_up("a")

    assert [leased.lease_attempt for leased in await kept] == [1]


async def test_waiting_worker_that_holds_the_prefix_gets_the_new_task() -> None:
    held = {WorkerId(A): 0, WorkerId(B): 1}

    def cached_blocks(worker_id: WorkerId, block_hashes: tuple[SequenceHash, ...]) -> int:
        return held[worker_id] if block_hashes == (7, 8) else 0

    async with served(cached_blocks=cached_blocks) as bench:
        await bench.attach(A)
        await bench.attach(B)
        longest_waiting = asyncio.create_task(bench.lease(A, wait_s=LONG_S))
        await bench.waiting_calls(1)
        holder = asyncio.create_task(bench.lease(B, wait_s=LONG_S))
        await bench.waiting_calls(2)

        await bench.queue_up("cached", block_hashes=[7, 8])
        await bench.queue_up("other", block_hashes=[1, 2])

        assert [leased.task.request_id for leased in await holder] == ["cached"]
        assert [leased.task.request_id for leased in await longest_waiting] == ["other"]


async def test_budget_counts_uncached_tokens_and_0_is_no_limit(bench: Bench) -> None:
    await bench.attach(A)
    await bench.queue_up("a", "b", "c", uncached_tokens=3000)

    within = await bench.lease(A, max_tasks=9, max_tokens=6000)
    rest = await bench.lease(A, max_tasks=9)

    assert [leased.task.request_id for leased in within] == ["a", "b"]
    assert [leased.task.request_id for leased in rest] == ["c"]


async def test_urgent_priority_goes_first_and_unset_is_10(bench: Bench) -> None:
    await bench.attach(A)
    await bench.queue_up("unset")
    await bench.queue_up("later", priority=11)
    await bench.queue_up("first", priority=0)
    await bench.queue_up("ten", priority=10)

    leased = await bench.lease(A, max_tasks=9)

    assert [task.task.request_id for task in leased] == ["first", "unset", "ten", "later"]


# Refusals.


async def test_full_queue_says_when_to_come_back_and_keeps_what_it_has() -> None:
    async with served(QueueLimits(max_depth=1, full_retry_after_s=0.5)) as bench:
        await bench.attach(A)
        (kept,) = await bench.queue_up("a")

        refusal = await refused(read_all(bench.submit("b")), Reason.QUEUE_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED)

        assert refusal.retry_after_s == 0.5
        await bench.complete(await bench.lease_one(A))
        assert (await completed(kept)).computed_tokens == 40


@pytest.mark.parametrize(
    ("fields", "metadata"),
    [
        pytest.param(
            {"model": "qwen"}, {"capability": "model", "required": "qwen", "offered": "llama"}, id="another model"
        ),
        pytest.param(
            {"transports": ["nixl"]},
            {"capability": "transport", "required": "nixl", "offered": "tcp"},
            id="no transport",
        ),
        pytest.param(
            {"layout": generation_pb2.KvLayout(dtype="float16", block_size=32)},
            {"capability": "block_size", "required": "32", "offered": "16"},
            id="another block size",
        ),
    ],
)
async def test_task_that_no_worker_can_do_is_refused_naming_both_values(
    bench: Bench, fields: dict[str, Any], metadata: dict[str, str]
) -> None:
    await bench.attach(A)

    refusal = await refused(
        read_all(bench.submit("a", **fields)), Reason.NO_CAPABLE_WORKER, grpc.StatusCode.FAILED_PRECONDITION
    )

    assert refusal.metadata == metadata


async def test_task_without_a_layout_is_leased_to_any_worker_of_its_model(bench: Bench) -> None:
    await bench.attach(A)
    await bench.queue_up("a", layout=None, transports=[])

    assert (await bench.lease_one(A)).task.request_id == "a"


async def test_lease_without_attach_is_refused(bench: Bench) -> None:
    await refused(bench.lease(A), Reason.NOT_ATTACHED, grpc.StatusCode.FAILED_PRECONDITION)


async def test_calls_by_a_non_holder_are_refused_and_unknown_tasks_are_not_found(bench: Bench) -> None:
    await bench.attach(A)
    (submission, _) = await bench.queue_up("a", "b")
    mine, other = await bench.lease(A, max_tasks=2)
    stolen = prefill_queue_pb2.LeasedTask(task=mine.task, lease_id=other.lease_id)
    ghost = prefill_queue_pb2.LeasedTask(
        task=prefill_queue_pb2.PrefillTask(request_id="ghost", attempt=1), lease_id=mine.lease_id
    )

    for call in (bench.extend, bench.complete, bench.fail):
        await refused(call(stolen), Reason.LEASE_LOST, grpc.StatusCode.FAILED_PRECONDITION)
        await refused(call(ghost), Reason.NOT_FOUND, grpc.StatusCode.NOT_FOUND)
    await refused(bench.cancel("ghost"), Reason.NOT_FOUND, grpc.StatusCode.NOT_FOUND)

    await bench.complete(mine)
    assert (await completed(submission)).handoff.worker_id == A


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda bench: read_all(bench.submit("")), "task.request_id"),
        (lambda bench: read_all(bench.submit("a", attempt=0)), "task.attempt"),
        (lambda bench: read_all(bench.submit("a", time_to_live=duration(-1.0))), "task.time_to_live"),
        (lambda bench: bench.attach(""), "worker_id"),
        (lambda bench: bench.attach(A, epoch=0), "epoch"),
        (lambda bench: bench.lease(A, max_tasks=0), "max_tasks"),
        (lambda bench: bench.lease(A, wait_s=31.0), "wait"),
        (lambda bench: bench.cancel(""), "key.request_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_field_is_named(bench: Bench, call: Callable[[Bench], Awaitable[object]], field: str) -> None:
    error = await refused(call(bench), Reason.INVALID_FIELD, grpc.StatusCode.INVALID_ARGUMENT)

    assert error.field == field


# Duplicates.


async def test_same_submit_twice_is_one_task_answered_on_both_streams(bench: Bench) -> None:
    await bench.attach(A)
    (first,) = await bench.queue_up("a", time_to_live=duration(50.0))
    leased = await bench.lease_one(A)

    second = bench.submit("a", time_to_live=duration(40.0), traceparent="of the second call")
    joined_at = await read(second)
    await bench.complete(leased)

    assert joined_at.leased == prefill_queue_pb2.TaskLeased(worker_id=A, lease_attempt=1)
    assert (await completed(first)).handoff.worker_id == A
    assert (await completed(second)).handoff.worker_id == A
    assert bench.service.stats().submitted == 1


async def test_other_content_under_one_key_is_refused(bench: Bench) -> None:
    await bench.queue_up("a")

    other = bench.submit("a", text="other")

    await refused(read_all(other), Reason.ALREADY_EXISTS, grpc.StatusCode.ALREADY_EXISTS)
    assert bench.service.stats().depth == 1


async def test_task_that_ended_is_answered_again_the_same(bench: Bench) -> None:
    await bench.attach(A)
    done, dead = await bench.queue_up("done", "dead")
    first, second = await bench.lease(A, max_tasks=2)
    await bench.complete(first)
    await bench.fail(second, retryable=False)
    await read_all(done)
    await refused(read_all(dead), Reason.PREFILL_FAILED, grpc.StatusCode.UNAVAILABLE)

    assert (await completed(bench.submit("done"))).handoff.worker_id == A
    await refused(read_all(bench.submit("dead")), Reason.PREFILL_FAILED, grpc.StatusCode.UNAVAILABLE)
    assert bench.service.stats().submitted == 2


async def test_task_lives_until_the_last_of_its_streams_is_dropped(bench: Bench) -> None:
    notices = await bench.attach(A)
    (first,) = await bench.queue_up("a")
    (second,) = await bench.queue_up("a")
    leased = await bench.lease_one(A)

    first.cancel()
    still_held = await bench.extend(leased)
    second.cancel()

    assert still_held == 10.0
    assert (await read(notices)).cancelled.lease_id == leased.lease_id


# Cancel.


async def test_cancelled_task_is_gone_from_the_line(bench: Bench) -> None:
    await bench.attach(A)
    (submission,) = await bench.queue_up("a")

    await bench.cancel("a")
    await bench.cancel("a")

    await refused(read_all(submission), Reason.CANCELLED, grpc.StatusCode.CANCELLED)
    assert await bench.lease(A) == []
    assert bench.service.stats().cancelled == 1


async def test_holder_is_told_of_a_cancel_and_its_result_is_refused(bench: Bench) -> None:
    notices = await bench.attach(A)
    await bench.queue_up("a")
    leased = await bench.lease_one(A)

    await bench.cancel("a")

    notice = (await read(notices)).cancelled
    assert (notice.key, notice.lease_id) == (key_of(leased), leased.lease_id)
    await refused(bench.complete(leased), Reason.LEASE_LOST, grpc.StatusCode.FAILED_PRECONDITION)


async def test_dropped_submit_stream_cancels_the_task_and_its_holder_is_told(bench: Bench) -> None:
    notices = await bench.attach(A)
    held, waiting = await bench.queue_up("held", "waiting")
    leased = await bench.lease_one(A)

    waiting.cancel()
    await eventually(lambda: bench.service.stats().cancelled == 1)
    held.cancel()

    assert (await read(notices)).cancelled.lease_id == leased.lease_id
    assert await bench.lease(A) == []
    assert (bench.service.stats().depth, bench.service.stats().leased, bench.service.stats().cancelled) == (0, 0, 2)


# Attach.


async def test_end_of_an_attach_stream_requeues_its_leases_at_once(bench: Bench) -> None:
    attachment = await bench.attach(A)
    await bench.attach(B)
    (submission,) = await bench.queue_up("a")
    first = await bench.lease_one(A)
    taking_over = asyncio.create_task(bench.lease(B, wait_s=LONG_S))
    await bench.waiting_calls(1)

    attachment.cancel()
    (second,) = await taking_over

    assert (first.lease_attempt, second.lease_attempt) == (1, 2)
    progress = [(await read(submission)).WhichOneof("event") for _ in range(3)]
    assert progress == ["leased", "queued", "leased"]
    await refused(bench.complete(first), Reason.LEASE_LOST, grpc.StatusCode.FAILED_PRECONDITION)
    await refused(bench.lease(A), Reason.NOT_ATTACHED, grpc.StatusCode.FAILED_PRECONDITION)


async def test_waiting_lease_ends_with_its_attach_stream(bench: Bench) -> None:
    attachment = await bench.attach(A)
    waiting = asyncio.create_task(bench.lease(A, wait_s=LONG_S))
    await bench.waiting_calls(1)

    attachment.cancel()

    await refused(waiting, Reason.NOT_ATTACHED, grpc.StatusCode.FAILED_PRECONDITION)


async def test_higher_epoch_supersedes_and_a_lower_one_is_refused(bench: Bench) -> None:
    old = await bench.attach(A, epoch=5)
    await bench.queue_up("a")
    lost = await bench.lease_one(A, epoch=5)

    await bench.attach(A, epoch=6)

    await refused(read_all(old), Reason.STALE_EPOCH, grpc.StatusCode.FAILED_PRECONDITION)
    await refused(bench.attach(A, epoch=4), Reason.STALE_EPOCH, grpc.StatusCode.FAILED_PRECONDITION)
    await refused(bench.lease(A, epoch=5), Reason.STALE_EPOCH, grpc.StatusCode.FAILED_PRECONDITION)
    await refused(bench.complete(lost), Reason.LEASE_LOST, grpc.StatusCode.FAILED_PRECONDITION)
    assert (await bench.lease_one(A, epoch=6)).lease_attempt == 2
    assert bench.service.stats().attached_workers == 1


async def test_same_epoch_attached_again_takes_the_stream_over_and_keeps_the_leases(bench: Bench) -> None:
    old = await bench.attach(A)
    await bench.queue_up("a")
    leased = await bench.lease_one(A)

    new = await bench.attach(A)
    await refused(read_all(old), Reason.STALE_EPOCH, grpc.StatusCode.FAILED_PRECONDITION)
    await bench.cancel("a")

    assert (await read(new)).cancelled.lease_id == leased.lease_id
    assert bench.service.stats().attached_workers == 1


# Stats, drain and close.


async def test_stats_tell_what_became_of_every_task() -> None:
    async with served(QueueLimits(backoff_base_s=LONG_S)) as bench:
        attachment = await bench.attach(A)
        await bench.attach(B)
        names = ["done", "dead", "backs off", "cancelled", "lost", "held", "waits"]
        streams = await bench.queue_up(*names)
        done, dead, backs_off, _cancelled, *_held = await bench.lease(B, max_tasks=6)
        await bench.complete(done)
        await bench.fail(dead, retryable=False)
        await bench.fail(backs_off)
        await bench.cancel("cancelled")
        await bench.queue_up("of A", priority=0)
        await bench.lease_one(A)
        attachment.cancel()
        await eventually(lambda: bench.service.stats().expired_leases == 1)

        stats = (await bench.stub.GetStats(prefill_queue_pb2.GetStatsRequest(), timeout=10)).stats

        assert stats == bench.service.stats()
        assert (stats.depth, stats.leased, stats.submitted) == (3, 2, 8)
        assert (stats.completed, stats.dead, stats.cancelled, stats.timed_out) == (1, 1, 1, 0)
        assert (stats.expired_leases, stats.attached_workers) == (1, 1)
        assert len(streams) == len(names)


async def test_metrics_follow_the_tasks(bench: Bench) -> None:
    def completed_count() -> float:
        return REGISTRY.get_sample_value("kvmesh_queue_tasks_total", {"outcome": "completed"}) or 0.0

    def gauges() -> tuple[float | None, float | None]:
        sample = REGISTRY.get_sample_value
        return sample("kvmesh_queue_depth"), sample("kvmesh_queue_leased")

    before = completed_count()
    await bench.attach(A)
    submission, _ = await bench.queue_up("a", "b")
    while_waiting = gauges()
    leased = await bench.lease_one(A)
    while_leased = gauges()
    await bench.complete(leased)
    await completed(submission)

    assert (while_waiting, while_leased, gauges()) == ((2, 0), (1, 1), (1, 0))
    assert completed_count() - before == 1


async def test_drain_gives_waiting_tasks_up_and_lets_leased_ones_finish(bench: Bench) -> None:
    notices = await bench.attach(A)
    running, waiting = await bench.queue_up("running", "waiting")
    leased = await bench.lease_one(A)

    draining = asyncio.create_task(bench.service.drain(LONG_S))
    await refused(read_all(waiting), Reason.DRAINING, grpc.StatusCode.UNAVAILABLE)
    told = (await read(notices)).WhichOneof("notice")
    late_lease = await bench.lease(A)
    await refused(read_all(bench.submit("late")), Reason.DRAINING, grpc.StatusCode.UNAVAILABLE)
    await refused(bench.attach(B), Reason.DRAINING, grpc.StatusCode.UNAVAILABLE)
    await bench.complete(leased)

    assert (told, late_lease) == ("draining", [])
    assert await draining == (1, 1)
    assert (await completed(running)).handoff.worker_id == A


async def test_task_that_loses_its_lease_in_a_drain_is_given_up(bench: Bench) -> None:
    attachment = await bench.attach(A)
    (submission,) = await bench.queue_up("a")
    await bench.lease_one(A)

    draining = asyncio.create_task(bench.service.drain(LONG_S))
    assert (await read(attachment)).WhichOneof("notice") == "draining"
    attachment.cancel()

    await refused(read_all(submission), Reason.DRAINING, grpc.StatusCode.UNAVAILABLE)
    assert await draining == (0, 1)


async def test_drain_ends_at_its_bound_when_a_holder_never_answers(bench: Bench) -> None:
    await bench.attach(A)
    await bench.queue_up("a")
    await bench.lease_one(A)

    finished, given_up = await bench.service.drain(0.1)

    assert (finished, given_up) == (0, 1)


async def test_close_ends_every_stream_and_every_waiting_call(bench: Bench) -> None:
    notices = await bench.attach(A)
    await bench.attach(B)
    held, waiting = await bench.queue_up("held", "waiting")
    await bench.lease(B, max_tasks=2)
    leasing = asyncio.create_task(bench.lease(A, wait_s=LONG_S))
    await bench.waiting_calls(1)

    bench.service.close()
    bench.service.close()

    for call in (read_all(held), read_all(waiting), read_all(notices), leasing, read_all(bench.submit("late"))):
        await refused(call, Reason.DRAINING, grpc.StatusCode.UNAVAILABLE)
