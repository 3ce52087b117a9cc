"""Worker records as they stand in etcd, readable by etcd's own resolver for Go as well.

    kvmesh / NAMESPACE / COMPONENT / WORKER_ID / EPOCH  ->  {"Op": 0, "Addr": "host:port", "Metadata": {...}}

COMPONENT is the role. Names are percent-encoded, so that a slash in them is no separator; EPOCH has 20 digits, so that
the order of keys is that of incarnations. A client in Go that resolves `etcd:///kvmesh/NAMESPACE/COMPONENT` finds the
addresses. 64-bit numbers are strings, since JSON readers elsewhere keep 53 bits.
"""

from typing import Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer

from kvmesh.core.errors import MeshError
from kvmesh.core.ids import Epoch, WorkerId
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.etcd.v1 import etcd_pb2

_EQUAL, _GREATER = 0, 1
_VERSION, _CREATE_REVISION = 0, 1
_EPOCH_DIGITS = 20
_AFTER_DIGITS = b":"
"""The character after 9: the end of a range of epochs."""
STOPPED = "stopped"


class MalformedRecordError(ValueError):
    """What stands under a key is no record of a worker."""


class _Metadata(BaseModel):
    """WorkerRecord's fields, but for the address, and the state; what is unknown here is of a later version."""

    model_config = ConfigDict(extra="ignore")

    state: str
    """`stopped`: the worker ended in good order, and its key is about to go. Anything else: it lives."""
    worker_id: WorkerId
    epoch: Epoch
    role: WorkerRole
    models: tuple[str, ...]
    namespace: str
    block_size: int
    total_blocks: int = 0
    max_requests: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    accepts: frozenset[str] = frozenset()
    ranks: int = 1
    draining: bool = False
    metadata: dict[str, str] = Field(default_factory=dict)

    @field_serializer("epoch")
    def _keep_64_bits(self, epoch: Epoch) -> str:
        return str(epoch)

    @field_serializer("accepts")
    def _in_order(self, accepts: frozenset[str]) -> list[str]:
        return sorted(accepts)


class _Value(BaseModel):
    model_config = ConfigDict(extra="ignore")

    Op: Literal[0] = 0
    Addr: str
    Metadata: _Metadata


def namespace_prefix(namespace: str) -> bytes:
    """Return what the keys of a namespace begin with."""
    return f"kvmesh/{quote(namespace, safe='')}/".encode()


def record_key(record: WorkerRecord) -> bytes:
    """Return the key of one incarnation."""
    return _worker_prefix(record) + _digits(record.epoch)


def key_epoch(key: bytes) -> Epoch:
    """Return the epoch of a record's key."""
    return Epoch(int(key[-_EPOCH_DIGITS:]))


def encode(record: WorkerRecord, *, is_stopped: bool = False) -> bytes:
    """Return the value; equal records have equal values."""
    fields = {name: getattr(record, name) for name in _Metadata.model_fields if name != "state"}
    metadata = _Metadata(state=STOPPED if is_stopped else "live", **fields)
    return _Value(Addr=record.address, Metadata=metadata).model_dump_json().encode()


def decode(value: bytes) -> tuple[WorkerRecord, bool]:
    """Return the record, and whether its worker has stopped. Raises: MalformedRecordError."""
    try:
        stored = _Value.model_validate_json(value)
        fields = {name: getattr(stored.Metadata, name) for name in _Metadata.model_fields if name != "state"}
        return WorkerRecord(address=stored.Addr, **fields), stored.Metadata.state == STOPPED
    except (ValidationError, MeshError) as exc:
        raise MalformedRecordError(str(exc)) from exc


def put_record(record: WorkerRecord, lease_id: int) -> etcd_pb2.TxnRequest:
    """Put a record in the place of lower epochs; not done if a higher one stands there, which is returned instead."""
    workers, epoch = _worker_prefix(record), _digits(record.epoch)
    above = workers + epoch + b"\0", workers + _AFTER_DIGITS
    return etcd_pb2.TxnRequest(
        # No key was ever created there: true of every key of the range when it is empty, and only then.
        compare=[
            etcd_pb2.Compare(
                target=_CREATE_REVISION, result=_EQUAL, create_revision=0, key=above[0], range_end=above[1]
            )
        ],
        success=[
            etcd_pb2.RequestOp(
                request_delete_range=etcd_pb2.DeleteRangeRequest(key=workers, range_end=workers + epoch)
            ),
            etcd_pb2.RequestOp(
                request_put=etcd_pb2.PutRequest(key=workers + epoch, value=encode(record), lease_id=lease_id)
            ),
        ],
        failure=[
            etcd_pb2.RequestOp(request_range=etcd_pb2.RangeRequest(key=above[0], range_end=above[1], limit=1)),
        ],
    )


def mark_stopped(record: WorkerRecord, lease_id: int) -> etcd_pb2.TxnRequest:
    """Say in the record, if it still stands, that its worker has stopped."""
    key = record_key(record)
    value = encode(record, is_stopped=True)
    return etcd_pb2.TxnRequest(
        compare=[etcd_pb2.Compare(target=_VERSION, result=_GREATER, version=0, key=key)],
        success=[
            etcd_pb2.RequestOp(request_put=etcd_pb2.PutRequest(key=key, value=value, lease_id=lease_id)),
        ],
    )


def _worker_prefix(record: WorkerRecord) -> bytes:
    return namespace_prefix(record.namespace) + f"{record.role.value}/{quote(record.worker_id, safe='')}/".encode()


def _digits(epoch: Epoch) -> bytes:
    return str(epoch).zfill(_EPOCH_DIGITS).encode()
