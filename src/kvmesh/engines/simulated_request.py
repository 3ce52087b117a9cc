"""A request of the simulated engine: its output is drawn a chunk at a time, whatever the batch does."""

from kvmesh.engines.engine import EngineRequest, FinishReason
from kvmesh.engines.paged_request import PagedRequest
from kvmesh.engines.simulated_tokens import CHUNK_TOKENS, OutputTokens


class SimulatedRequest(PagedRequest):
    """A paged request that draws from `OutputTokens`."""

    __slots__ = ("_start", "_tokens")

    def __init__(
        self, request: EngineRequest, *, tokens: OutputTokens, block_size: int, limit: int, arrival: int
    ) -> None:
        """Draw from `tokens`; the rest as in `PagedRequest`."""
        super().__init__(request, block_size=block_size, limit=limit, arrival=arrival)
        self._tokens = tokens
        self._start: int | None = None

    def draw(self) -> None:
        """Draw the next chunk; where the sequence ends by itself in it, the end token takes the drawn one's place."""
        request = self.request
        assert request.token_ids is not None
        if self._start is None:
            self._start = self._tokens.start(request.token_ids, request.sampling.seed)
        position = len(self.drawn)
        assert position % CHUNK_TOKENS == 0
        self.drawn += self._tokens.chunk(self._start, position)
        ending = None if request.sampling.ignore_eos else self._tokens.ending(self._start, position)
        if ending is not None and ending < self.limit:
            self.drawn[ending] = self._tokens.end_token
            self.limit = ending + 1
            self.ends_with = FinishReason.STOP
