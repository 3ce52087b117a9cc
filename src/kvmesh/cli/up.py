"""`kvmesh up`: a whole mesh in this process. Every flag is a setting; what a flag leaves open, the settings decide."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.options import CommandFailed

if TYPE_CHECKING:
    from kvmesh.core.errors import MeshError
    from kvmesh.runtime.settings import LoadedSettings, Settings


def up(
    decode: Annotated[int | None, typer.Option(help="Decode workers. [default: 2]", metavar="N")] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Prefill workers; 0 = every prefill is local. [default: 1]", metavar="N")
    ] = None,
    node_names: Annotated[
        str | None, typer.Option(help="Nodes, taken round robin. [default: NODE1,NODE2,...]", metavar="A,B")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Routing policy. [default: kv_aware]", metavar="NAME")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Engine, e.g. echo or simulated. [default: echo]", metavar="NAME")
    ] = None,
    engine_option: Annotated[
        list[str] | None, typer.Option(help="One option of the engine; may be repeated.", metavar="KEY=VALUE")
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
    """Run a mesh: workers, router, prefill queue and the HTTP and gRPC doors, in this one process.

    Ctrl-C stops it when what runs has ended; a second Ctrl-C at once.
    """
    flags: dict[str, Any] = {
        "mesh.decode": decode,
        "mesh.prefill": prefill,
        "mesh.node_names": node_names,
        "router.policy": policy,
        "engine.name": engine,
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
    _run(config, {key: value for key, value in flags.items() if value is not None})


def engine_options(options: list[str]) -> dict[str, str]:
    """Return `KEY=VALUE` flags by dotted key. Raises: typer.BadParameter."""
    by_key = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not separator or not name:
            raise typer.BadParameter(
                f"{option!r} is not KEY=VALUE, e.g. total_blocks=512", param_hint="--engine-option"
            )
        by_key[f"engine.options.{name}"] = value
    return by_key


def _run(config: Path | None, flags: dict[str, Any]) -> None:
    from kvmesh.core.errors import FixRequestError, MeshError
    from kvmesh.runtime.settings import SettingsError, load_settings

    try:
        loaded = load_settings(config_file=config, overrides=flags)
    except SettingsError as exc:
        raise CommandFailed(str(exc), exit_code=2) from exc

    from kvmesh.services.channels import PortTakenError  # gRPC: only once the settings are good

    try:
        _serve(loaded)
    except SettingsError as exc:
        raise CommandFailed(str(exc), exit_code=2) from exc
    except FixRequestError as exc:
        raise CommandFailed(_text(exc), exit_code=2) from exc
    except MeshError as exc:
        raise CommandFailed(_text(exc)) from exc
    except PortTakenError as exc:
        raise CommandFailed(str(exc)) from exc


def _serve(loaded: "LoadedSettings[Settings]") -> None:
    import uvloop

    from kvmesh.cli.foreground import serve, set_up_output
    from kvmesh.runtime.mesh import Mesh

    show = set_up_output(loaded.settings.log, level_is_chosen=loaded.origins["log.level"] != "default")

    async def run() -> None:
        await serve(Mesh(loaded.settings), show)

    uvloop.run(run())


def _text(error: "MeshError") -> str:
    return f"{error.reason.value}: {error.message}" if error.message else error.reason.value
