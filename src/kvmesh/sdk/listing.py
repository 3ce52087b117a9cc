"""Which components run, asked once: for programs without an event loop."""

import grpc

from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.discovery.discovery import Snapshot
from kvmesh.discovery.door import WatchReader
from kvmesh.sdk.records import address_of
from kvmesh.v1 import components_pb2, components_pb2_grpc


def list_components(channel: grpc.Channel, *, timeout_s: float) -> dict[str, list[WorkerRecord]]:
    """Return the instances of each component of the SDK, by namespace/name; none of a door that lists no components.

    Raises: grpc.RpcError.
    """
    reader = WatchReader()
    call = components_pb2_grpc.ComponentsStub(channel).WatchComponents(
        components_pb2.WatchComponentsRequest(), timeout=timeout_s
    )
    try:
        for response in call:
            for event in reader.events(response):
                if isinstance(event, Snapshot):
                    return _by_component(event.records)
    except grpc.RpcError as exc:
        if exc.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise
    finally:
        call.cancel()
    return {}


def _by_component(records: tuple[WorkerRecord, ...]) -> dict[str, list[WorkerRecord]]:
    found: dict[str, list[WorkerRecord]] = {}
    for record in sorted(records, key=lambda one: (address_of(one), one.worker_id)):
        if record.role is WorkerRole.COMPONENT:
            found.setdefault("/".join(address_of(record)), []).append(record)
    return found
