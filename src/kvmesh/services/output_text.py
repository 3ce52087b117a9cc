"""From what a worker produces to what a client reads: token text, cut at a stop string."""

from collections.abc import Sequence

from kvmesh.tokenizing.stop_matcher import StopMatcher
from kvmesh.tokenizing.tokenizer import Detokenizer


class OutputText:
    """The output of one request, as text."""

    def __init__(self, *, detokenizer: Detokenizer | None, stops: Sequence[str]) -> None:
        """Without a detokenizer tokens have no text: their clients read ids."""
        self.is_stopped = False
        """True once a stop string was met: nothing after it is wanted."""
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops) if stops else None

    def push(self, token_ids: Sequence[int], words: list[str], *, is_last: bool) -> list[str]:
        """Return the text of each token or word, in order; with `is_last` also what was held back."""
        pieces = words
        if token_ids:
            pieces = self._detokenizer.push(token_ids) if self._detokenizer is not None else [""] * len(token_ids)
        if is_last and self._detokenizer is not None and (rest := self._detokenizer.flush()):
            pieces = [*pieces, rest]
        if self._stops is None:
            return pieces
        pieces, self.is_stopped = self._stops.push(pieces)
        return [*pieces, *self._stops.flush()] if is_last and not self.is_stopped else pieces
