"""The decoding requests of a virtual engine, of which each step adds a token to every one.

So nobody is looked at in a step in which nothing else happens to it: a request has a mark, the count of steps at which
it begins a block or ends, and how much it has produced follows from the steps since it was counted last.
"""

from heapq import heappop, heappush

from kvmesh.simulate.request import VirtualRequest


class Decoding:
    """Who decodes, and what a step reads; `tokens` and `blocks` count once for each request that reads them."""

    def __init__(self, block_size: int) -> None:
        """Start with nobody."""
        self.tokens = 0
        """Prompt and output tokens of all."""
        self.blocks = 0
        self._block_size = block_size
        self._requests: set[VirtualRequest] = set()
        self._steps = 0
        self._marks: list[tuple[int, int, VirtualRequest]] = []
        """A heap of (mark, arrival, request); an entry whose request has another mark by now is void."""

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: VirtualRequest) -> bool:
        return request in self._requests

    @property
    def youngest(self) -> VirtualRequest | None:
        """Return the one that arrived last."""
        return max(self._requests, key=lambda request: request.arrival, default=None)

    @property
    def quiet_steps(self) -> int:
        """Count the steps from here to the next mark, that one included; somebody must decode."""
        while not self._is_valid(*self._marks[0]):
            heappop(self._marks)
        return self._marks[0][0] - self._steps

    def add(self, request: VirtualRequest) -> None:
        """Let a request begin: its prompt, or all but its last token if it is back, has KV and its blocks."""
        request.counted_at = self._steps
        self._requests.add(request)
        self.tokens += request.prompt_tokens + request.produced
        self.blocks += len(request.blocks)
        self._set_mark(request, -(request.prompt_tokens + request.produced - 1) % self._block_size)

    def remove(self, request: VirtualRequest) -> None:
        """Take a request out, what it produced counted."""
        self._count(request)
        self._requests.remove(request)
        self.tokens -= request.prompt_tokens + request.produced
        self.blocks -= len(request.blocks)

    def advance(self, steps: int) -> list[VirtualRequest]:
        """Take so many steps, at most the quiet ones; take out and return those whose output ended, oldest first."""
        self._steps += steps
        self.tokens += len(self._requests) * steps
        ended = []
        for request in self._due():
            if request.produced == request.output_tokens:
                self.remove(request)
                ended.append(request)
            else:
                heappush(self._marks, (request.mark, request.arrival, request))  # for `beginning_blocks`
        return ended

    def beginning_blocks(self) -> list[VirtualRequest]:
        """Return those that need a block before the next step, oldest first; each must grow or be removed."""
        return self._due()

    def grow(self, request: VirtualRequest, blocks: list[int]) -> None:
        """Give a request the block that it begins."""
        request.blocks += blocks
        self.blocks += len(blocks)
        self._set_mark(request, self._block_size)

    def _set_mark(self, request: VirtualRequest, steps_in_block: int) -> None:
        request.mark = self._steps + min(steps_in_block, request.output_tokens - request.produced)
        heappush(self._marks, (request.mark, request.arrival, request))

    def _is_valid(self, mark: int, _: int, request: VirtualRequest) -> bool:
        return request.mark == mark and request in self._requests

    def _due(self) -> list[VirtualRequest]:
        due = []
        while self._marks and self._marks[0][0] <= self._steps:
            entry = heappop(self._marks)
            if self._is_valid(*entry):
                due.append(entry[2])
                self._count(entry[2])
        return due

    def _count(self, request: VirtualRequest) -> None:
        request.produced += self._steps - request.counted_at
        request.counted_at = self._steps
