"""What the requests of one exchange have produced and no frame has carried yet.

Laws:
    - the tokens of a request keep their order and their boundaries, however many steps one frame carries;
    - what is due travels in the next frame; what is not may wait for more of it.
"""

from kvmesh.v1 import decode_worker_pb2


class StreamOutput:
    """The output of one stream that waits for a frame."""

    __slots__ = ("_waiting", "stream_id", "tokens", "words")

    def __init__(self, stream_id: int, waiting: "dict[int, StreamOutput]") -> None:
        """Enter `waiting`, by stream id, whenever there is some."""
        self.stream_id = stream_id
        self.tokens: list[int] = []
        self.words: list[str] = []
        self._waiting = waiting

    def put(self, token_ids: tuple[int, ...], words: tuple[str, ...]) -> None:
        """Add what one step produced: words of an engine that has no tokens, else tokens."""
        self._waiting[self.stream_id] = self
        if words:
            self.words += words
        else:
            self.tokens += token_ids


class PendingOutput:
    """Output by stream, in the order in which each stream began to wait."""

    __slots__ = ("_due", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[int, StreamOutput] = {}
        self._due: list[StreamOutput] = []

    def of(self, stream_id: int) -> StreamOutput:
        """Return what takes the output of a new stream."""
        return StreamOutput(stream_id, self._waiting)

    def mark_due(self, output: StreamOutput) -> None:
        """Let what this stream has travel in the next frame."""
        self._due.append(output)

    def move_to(self, frame: decode_worker_pb2.ExchangeResponse, *, only_due: bool) -> None:
        """Write the output into the frame's columns: streams with tokens first, then those with words."""
        if only_due:
            going = [one for one in self._due if self._waiting.pop(one.stream_id, None) is not None]
        else:
            going = list(self._waiting.values())
            self._waiting.clear()
        self._due.clear()
        tokens: list[int] = []
        words: list[str] = []
        with_words = []
        for one in going:
            if one.tokens:
                frame.stream_ids.append(one.stream_id)
                frame.counts.append(len(one.tokens))
                tokens += one.tokens
                one.tokens = []
            else:
                with_words.append(one)
        for one in with_words:
            frame.stream_ids.append(one.stream_id)
            frame.counts.append(len(one.words))
            words += one.words
            one.words = []
        frame.token_ids.extend(tokens)
        frame.words.extend(words)
