"""How an engine's options are declared as a dataclass and read from `--engine-option NAME=VALUE` text."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.suggestions import suggestion

T = TypeVar("T")

_MAX_IDS = 2**24


def number(default: float, low: float, high: float) -> Any:
    """Declare a numeric option in `low..high`: a whole number if `default` is one."""
    return field(default=default, metadata={"range": (low, high)})


def choice(default: str, *others: str) -> Any:
    """Declare an option that is one of a few words."""
    return field(default=default, metadata={"choices": (default, *others)})


def invalid_option(name: str, why: str) -> FixRequestError:
    """Return the error of one bad option."""
    return FixRequestError(Reason.INVALID_FIELD, f"{name} {why}", field=name)


def check_ranges(options: Any) -> None:
    """Refuse a value outside of its declared range. Raises: FixRequestError(INVALID_FIELD) naming option and range."""
    for option in fields(options):
        choices = option.metadata.get("choices")
        if choices is not None and (word := getattr(options, option.name)) not in choices:
            raise invalid_option(option.name, f"is {word!r}, not one of {', '.join(choices)}")
        if "range" not in option.metadata:
            continue
        low, high = option.metadata["range"]
        value = getattr(options, option.name)
        if not low <= value <= high:  # false for a NaN too
            raise invalid_option(option.name, f"is {value}, not in {low}..{high}")


def parse_options(kind: type[T], options: Mapping[str, str], *, engine: str) -> T:
    """Read the options of `engine` from text, e.g. `{"total_blocks": "512", "speedup": "0"}`.

    Raises:
        FixRequestError: INVALID_FIELD; an unknown name is answered with a close one or all, a bad value with its range.
    """
    known: dict[str, Field[Any]] = {option.name: option for option in fields(kind)}  # type: ignore[arg-type]  # every caller passes a dataclass
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in known:
            raise invalid_option(name, f"is no option of the {engine} engine: {suggestion(name, known)}")
        try:
            values[name] = _read(text, known[name].default)
        except ValueError as exc:
            raise invalid_option(name, f"is {text!r}, not {_wanted(known[name])}") from exc
    return kind(**values)


def _read(text: str, default: object) -> object:
    assert default is not MISSING
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        return tuple(token for part in text.split(",") if part.strip() for token in _ids(part))
    if isinstance(default, int):
        return int(text)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    return value


def _ids(part: str) -> range:
    """Read `7` or `32-126`."""
    first, _, last = part.strip().partition("-")
    ids = range(int(first), int(last or first) + 1)
    if not 0 < len(ids) <= _MAX_IDS:
        raise ValueError(f"{part} is no range of ids")
    return ids


def _wanted(option: Field[Any]) -> str:
    if isinstance(option.default, tuple):
        return "token ids separated by commas, ranges as 32-126"
    low, high = option.metadata["range"]
    return f"{'a whole' if isinstance(option.default, int) else 'a'} number in {low}..{high}"
