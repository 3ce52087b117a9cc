from typing import Any

import pytest
from google.rpc import status_pb2

from kvmesh.core.errors import FixRequestError, MeshError, Reason
from kvmesh.core.ids import AttemptKey, RequestId
from kvmesh.core.lease_capability import Capability, WorkerCapability
from kvmesh.core.lease_effects import TaskCancelled, TaskDead, TaskExpired
from kvmesh.v1 import generation_pb2, prefill_queue_pb2
from kvmesh.wire.error_catalog import to_status
from kvmesh.wire.prefill_queue import failed_outcome, failure_detail, task_spec, worker_capability
from kvmesh.wire.validation import duration

KEY = AttemptKey(RequestId("a"), 1)
LAYOUT = generation_pb2.KvLayout(dtype="float16", block_size=16, layers=2, model_fingerprint="fp-1")


def task(**fields: Any) -> prefill_queue_pb2.PrefillTask:
    defaults: dict[str, Any] = {"request_id": "a", "attempt": 1, "text": "hello"}
    return prefill_queue_pb2.PrefillTask(**(defaults | fields))


def test_unset_fields_have_the_contracts_defaults() -> None:
    spec = task_spec(task(), now=100.0)

    assert (spec.key, spec.priority, spec.expires_at) == (KEY, 10, 160.0)
    assert spec.requirement == Capability(model="", block_size=0, dtype="", layout="")


def test_set_fields_reach_the_queue() -> None:
    spec = task_spec(
        task(
            model="llama", priority=0, time_to_live=duration(5.0), uncached_tokens=7, block_hashes=[2**64 - 1, 3],
            transports=["tcp"],
        ),
        now=100.0,
    )  # fmt: skip

    assert (spec.priority, spec.expires_at, spec.uncached_tokens) == (0, 105.0, 7)
    assert spec.block_hashes == (2**64 - 1, 3)
    assert (spec.requirement.model, spec.requirement.transports) == ("llama", frozenset({"tcp"}))


def test_worker_of_an_equal_layout_meets_the_task_and_one_of_another_does_not() -> None:
    requirement = task_spec(task(model="llama", layout=LAYOUT), now=0.0).requirement
    other = generation_pb2.KvLayout()
    other.CopyFrom(LAYOUT)
    other.model_fingerprint = "fp-2"

    def offer(layout: generation_pb2.KvLayout | None) -> WorkerCapability:
        return worker_capability(prefill_queue_pb2.AttachRequest(models=["llama"], layout=layout))

    assert offer(LAYOUT).meets(requirement)
    assert not offer(None).meets(requirement)
    assert not offer(other).meets(requirement)
    assert offer(other).mismatch(requirement).field == "layout"


def test_content_is_all_but_the_time_left_and_the_trace() -> None:
    content = task_spec(task(), now=0.0).content

    assert task_spec(task(time_to_live=duration(1.0), traceparent="00-1-2-01"), now=9.0).content == content
    for fields in ({"text": "other"}, {"model": "m"}, {"priority": 1}, {"first_block": 1}, {"lora": "l"}):
        assert task_spec(task(**fields), now=0.0).content != content


def test_task_without_a_prompt_is_refused() -> None:
    with pytest.raises(FixRequestError) as refusal:
        task_spec(prefill_queue_pb2.PrefillTask(request_id="a", attempt=1), now=0.0)

    assert refusal.value.field == "task.input"


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (TaskDead(KEY, 3, "why"), Reason.PREFILL_FAILED),
        (TaskExpired(KEY), Reason.DEADLINE),
        (TaskCancelled(KEY), Reason.CANCELLED),
    ],
)
def test_bad_outcome_becomes_the_error_of_its_reason(
    outcome: TaskDead | TaskExpired | TaskCancelled, reason: Reason
) -> None:
    assert failed_outcome(outcome).reason is reason


def test_failure_detail_is_one_bounded_line() -> None:
    long = to_status(MeshError(Reason.LAYOUT_MISMATCH, "line\n" * 1000))

    detail = failure_detail(long)

    assert detail.startswith("LAYOUT_MISMATCH: line line")
    assert len(detail) == 512
    assert failure_detail(status_pb2.Status()) == ""
