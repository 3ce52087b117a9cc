"""What the sections of the settings tree are made of."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Port = Annotated[int, Field(ge=0, le=65_535)]
Weight = Annotated[float, Field(ge=0, le=1_000_000)]


class Section(BaseModel):
    """A group of settings: frozen, and closed to unknown keys."""

    # No protected namespaces: `model_name` is a word of ours.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def scalars_as_text(value: object) -> object:
    """Return a table of options with its values as text: files write `blocks = 64`, a flag would say `blocks=64`."""
    if not isinstance(value, Mapping):
        return value
    return {key: _as_text(item) for key, item in value.items()}


def _as_text(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value
