"""`kvmesh up`: a whole mesh on this machine. Every flag is a setting; what a flag leaves open, the settings decide."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli import mesh_flags
from kvmesh.cli.running import engine_options, policy_options, run_with_settings

if TYPE_CHECKING:
    from kvmesh.cli.foreground import ForegroundMesh
    from kvmesh.runtime.settings import LoadedSettings, Settings


def up(
    decode: Annotated[int | None, typer.Option(help="Decode workers. [default: 2]", metavar="N")] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Prefill workers; 0 = every prefill is local. [default: 1]", metavar="N")
    ] = None,
    node_names: Annotated[
        str | None, typer.Option(help="Nodes, taken round robin. [default: NODE1,NODE2,...]", metavar="A,B")
    ] = None,
    processes: Annotated[
        bool | None, typer.Option("--processes", help="Every role in a process of its own, restarted when it dies.")
    ] = None,
    discovery: Annotated[
        str | None,
        typer.Option(
            help="memory, etcd (a child process), etcd://HOST:PORT; auto = etcd with --processes. [default: auto]",
            metavar="STORE",
        ),
    ] = None,
    router: mesh_flags.Router = None,
    processor: mesh_flags.Processor = None,
    node_label: mesh_flags.NodeLabels = None,
    policy: mesh_flags.Policy = None,
    policy_option: mesh_flags.PolicyOptions = None,
    engine: mesh_flags.EngineName = None,
    engine_option: mesh_flags.EngineOptions = None,
    dtype: mesh_flags.Dtype = None,
    speedup: mesh_flags.Speedup = None,
    model: mesh_flags.Model = None,
    model_name: mesh_flags.ModelName = None,
    http_host: mesh_flags.Host = None,
    http_port: mesh_flags.HttpPort = None,
    grpc_host: mesh_flags.Host = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="gRPC port; 0 = any free one. [default: 50051]", metavar="PORT")
    ] = None,
    insecure: mesh_flags.Insecure = None,
    namespace: mesh_flags.Namespace = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            help="debug, info, warning, error or critical. [default: info; warning under the view]", metavar="LEVEL"
        ),
    ] = None,
    log_format: mesh_flags.LogFormat = None,
    config: mesh_flags.Config = None,
) -> None:
    """Run a mesh: workers, router, prefill queue and the HTTP and gRPC doors, in one process or in many.

    Ctrl-C stops it when what runs has ended; a second Ctrl-C at once.
    """
    flags: dict[str, Any] = {
        "mesh.decode": decode,
        "mesh.prefill": prefill,
        "mesh.node_names": node_names,
        "mesh.processes": processes,
        "mesh.router": router,
        "mesh.processor": processor,
        "discovery.store": discovery,
        "mesh.node_labels": node_label or None,
        "router.policy": policy,
        "engine.name": engine,
        "engine.options.dtype": dtype,
        "engine.speedup": speedup,
        "engine.model": model,
        "engine.model_name": model_name,
        "http.host": http_host,
        "http.port": http_port,
        "grpc.host": grpc_host,
        "grpc.port": grpc_port,
        "insecure": insecure,
        "namespace": namespace,
        "log.level": log_level,
        "log.format": log_format,
    }
    flags |= engine_options(engine_option or []) | policy_options(policy_option or [])
    run_with_settings(_serve, config, flags)


def _serve(loaded: "LoadedSettings[Settings]") -> None:
    import uvloop

    from kvmesh.cli.foreground import serve, set_up_output

    show = set_up_output(loaded.settings.log, level_is_chosen=loaded.origins["log.level"] != "default")
    if loaded.settings.mesh.processes and sys.stdout.isatty():
        typer.echo("starting a process for each role ...")  # it takes seconds

    async def run() -> None:
        await serve(_mesh(loaded.settings), show)

    uvloop.run(run())


def _mesh(settings: "Settings") -> "ForegroundMesh":
    _refuse_labels_of_nobody(settings)
    if settings.mesh.processes:
        from kvmesh.runtime.process_mesh import ProcessMesh

        return ProcessMesh(settings)
    from kvmesh.runtime.mesh import Mesh

    return Mesh(settings)


def _refuse_labels_of_nobody(settings: "Settings") -> None:
    """Unlike `serve`, whose labels may be those of a whole fleet, this command knows all the nodes there will be."""
    from kvmesh.core.errors import FixRequestError, Reason

    nodes = settings.mesh.nodes()
    for label in settings.mesh.node_labels:
        if label.partition(":")[0] not in nodes:
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"--node-label {label}: no worker is on that node; the nodes are {', '.join(nodes)}",
                field="mesh.node_labels",
            )
