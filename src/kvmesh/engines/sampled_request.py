"""Requests of a model that computes logits: the next token is drawn as soon as the last one's KV is there."""

from collections.abc import Iterable, Sequence

import numpy as np

from kvmesh.engines.engine import EngineRequest, FinishReason
from kvmesh.engines.numpy_llama_sampling import pick_tokens, token_logprobs
from kvmesh.engines.numpy_llama_weights import Floats
from kvmesh.engines.paged_request import PagedRequest


class SampledRequest(PagedRequest):
    """A paged request whose tokens are drawn one at a time, together with those of others."""

    __slots__ = ("_eos_token_ids", "seed")

    def __init__(
        self,
        request: EngineRequest,
        *,
        eos_token_ids: frozenset[int],
        seed: int,
        block_size: int,
        limit: int,
        arrival: int,
    ) -> None:
        """Draw with `seed`, and end at one of `eos_token_ids`; the rest as in `PagedRequest`."""
        super().__init__(request, block_size=block_size, limit=limit, arrival=arrival)
        self.seed = seed
        """With the position it decides a draw: nothing of the batch does."""
        self._eos_token_ids = frozenset() if request.sampling.ignore_eos else eos_token_ids

    def take(self, token: int) -> None:
        """Append the next token; the limit moves here if it ends the sequence."""
        self.drawn.append(token)
        if token in self._eos_token_ids:
            self.limit = len(self.drawn)
            self.ends_with = FinishReason.STOP


class TokenSampler:
    """Opens the requests of one engine, and draws their tokens."""

    def __init__(self, *, eos_token_ids: Iterable[int], block_size: int) -> None:
        """End sequences at `eos_token_ids`; requests without a seed get one that nobody knows."""
        self._ends = frozenset(eos_token_ids)
        self._block_size = block_size
        self._seeds = np.random.default_rng()

    def open(self, request: EngineRequest, *, limit: int, arrival: int) -> SampledRequest:
        """Return the state of a new request; arguments as in `PagedRequest`."""
        seed = request.sampling.seed
        return SampledRequest(
            request,
            eos_token_ids=self._ends,
            seed=int(self._seeds.integers(2**63)) if seed is None else seed,
            block_size=self._block_size,
            limit=limit,
            arrival=arrival,
        )

    def draw(self, requests: Sequence[SampledRequest], logits: Floats) -> None:
        """Give each request its next token, from logits of shape (requests, vocab_size)."""
        tokens = pick_tokens(
            logits,
            [request.request.sampling for request in requests],
            seeds=[request.seed for request in requests],
            positions=[request.produced for request in requests],
        )
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            request.take(token)
            if (count := request.request.sampling.logprobs) is not None:
                request.logprobs = (token_logprobs(logits[row], token, count=count),)
