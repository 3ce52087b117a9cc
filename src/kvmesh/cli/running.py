"""What the commands that serve have in common: flags become settings, and what goes wrong becomes one line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvmesh.cli.options import CommandFailed

if TYPE_CHECKING:
    from kvmesh.core.errors import MeshError
    from kvmesh.runtime.settings import LoadedSettings, Settings


def engine_options(options: list[str]) -> dict[str, str]:
    """Return `KEY=VALUE` flags by dotted key. Raises: typer.BadParameter."""
    return _by_dotted_key(options, "engine.options", flag="--engine-option", example="total_blocks=512")


def policy_options(options: list[str]) -> dict[str, str]:
    """Return `KEY=VALUE` flags by dotted key. Raises: typer.BadParameter."""
    return _by_dotted_key(options, "router.policy_options", flag="--policy-option", example="weight=0.5")


def _by_dotted_key(options: list[str], table: str, *, flag: str, example: str) -> dict[str, str]:
    by_key = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"{option!r} is not KEY=VALUE, e.g. {example}", param_hint=flag)
        by_key[f"{table}.{name}"] = value
    return by_key


def run_with_settings(
    run: Callable[["LoadedSettings[Settings]"], None], config: Path | None, flags: Mapping[str, Any]
) -> None:
    """Run until it ends, with the settings in force; flags that are None were not given.

    Raises: CommandFailed with what a person can act on.
    """
    from kvmesh.core.errors import FixRequestError, MeshError
    from kvmesh.runtime.settings import SettingsError, load_settings

    given = {key: value for key, value in flags.items() if value is not None}
    try:
        loaded = load_settings(config_file=config, overrides=given)
    except SettingsError as exc:
        raise CommandFailed(str(exc), exit_code=2) from exc

    from kvmesh.services.channels import PortTakenError  # gRPC: only once the settings are good

    try:
        run(loaded)
    except SettingsError as exc:
        raise CommandFailed(str(exc), exit_code=2) from exc
    except FixRequestError as exc:
        raise CommandFailed(_text(exc), exit_code=2) from exc
    except MeshError as exc:
        raise CommandFailed(_text(exc)) from exc
    except PortTakenError as exc:
        raise CommandFailed(str(exc)) from exc


def _text(error: "MeshError") -> str:
    return f"{error.reason.value}: {error.message}" if error.message else error.reason.value
