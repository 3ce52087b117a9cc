"""The settings in force, for commands that serve nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmesh.cli.options import CommandFailed

if TYPE_CHECKING:
    from kvmesh.runtime.settings import LoadedSettings, Settings


def given_settings(config: Path | None, flags: Mapping[str, Any]) -> "LoadedSettings[Settings]":
    """Return file, environment and flags as `kvmesh up` reads them. Raises: CommandFailed naming what is wrong."""
    from kvmesh.runtime.settings import SettingsError, load_settings

    try:
        return load_settings(config_file=config, overrides=flags)
    except SettingsError as exc:
        raise CommandFailed(str(exc), exit_code=2) from exc
