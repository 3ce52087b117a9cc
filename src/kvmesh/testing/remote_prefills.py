"""What tests of remote prefill share: the default prompt, a prefill worker played by hand, peers that are not there."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvmesh import telemetry
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.engines.engine import KvLayout
from kvmesh.runtime.worker import Worker
from kvmesh.testing.worker_group import (
    BLOCK_SIZE,
    GENEROUS_S,
    MODEL,
    NAMESPACE,
    Answer,
    HeldSimulatedEngine,
    WorkerGroup,
    request,
    worker_group,
)
from kvmesh.v1 import generation_pb2, prefill_queue_pb2, prefill_worker_pb2
from kvmesh.wire.layout import layout_to_wire
from kvmesh.wire.validation import duration

PROMPT = tuple(range(18))
"""That of `request`."""
BLOCKS = 4
"""Full blocks of it that may be cached: its last token is always computed."""
HAND = "node/prefill/hand"
NOWHERE = "127.0.0.1:1"
"""An address that refuses connections."""


def decisions(answer: Answer) -> list[tuple[bool, str]]:
    """Return where the prefill was to run, and why, each time that this was decided."""
    return [(decision.remote, decision.reason) for decision in answer.decisions]


async def local_answer(tokens: Sequence[int] = PROMPT) -> Answer:
    """Return what a worker answers that is on its own."""
    async with worker_group() as alone:
        return await alone.generate(await alone.add_decode(), request("alone", tokens=tokens))


async def add_record(group: WorkerGroup, worker_id: str, role: WorkerRole, address: str = NOWHERE) -> None:
    """Let the others believe in somebody at an address."""
    await group.discovery.register(
        WorkerRecord(
            worker_id=WorkerId(worker_id), epoch=Epoch(1), role=role, models=(MODEL,), namespace=NAMESPACE,
            block_size=BLOCK_SIZE, address=address,
        )
    )  # fmt: skip


def prefill_task(request_id: str, tokens: Sequence[int] = PROMPT) -> prefill_queue_pb2.PrefillTask:
    """Return the first attempt at a prompt."""
    return prefill_queue_pb2.PrefillTask(
        request_id=request_id, attempt=1, model=MODEL, token_ids=generation_pb2.TokenIds(token_ids=tokens)
    )


async def handoff_of(group: WorkerGroup, holder: Worker) -> generation_pb2.KvHandoff:
    """Have a prefill worker compute the prompt, asked directly."""
    wanted = prefill_worker_pb2.PrefillWorkerGenerateRequest(task=prefill_task("direct"))
    call = group.direct(holder).Generate(wanted, timeout=GENEROUS_S)
    return [response async for response in call][-1].handoff


class HandWorker:
    """A prefill worker by hand: it leases and says what a test wants it to say."""

    def __init__(self, group: WorkerGroup, attachment: Any) -> None:
        """Made by `attach`."""
        self._stub = group.queue_stub()
        self._attachment = attachment

    @classmethod
    async def attach(cls, group: WorkerGroup, **fields: Any) -> "HandWorker":
        """Attach it to the queue, with other `fields` of AttachRequest where they are given, and register it."""
        await add_record(group, HAND, WorkerRole.PREFILL)
        defaults: dict[str, Any] = {
            "models": [MODEL],
            "layout": layout_to_wire(_layout()),
            "transports": [group.network.reach],
        }
        attachment = group.queue_stub().Attach(
            prefill_queue_pb2.AttachRequest(worker_id=HAND, epoch=1, **(defaults | fields)), timeout=GENEROUS_S
        )
        await attachment.read()
        return cls(group, attachment)

    async def lease(self) -> prefill_queue_pb2.LeasedTask:
        """Wait for a task, and take it."""
        leased = await self._stub.Lease(
            prefill_queue_pb2.LeaseRequest(worker_id=HAND, epoch=1, max_tasks=1, wait=duration(10)),
            timeout=GENEROUS_S,
        )
        return leased.tasks[0]

    async def complete(self, leased: prefill_queue_pb2.LeasedTask, handoff: generation_pb2.KvHandoff) -> None:
        """Hand a task's blocks over. Raises: grpc.aio.AioRpcError."""
        key = prefill_queue_pb2.TaskKey(request_id=leased.task.request_id, attempt=leased.task.attempt)
        result = prefill_queue_pb2.TaskCompleted(handoff=handoff, computed_tokens=len(leased.task.token_ids.token_ids))
        await self._stub.Complete(
            prefill_queue_pb2.CompleteRequest(key=key, lease_id=leased.lease_id, result=result), timeout=GENEROUS_S
        )

    def leave(self) -> None:
        """End its attachment."""
        self._attachment.cancel()


@contextmanager
def silent_server() -> Iterator[str]:
    """Listen, and never say anything: the kernel alone takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def waits_ended(wait: str) -> float:
    """Return how often a wait of this process has ended for want of an answer."""
    return float(telemetry.WAIT_ENDED.labels(wait=wait)._value.get())


def _layout() -> KvLayout:
    layout = HeldSimulatedEngine().info.layout
    assert layout is not None
    return layout
