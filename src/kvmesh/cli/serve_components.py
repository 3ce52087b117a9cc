"""`kvmesh serve module:Class`: a graph of classes, in this process or each worker in its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvmesh.cli.component_failure import failure_of_class
from kvmesh.cli.options import CommandFailed
from kvmesh.core.errors import FixRequestError, MeshError, Reason

if TYPE_CHECKING:
    from kvmesh.cli.foreground import ForegroundRole
    from kvmesh.runtime.component_config import ServiceConfig
    from kvmesh.runtime.settings import LoadedSettings, Settings


def serve_components(
    target: str,
    loaded: "LoadedSettings[Settings]",
    *,
    file: Path | None,
    told: Sequence[str],
    only: str | None,
    processes: bool,
    exit_with_parent: bool,
) -> None:
    """Serve until a signal. Raises: FixRequestError naming the target, the flag or the key."""
    import uvloop

    from kvmesh.cli.foreground import serve, set_up_log, show_role, stop_at_end_of_input
    from kvmesh.runtime.component_config import read_config
    from kvmesh.runtime.component_loading import load_graph

    settings = loaded.settings
    set_up_log(settings.log)
    services = read_config(load_graph(target), file=file, flags=told)
    flags = (*(("--file", str(file)) if file is not None else ()), *(part for flag in told for part in ("--set", flag)))

    async def run() -> None:
        if exit_with_parent:
            stop_at_end_of_input()
        await serve(_make(target, settings, services, flags=flags, only=only, processes=processes), show_role)

    try:
        uvloop.run(run())
    except Exception as exc:  # a class is anybody's code
        cause = exc.__cause__ if isinstance(exc, CommandFailed) and exc.__cause__ is not None else exc
        said = failure_of_class(cause, [one.definition.cls for one in services])
        if said is None or isinstance(cause, MeshError):
            raise
        raise CommandFailed(said) from exc


def _make(
    target: str,
    settings: "Settings",
    services: "Sequence[ServiceConfig]",
    *,
    flags: Sequence[str],
    only: str | None,
    processes: bool,
) -> "ForegroundRole":
    from dataclasses import replace

    from kvmesh.runtime.component_graph import ComponentGraph
    from kvmesh.runtime.component_processes import ComponentProcesses

    if only is not None:
        chosen = [replace(one, workers=1) for one in services if one.definition.cls.__name__ == only]
        return ComponentGraph(chosen, settings)
    wants_gpus = any(one.definition.resources.gpu is not None for one in services)
    if processes or wants_gpus or any(one.workers > 1 for one in services):
        if settings.process.port:
            raise FixRequestError(
                Reason.INVALID_FIELD, "--port is for one worker: leave it out, each takes a free one", field="port"
            )
        return ComponentProcesses(target, services, settings, config_flags=flags)
    if settings.process.port and len(services) > 1:
        raise FixRequestError(
            Reason.INVALID_FIELD, "--port is for one class: leave it out, each takes a free one", field="port"
        )
    return ComponentGraph(services, settings)
