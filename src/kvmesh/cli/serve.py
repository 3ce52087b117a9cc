"""`kvmesh serve ROLE`: one role of a mesh in this process, for many machines; and `kvmesh serve module:Class`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli import mesh_flags
from kvmesh.cli.options import CommandFailed
from kvmesh.cli.running import engine_options, policy_options, run_with_settings

if TYPE_CHECKING:
    from kvmesh.runtime.settings import LoadedSettings, Settings

_FRONTEND = "frontend"


def serve_role(
    role: Annotated[
        str,
        typer.Argument(
            help="frontend, processor, router, decode, prefill or queue; or a class of your own.",
            metavar="ROLE|MODULE:CLASS",
        ),
    ],
    discovery: Annotated[
        str | None, typer.Option(help="The etcd cluster: etcd://HOST:PORT[,HOST:PORT].", metavar="STORE")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to bind (gRPC). [default: 127.0.0.1]", metavar="HOST")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="gRPC port; 0 = any free one. [default: 50051 for a frontend, else 0]", metavar="PORT"),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(help="Host by which others reach this process. [default: --host]", metavar="HOST")
    ] = None,
    node: Annotated[str | None, typer.Option(help="This node's name. [default: the host's]", metavar="NAME")] = None,
    index: Annotated[
        int | None, typer.Option(help="Number among this role's processes on this node. [default: 0]", metavar="N")
    ] = None,
    http_host: Annotated[
        str | None, typer.Option(help="A frontend's HTTP address. [default: 127.0.0.1]", metavar="HOST")
    ] = None,
    http_port: Annotated[
        int | None, typer.Option(help="A frontend's HTTP port; 0 = any free one. [default: 8000]", metavar="PORT")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port of /metrics for the other roles; 0 = any free one. [default: 0]", metavar="PORT"),
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
    insecure: mesh_flags.Insecure = None,
    namespace: mesh_flags.Namespace = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning, error or critical. [default: info]", metavar="LEVEL")
    ] = None,
    log_format: mesh_flags.LogFormat = None,
    config: mesh_flags.Config = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="What your classes are told (.yaml), by class.", metavar="FILE")
    ] = None,
    told: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="The same, one value; also --CLASS.KEY=VALUE. May be repeated.", metavar="CLASS.KEY=VALUE"
        ),
    ] = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="Every worker of your classes in a process of its own.")
    ] = False,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            help="gRPC port of a frontend, or of the door beside your classes. [default: 50051]", metavar="PORT"
        ),
    ] = None,
    grpc_host: Annotated[
        str | None, typer.Option(help="gRPC address of the same. [default: 127.0.0.1]", metavar="HOST")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="One class of the graph.", hidden=True)] = None,
    exit_with_parent: Annotated[
        bool, typer.Option("--exit-with-parent", help="Stop when stdin ends.", hidden=True)
    ] = False,
) -> None:
    """Serve one role in this process; the others are found through etcd.

    Roles of one mesh share --discovery, --namespace, and the settings of engine and model. MODULE:CLASS is a class of
    the SDK, served with all that it depends on: in the mesh of --discovery, or with a door of its own.
    """
    is_component = ":" in role
    if not is_component:
        _check(role)
        _refuse_component_flags({"--file": file, "--set": told, "--processes": processes})
        if role != _FRONTEND:
            _refuse_door_flags(role, {"--grpc-host": grpc_host, "--grpc-port": grpc_port})
    door = "grpc" if role == _FRONTEND else "process"
    flags: dict[str, Any] = {
        "discovery.store": discovery,
        f"{door}.host": host,
        f"{door}.port": port,
        "process.advertise": advertise,
        "process.node": node,
        "process.index": index,
        "process.metrics_port": metrics_port,
        "http.host": http_host,
        "http.port": http_port,
        "mesh.router": router,
        "mesh.processor": processor,
        "mesh.node_labels": node_label or None,
        "router.policy": policy,
        "engine.name": engine,
        "engine.options.dtype": dtype,
        "engine.speedup": speedup,
        "engine.model": model,
        "engine.model_name": model_name,
        "insecure": insecure,
        "namespace": namespace,
        "log.level": log_level,
        "log.format": log_format,
    }
    flags |= engine_options(engine_option or []) | policy_options(policy_option or [])
    for key, value in (("grpc.host", grpc_host), ("grpc.port", grpc_port)):
        if value is not None:
            flags[key] = value

    def run(loaded: "LoadedSettings[Settings]") -> None:
        if is_component:
            from kvmesh.cli.serve_components import serve_components

            serve_components(
                role,
                loaded.settings,
                file=file,
                told=told or [],
                only=only,
                processes=processes,
                exit_with_parent=exit_with_parent,
            )
        else:
            _serve(role, loaded.settings, exit_with_parent=exit_with_parent)

    run_with_settings(run, config, flags)


def _check(role: str) -> None:
    """Refuse an unknown role. Raises: typer.BadParameter."""
    from kvmesh.core.roster import WorkerRole
    from kvmesh.core.suggestions import suggestion

    roles = (_FRONTEND, *(known.value for known in WorkerRole if known is not WorkerRole.COMPONENT))
    if role not in roles:
        raise typer.BadParameter(
            f"no role is called {role!r}; {suggestion(role, roles)}; your own class is MODULE:CLASS, e.g. hello:Upper"
        )


def _refuse_component_flags(given: Mapping[str, Any]) -> None:
    wrong = [flag for flag, value in given.items() if value]
    if wrong:
        raise CommandFailed(f"{_and(wrong)} for MODULE:CLASS: a role takes the settings alone", exit_code=2)


def _refuse_door_flags(role: str, given: Mapping[str, Any]) -> None:
    wrong = [flag for flag, value in given.items() if value is not None]
    if wrong:
        raise CommandFailed(
            f"{_and(wrong)} for a frontend or MODULE:CLASS: {role} listens at --host and --port", exit_code=2
        )


def _and(flags: Sequence[str]) -> str:
    return f"{' and '.join(flags)} {'is' if len(flags) == 1 else 'are'}"


def _serve(role: str, settings: "Settings", *, exit_with_parent: bool) -> None:
    import uvloop

    from kvmesh.cli.foreground import serve, set_up_log, show_role, stop_at_end_of_input
    from kvmesh.runtime.served_role import ServedRole

    set_up_log(settings.log)

    async def run() -> None:
        if exit_with_parent:
            stop_at_end_of_input()
        await serve(ServedRole(role, settings), show_role)

    uvloop.run(run())
