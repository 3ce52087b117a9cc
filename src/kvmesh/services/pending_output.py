"""What the requests of one exchange have produced and no frame has carried yet.

Laws:
    - the tokens of a request keep their order and their boundaries, however many steps one frame carries;
    - what is due travels in the next frame; what is not may wait for more of it.
"""

from itertools import chain

from kvmesh.v1 import decode_worker_pb2


class PendingOutput:
    """Output by stream id, in the order in which each stream began to wait."""

    __slots__ = ("_due", "_tokens", "_words")

    def __init__(self) -> None:
        self._tokens: dict[int, list[tuple[int, ...]]] = {}
        self._words: dict[int, list[tuple[str, ...]]] = {}
        self._due: set[int] = set()

    def put(self, stream_id: int, token_ids: tuple[int, ...], words: tuple[str, ...]) -> None:
        """Add what one step produced: words where there are any, else tokens."""
        if words:
            self._words.setdefault(stream_id, []).append(words)
        else:
            parts = self._tokens.get(stream_id)
            if parts is None:
                self._tokens[stream_id] = [token_ids]
            else:
                parts.append(token_ids)

    def mark_due(self, stream_id: int) -> None:
        """Let what this stream has travel in the next frame."""
        self._due.add(stream_id)

    def move_to(self, frame: decode_worker_pb2.ExchangeResponse, *, only_due: bool) -> None:
        """Write the output into the frame's columns: streams with tokens first, then those with words."""
        tokens, words = self._tokens, self._words
        if only_due:
            tokens = {one: tokens.pop(one) for one in self._due if one in tokens}
            words = {one: words.pop(one) for one in self._due if one in words}
        else:
            self._tokens, self._words = {}, {}
        self._due.clear()
        if tokens:
            frame.stream_ids.extend(tokens)
            flat = [parts[0] if len(parts) == 1 else tuple(chain.from_iterable(parts)) for parts in tokens.values()]
            frame.counts.extend(map(len, flat))
            frame.token_ids.extend(chain.from_iterable(flat))
        if words:
            frame.stream_ids.extend(words)
            for texts in words.values():
                own = list(chain.from_iterable(texts))
                frame.counts.append(len(own))
                frame.words.extend(own)
