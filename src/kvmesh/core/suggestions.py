"""What to say about a name that does not exist."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "the nearest is X" where a known name is close to `name`, else "known: " and all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"the nearest is {close[0]}" if close else f"known: {', '.join(names)}"
