"""Numbers of a JSON text that no double holds: JSON has no bound for them, its reader has."""

import json
import math
import re
from typing import Any

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_BEYOND = object()


def is_beyond_double(text: str, position: int) -> bool:
    """Tell whether a number beyond what a double holds begins at this position."""
    number = _NUMBER.match(text, position)
    return number is not None and math.isinf(float(number[0]))


def path_beyond_double(text: str) -> str:
    """Return the path of a number beyond what a double holds; "" for none, and where the text is no JSON elsewhere."""
    try:
        value = json.loads(text, parse_int=_marked, parse_float=_marked)
        return (_path_in(value) or "").removeprefix(".")
    except (ValueError, RecursionError):
        return ""


def _marked(number: str) -> object:
    return _BEYOND if math.isinf(float(number)) else None


def _path_in(value: Any) -> str | None:
    if value is _BEYOND:
        return ""
    parts: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        parts = [(f".{name}", item) for name, item in value.items()]
    elif isinstance(value, list):
        parts = [(f"[{index}]", item) for index, item in enumerate(value)]
    for part, item in parts:
        rest = _path_in(item)
        if rest is not None:
            return f"{part}{rest}"
    return None
