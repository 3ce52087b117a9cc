"""`kvmesh up`: a whole mesh on this machine. Every flag is a setting; what a flag leaves open, the settings decide."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.running import engine_options, run_with_settings

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
    router: Annotated[
        str | None, typer.Option(help="inside the processor, or separate. [default: inside]", metavar="WHERE")
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="inside the frontend, or separate. [default: inside]", metavar="WHERE")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Routing policy. [default: kv_aware]", metavar="NAME")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Engine: echo, simulated or numpy_llama. [default: echo]", metavar="NAME")
    ] = None,
    engine_option: Annotated[
        list[str] | None, typer.Option(help="One option of the engine; may be repeated.", metavar="KEY=VALUE")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="A real model's number type, e.g. float32 or float64.", metavar="TYPE")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Divides a simulated engine's time; 0 = as fast as it can.", metavar="X")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the model or tokenizer.", metavar="DIR")] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name to serve the model under. [default: the engine's]", metavar="NAME")
    ] = None,
    http_host: Annotated[str | None, typer.Option(help="Address to bind. [default: 127.0.0.1]", metavar="HOST")] = None,
    http_port: Annotated[
        int | None, typer.Option(help="HTTP port; 0 = any free one. [default: 8000]", metavar="PORT")
    ] = None,
    grpc_host: Annotated[str | None, typer.Option(help="Address to bind. [default: 127.0.0.1]", metavar="HOST")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="gRPC port; 0 = any free one. [default: 50051]", metavar="PORT")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Allow hosts other than loopback, without TLS.")
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option(help="Workers find each other within one namespace. [default: default]", metavar="NAME"),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            help="debug, info, warning, error or critical. [default: info; warning under the view]", metavar="LEVEL"
        ),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="auto, json or console. [default: auto]", metavar="FORMAT")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings file (.toml, .yaml, .yml); flags override it.", metavar="FILE")
    ] = None,
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
    flags |= engine_options(engine_option or [])
    run_with_settings(_serve, config, flags)


def _serve(loaded: "LoadedSettings[Settings]") -> None:
    import uvloop

    from kvmesh.cli.foreground import serve, set_up_output

    show = set_up_output(loaded.settings.log, level_is_chosen=loaded.origins["log.level"] != "default")

    async def run() -> None:
        await serve(_mesh(loaded.settings), show)

    uvloop.run(run())


def _mesh(settings: "Settings") -> "ForegroundMesh":
    if settings.mesh.processes:
        from kvmesh.runtime.process_mesh import ProcessMesh

        return ProcessMesh(settings)
    from kvmesh.runtime.mesh import Mesh

    return Mesh(settings)
