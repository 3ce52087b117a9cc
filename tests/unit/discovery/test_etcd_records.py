"""What stands in etcd, byte for byte, and back."""

import json

import pytest

from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.etcd_records import MalformedRecordError, decode, encode, namespace_prefix, record_key

RECORD = WorkerRecord(
    worker_id=WorkerId("node/prefill/0"),
    epoch=Epoch(2**64 - 1),
    role=WorkerRole.PREFILL,
    models=("m", "n"),
    namespace="team a/prod",
    block_size=16,
    total_blocks=1000,
    max_requests=8,
    labels={"zone": "b"},
    accepts=frozenset({"tokens", "text"}),
    ranks=2,
    draining=True,
    address="10.0.0.1:9000",
    metadata={"transport": "tcp"},
)


def test_a_key_is_namespace_component_worker_and_epoch_and_slashes_in_names_are_none() -> None:
    assert record_key(RECORD) == b"kvmesh/team%20a%2Fprod/prefill/node%2Fprefill%2F0/18446744073709551615"
    assert record_key(RECORD).startswith(namespace_prefix("team a/prod"))
    assert not record_key(RECORD).startswith(namespace_prefix("team a"))


def test_epochs_sort_as_numbers() -> None:
    keys = [
        record_key(WorkerRecord(worker_id=WorkerId("w"), epoch=Epoch(epoch), models=("m",), block_size=16))
        for epoch in (9, 10, 1_700_000_000_000_000_000)
    ]

    assert keys == sorted(keys)


def test_a_value_is_what_etcds_resolver_for_go_reads() -> None:
    assert json.loads(encode(RECORD)) == {
        "Op": 0,
        "Addr": "10.0.0.1:9000",
        "Metadata": {
            "state": "live",
            "worker_id": "node/prefill/0",
            "epoch": "18446744073709551615",
            "role": "prefill",
            "models": ["m", "n"],
            "namespace": "team a/prod",
            "block_size": 16,
            "total_blocks": 1000,
            "max_requests": 8,
            "labels": {"zone": "b"},
            "accepts": ["text", "tokens"],
            "ranks": 2,
            "draining": True,
            "metadata": {"transport": "tcp"},
        },
    }


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_record_comes_back_as_it_was(is_stopped: bool) -> None:
    assert decode(encode(RECORD, is_stopped=is_stopped)) == (RECORD, is_stopped)


def test_fields_of_a_later_version_are_ignored() -> None:
    value = json.loads(encode(RECORD))
    value["Metadata"]["colour"] = "blue"
    value["Weight"] = 3

    assert decode(json.dumps(value).encode()) == (RECORD, False)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="not text"),
        pytest.param(b'{"Op":0,"Addr":"h:1"}', id="another program's endpoint"),
        pytest.param(encode(RECORD).replace(b'"block_size":16', b'"block_size":0'), id="block size out of range"),
        pytest.param(encode(RECORD).replace(b'"prefill"', b'"cook"'), id="unknown role"),
    ],
)
def test_what_is_no_record_is_said_to_be_none(value: bytes) -> None:
    with pytest.raises(MalformedRecordError):
        decode(value)
