"""`kvmesh config show`: each setting's value, and where it came from."""

from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.options import CommandFailed

if TYPE_CHECKING:
    from kvmesh.runtime.settings import LoadedSettings, Settings


def show_config(
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings file (.toml, .yaml, .yml).", metavar="FILE")
    ] = None,
) -> None:
    """Show each setting's value and where it came from: default, file or environment."""
    from rich.table import Table

    from kvmesh.cli.console import output_console
    from kvmesh.runtime.settings import SettingsError, load_settings

    try:
        loaded = load_settings(config_file=config)
    except SettingsError as exc:
        raise CommandFailed(str(exc), exit_code=2) from exc
    table = Table("setting", "value", "from", box=None, pad_edge=False, header_style="dim")
    for key, value, origin in setting_rows(loaded):
        table.add_row(key, value_text(value), origin, style="bold" if origin != "default" else None)
    output_console().print(table)


def value_text(value: Any) -> str:
    """Return a value as a flag or a variable takes it; "" = unset."""
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case Enum():
            return value_text(value.value)
        case Mapping():
            return ",".join(f"{name}={value_text(entry)}" for name, entry in value.items())
        case list() | tuple():
            return ",".join(value_text(entry) for entry in value)
        case _:
            return str(value)


def setting_rows(loaded: "LoadedSettings[Settings]") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, origin), section by section; a table with entries is shown by its entries."""
    sections = list(dict.fromkeys(key.partition(".")[0] for key in loaded.origins))
    for key in sorted(loaded.origins, key=lambda key: sections.index(key.partition(".")[0])):
        if not any(other.startswith(f"{key}.") for other in loaded.origins):
            yield key, _value_of(loaded.settings, key), loaded.origins[key]


def _value_of(node: Any, key: str) -> Any:
    """Follow a dotted key; what is left of it in a table is the name of one entry."""
    while key:
        if isinstance(node, dict):
            return node[key]
        name, _, key = key.partition(".")
        node = getattr(node, name)
    return node
