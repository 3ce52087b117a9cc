"""Stop strings: ends the output before the first of them that becomes complete.

Laws, wherever the text is split into pieces:
    - the output is the text before the stop string whose last character comes first; of several that end there, before
      the longest;
    - a piece is whole or not there at all, but for the last one before a stop string, which may be cut;
    - a piece is held back only while text of it may still be part of a stop string.
"""

from collections.abc import Sequence


class StopMatcher:
    """Watches the output of ONE request."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for `stops`; none of them is empty."""
        self._stops = tuple(stops)
        self._beginnings = frozenset(stop[0] for stop in stops)
        self._held: list[str] = []
        """Pieces not returned yet; the first of them has text that may belong to a stop string."""

    def push(self, pieces: list[str]) -> tuple[list[str], bool]:
        """Return the pieces that are output now, and whether a stop string ended it; after that, push no more.

        The n-th piece returned is the n-th pushed, over all calls. Costs nothing without stops.
        """
        if not self._stops:
            return pieces, False
        if not self._held and self._beginnings.isdisjoint("".join(pieces)):
            return pieces, False
        pieces = self._held + pieces
        text = "".join(pieces)
        cut = self._cut(text)
        if cut is not None:
            self._held = []
            return _before(pieces, cut), True
        count = _whole_before(pieces, self._open_from(text))
        self._held = pieces[count:]
        return pieces[:count], False

    def flush(self) -> list[str]:
        """Return the pieces held back, at the end of the output: no stop string can become complete any more."""
        pieces, self._held = self._held, []
        return pieces

    def _cut(self, text: str) -> int | None:
        """Return where the stop string begins that ends the output, if one is complete in `text`."""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _open_from(self, text: str) -> int:
        """Return where the text begins that may become a stop string; the length of `text` if nothing may."""
        return min(_open_from(text, stop) for stop in self._stops)


def _open_from(text: str, stop: str) -> int:
    """Return the start of the longest end of `text` that begins `stop`; C-speed finds for each of its candidates."""
    start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)


def _whole_before(pieces: Sequence[str], position: int) -> int:
    """Return how many of the leading pieces lie before `position`."""
    end = 0
    for count, piece in enumerate(pieces):
        end += len(piece)
        if end > position:
            return count
    return len(pieces)


def _before(pieces: list[str], position: int) -> list[str]:
    """Return the text before `position`, the last piece cut."""
    count = _whole_before(pieces, position)
    rest = position - sum(map(len, pieces[:count]))
    return [*pieces[:count], pieces[count][:rest]] if rest else pieces[:count]
