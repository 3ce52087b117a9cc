"""`kvmesh status`: the mesh now, as a table or as JSON."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.options import DEFAULT_TARGET, Target, Timeout

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvmesh.v1 import frontend_pb2


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
    """Return the topology as JSON: every number a number (epochs too), states in lower case, no key left out."""
    return {
        "policy": topology.policy,
        "workers": [_scalars(worker) | {"state": state_name(worker.state)} for worker in topology.workers],
        "queue": _scalars(topology.queue),
        "counters": _scalars(topology.counters),
    }


def state_name(state: "frontend_pb2.WorkerState.ValueType") -> str:
    """Return a worker's state as people and scripts read it, e.g. "ready"."""
    from kvmesh.v1 import frontend_pb2

    return frontend_pb2.WorkerState.Name(state).removeprefix("WORKER_STATE_").lower()


def _scalars(message: "Message") -> dict[str, Any]:
    """Protobuf's own JSON writes 64-bit numbers as text and leaves zeros out; scripts want neither."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
