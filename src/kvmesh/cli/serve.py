"""`kvmesh serve ROLE`: one role of a mesh in this process, for many machines; and `kvmesh serve module:Class`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from kvmesh.cli import mesh_flags, serve_options
from kvmesh.cli.options import CommandFailed
from kvmesh.cli.running import engine_options, policy_options, run_with_settings

if TYPE_CHECKING:
    from kvmesh.runtime.settings import LoadedSettings, Settings

_FRONTEND = "frontend"


def serve_role(
    role: serve_options.Role,
    discovery: serve_options.Discovery = None,
    host: serve_options.Host = None,
    port: serve_options.Port = None,
    advertise: serve_options.Advertise = None,
    node: serve_options.Node = None,
    index: serve_options.Index = None,
    http_host: serve_options.HttpHost = None,
    http_port: serve_options.HttpPort = None,
    metrics_port: serve_options.MetricsPort = None,
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
    log_level: serve_options.LogLevel = None,
    log_format: mesh_flags.LogFormat = None,
    config: mesh_flags.Config = None,
    file: serve_options.ClassFile = None,
    told: serve_options.ClassValues = None,
    processes: serve_options.Processes = False,
    grpc_port: serve_options.GrpcPort = None,
    grpc_host: serve_options.GrpcHost = None,
    only: serve_options.OnlyClass = None,
    exit_with_parent: serve_options.ExitWithParent = False,
) -> None:
    """Serve one role in this process; the others are found through etcd.

    Roles of one mesh share --discovery, --namespace, and the settings of engine and model. MODULE:CLASS is a class of
    the SDK, served with all that it depends on: in the mesh of --discovery, or with a door of its own.
    """
    if ":" in role:
        from kvmesh.cli.serve_components import serve_components

        run = partial(
            serve_components,
            role,
            file=file,
            told=told or [],
            only=only,
            processes=processes,
            exit_with_parent=exit_with_parent,
        )
    else:
        _check(role)
        _refuse_component_flags({"--file": file, "--set": told, "--processes": processes})
        _refuse_door_flags(role, {"--grpc-host": grpc_host, "--grpc-port": grpc_port})
        run = partial(_serve, role, exit_with_parent=exit_with_parent)
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
    of_door = {"grpc.host": grpc_host, "grpc.port": grpc_port}
    flags |= {key: value for key, value in of_door.items() if value is not None}
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
    if role == _FRONTEND:
        return
    wrong = [flag for flag, value in given.items() if value is not None]
    if wrong:
        raise CommandFailed(
            f"{_and(wrong)} for a frontend or MODULE:CLASS: {role} listens at --host and --port", exit_code=2
        )


def _and(flags: Sequence[str]) -> str:
    return f"{' and '.join(flags)} {'is' if len(flags) == 1 else 'are'}"


def _serve(role: str, loaded: "LoadedSettings[Settings]", *, exit_with_parent: bool) -> None:
    import uvloop

    from kvmesh.cli.foreground import serve, set_up_log, show_role, stop_at_end_of_input
    from kvmesh.runtime.served_role import ServedRole

    settings = loaded.settings
    set_up_log(settings.log)

    async def run() -> None:
        if exit_with_parent:
            stop_at_end_of_input()
        await serve(ServedRole(role, settings), show_role)

    uvloop.run(run())
