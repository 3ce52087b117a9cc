"""`kvmesh status`: the mesh now, as a table or as JSON."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.options import DEFAULT_TARGET, Target, Timeout

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvmesh.v1 import frontend_pb2

_OF_THE_ROUTER = (
    "active_requests",
    "active_blocks",
    "waiting_requests",
    "prefix_hit_rate",
    "active_prefill_tokens",
    "indexed_blocks",
    "index_degraded",
    "reservations",
)
"""Fields of a worker that are known while a router tells of it."""


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    target: Target = DEFAULT_TARGET,
    timeout: Timeout = 5.0,
) -> None:
    """Show workers, components, queue and counters."""
    from kvmesh.cli.calls import open_channel
    from kvmesh.sdk.listing import list_components
    from kvmesh.v1 import frontend_pb2, frontend_pb2_grpc

    with open_channel(target) as channel:
        stub = frontend_pb2_grpc.FrontendStub(channel)
        topology = stub.GetTopology(frontend_pb2.GetTopologyRequest(), timeout=timeout).topology
        components = list_components(channel, timeout_s=timeout)
    from kvmesh.cli.status_components import components_json, components_table

    if as_json:
        shown = topology_json(topology) | {"components": components_json(components)}
        typer.echo(json.dumps(shown, indent=2))
        return
    from kvmesh.cli.console import output_console
    from kvmesh.cli.view import topology_view

    console = output_console()
    if topology.workers or not components:
        console.print(topology_view(topology, width=console.width))
    if topology.workers and components:
        console.print()
    if components:
        console.print(components_table(components))


def topology_json(topology: "frontend_pb2.Topology") -> dict[str, Any]:
    """Return the topology as JSON: numbers as numbers (epochs too), states in lower case, null for what is unknown."""
    counters = _scalars(topology.counters)
    return {
        "policy": topology.policy or None,
        "router_silent": topology.router_silent,
        "workers": [_worker_json(worker) for worker in topology.workers],
        "queue": _scalars(topology.queue) if topology.HasField("queue") else None,
        "queue_silent": topology.queue_silent,
        "counters": counters | ({"reservations": None} if topology.router_silent else {}),
    }


def state_name(state: "frontend_pb2.WorkerState.ValueType") -> str:
    """Return a worker's state as people and scripts read it, e.g. "ready"."""
    from kvmesh.v1 import frontend_pb2

    if state == frontend_pb2.WORKER_STATE_UNSPECIFIED:
        return "unknown"
    return frontend_pb2.WorkerState.Name(state).removeprefix("WORKER_STATE_").lower()


def _worker_json(worker: "frontend_pb2.TopologyWorker") -> dict[str, Any]:
    unknown = dict.fromkeys(_OF_THE_ROUTER) if worker.load_unknown else {}
    return _scalars(worker) | {"state": state_name(worker.state)} | unknown


def _scalars(message: "Message") -> dict[str, Any]:
    """Protobuf's own JSON writes 64-bit numbers as text and leaves zeros out; scripts want neither."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
