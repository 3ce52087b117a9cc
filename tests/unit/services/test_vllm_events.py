"""Batches of KV events as engines send them, read: both encodings, and what is not known."""

import sys
from collections import Counter
from typing import Any

import pytest

from kvmesh.core.errors import FixRequestError, NotServedError, Reason
from kvmesh.core.foreign_blocks import ForeignCleared, ForeignRemoved, ForeignStored, Place
from kvmesh.services.vllm_events import VllmBatch, decode_batch, require_packages
from kvmesh.testing.vllm_publisher import packed

CAPTURED = [
    1789095808.8378847,
    [
        {
            "type": "BlockStored", "block_hashes": [15760518052499183552], "parent_block_hash": None,
            "token_ids": [
                151644, 872, 198, 9064, 374, 279, 6722, 315, 5616, 30, 151645, 198, 151644, 77091, 198, 151667,
            ],
            "block_size": 16, "lora_id": None, "medium": "GPU", "lora_name": None, "extra_keys": [None], "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
    ],
    0,
]  # fmt: skip


def decode(batch: Any) -> tuple[VllmBatch, Counter[str]]:
    ignored: Counter[str] = Counter()
    return decode_batch(packed(batch), on_ignored=lambda reason: ignored.update([reason])), ignored


def only_stored(batch: VllmBatch) -> ForeignStored:
    [event] = batch.events
    assert isinstance(event, ForeignStored)
    return event


def test_array_form() -> None:
    batch, ignored = decode([1.0, [["BlockStored", [100, 101], 99, [1, 2, 3], 16, None, "CPU"]], 0])

    event = only_stored(batch)
    assert (batch.timestamp, batch.rank, ignored) == (1.0, 0, Counter())
    assert (event.block_hashes, event.parent, event.token_ids.tolist()) == ((100, 101), 99, [1, 2, 3])
    assert (event.block_size, event.lora, event.lora_id, event.place) == (16, None, None, Place(medium="CPU"))


@pytest.mark.parametrize("as_map", [False, True])
def test_map_form_in_batches_of_either_form(as_map: bool) -> None:
    stored = {
        "type": "BlockStored", "block_hashes": [100, 101], "parent_block_hash": 99, "token_ids": [1, 2, 3],
        "block_size": 16, "medium": "CPU", "group_idx": 0,
    }  # fmt: skip

    batch, ignored = decode({"ts": 1.0, "events": [stored]} if as_map else [1.0, [stored]])

    event = only_stored(batch)
    assert (batch.rank, ignored) == (None, Counter())
    assert (event.block_hashes, event.parent, event.token_ids.tolist()) == ((100, 101), 99, [1, 2, 3])
    assert event.place == Place(medium="CPU", group=0)


def test_mixed_batch_keeps_its_order() -> None:
    batch, ignored = decode(
        [
            2.0,
            [
                {"type": "BlockRemoved", "block_hashes": [100], "medium": "GPU"},
                {"type": "AllBlocksCleared"},
                ["BlockStored", [7], None, [5], 1, None, "GPU"],
            ],
            1,
        ]
    )

    first, second, third = batch.events
    assert (first, second) == (
        ForeignRemoved(block_hashes=(100,), place=Place(medium="GPU")),
        ForeignCleared(),
    )
    assert isinstance(third, ForeignStored)
    assert (third.block_hashes, batch.rank, ignored) == ((7,), 1, Counter())


def test_captured_batch() -> None:
    batch, ignored = decode(CAPTURED)

    event = only_stored(batch)
    assert (batch.timestamp, batch.rank, ignored) == (1789095808.8378847, 0, Counter())
    assert (event.block_hashes, event.parent, len(event.token_ids)) == ((15760518052499183552,), None, 16)
    assert (event.extra_keys, event.place) == (((),), Place(medium="GPU", group=0, kind="full_attention"))


def test_hashes_may_be_bytes() -> None:
    batch, _ = decode([1.0, [["BlockStored", [b"a" * 32], b"b" * 32, [1], 1, None, None]]])

    event = only_stored(batch)
    assert (event.block_hashes, event.parent, event.place.medium) == ((b"a" * 32,), b"b" * 32, None)


def test_adapter_and_extra_keys_are_read() -> None:
    keys = [["adapter-a", ["f" * 64, 3]], None]

    batch, _ = decode([1.0, [["BlockStored", [1, 2], None, [5, 6], 1, 4, "GPU", "adapter-a", keys]]])

    event = only_stored(batch)
    assert (event.lora_id, event.lora, event.extra_keys) == (4, "adapter-a", (("adapter-a", "f" * 64), ()))


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        pytest.param({"type": "BlockPromoted", "block_hashes": [1]}, "unknown_type", id="unknown type"),
        pytest.param(["BlockPromoted", [1]], "unknown_type", id="unknown type in an array"),
        pytest.param([], "unknown_type", id="empty array"),
        pytest.param(7, "unknown_type", id="no event"),
        pytest.param({"type": "BlockRemoved"}, "malformed", id="a field is missing"),
        pytest.param(["BlockRemoved", [1.5]], "malformed", id="a hash is no hash"),
        pytest.param(["BlockStored", [1], None, [-1], 1], "malformed", id="a token is negative"),
    ],
)
def test_what_is_not_known_is_counted_and_the_rest_is_taken(event: Any, reason: str) -> None:
    batch, ignored = decode([1.0, [event, ["BlockRemoved", [100]]]])

    assert batch.events == (ForeignRemoved(block_hashes=(100,)),)
    assert ignored == Counter([reason])


def test_extra_fields_are_counted_and_the_event_is_taken() -> None:
    batch, ignored = decode(
        [1.0, [{"type": "BlockRemoved", "block_hashes": [1], "new": 2}, ["BlockRemoved", [2], "GPU", 0, "new"]], 0, "x"]
    )

    assert [event.block_hashes for event in batch.events if isinstance(event, ForeignRemoved)] == [(1,), (2,)]
    assert ignored == Counter({"extra_field": 3})


@pytest.mark.parametrize("payload", [b"", b"\xc1", packed(7), packed([1.0]), packed(["x", []]), packed([1.0, 7])])
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(FixRequestError) as caught:
        decode_batch(payload, on_ignored=lambda _: None)

    assert caught.value.reason is Reason.INVALID_FIELD


@pytest.mark.parametrize("missing", ["msgpack", "zmq.asyncio"])
def test_missing_package_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)

    with pytest.raises(NotServedError, match=r"kvmesh\[vllm-events\]"):
        require_packages()
