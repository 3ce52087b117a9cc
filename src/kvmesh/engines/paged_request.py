"""One request in a paged batch: what it holds, how far it is, and what it says next.

    waiting -> prefilling -> decoding -> finished
       ^           |            |
       +-----------+------------+        preempted: its blocks are given back, its output so far is kept

Positions count tokens of prompt and output together. A sampled token has no KV until the step after it, so a decoding
request with `produced` tokens has KV for `prompt_tokens + produced - 1` of them.
"""

import numpy as np
import numpy.typing as npt

from kvmesh.core.hashing import local_block_hashes, max_overlap_blocks, sequence_hashes
from kvmesh.core.ids import SequenceHash
from kvmesh.engines.engine import EngineRequest, FinishReason, Output, TokenLogprobs


class PagedRequest:
    """The state of one request, to be subclassed by what draws its tokens; its batch owns the blocks in `blocks`."""

    __slots__ = (
        "arrival",
        "block_size",
        "blocks",
        "cached_tokens",
        "computed",
        "drawn",
        "ends_with",
        "hashes",
        "key",
        "limit",
        "local_hashes",
        "logprobs",
        "produced",
        "prompt_tokens",
        "quiet",
        "request",
        "sealed",
    )

    def __init__(self, request: EngineRequest, *, block_size: int, limit: int, arrival: int) -> None:
        """Take a request whose output has at most `limit` tokens; `arrival` orders requests by age."""
        assert request.token_ids is not None
        self.request = request
        self.key = request.key
        self.block_size = block_size
        self.prompt_tokens = len(request.token_ids)
        self.arrival = arrival
        self.hashes = list(request.block_hashes)
        """Of every full block so far: the prompt's, and those that output has filled."""
        self.local_hashes = list(request.local_hashes)
        self.blocks: list[int] = []
        """Held in the pool, in sequence order; the first `sealed` of them are in the prefix cache."""
        self.sealed = 0
        self.computed = 0
        """While prefilling: tokens with KV."""
        self.cached_tokens: int | None = None
        """Set once, when it is first admitted."""
        self.produced = 0
        self.drawn: list[int] = []
        """Output tokens by position; a model may draw ahead of `produced`."""
        self.logprobs: tuple[TokenLogprobs, ...] = ()
        """Of the token drawn last, where they are asked for; a model that has them draws one token at a time."""
        self.limit = limit
        self.ends_with = FinishReason.LENGTH
        """How it ends at `limit`; a model that finds the sequence's own end sets both."""
        self.quiet = 0
        """Decode steps from here in which nothing happens but the next token: no block begins or fills, no end."""

    @property
    def target(self) -> int:
        """Tokens that a prefill has to compute; more than the prompt if the request was preempted while decoding."""
        if self.request.prefill_only:
            return max_overlap_blocks(self.prompt_tokens, self.block_size) * self.block_size
        return self.prompt_tokens + self.produced

    @property
    def reusable_hashes(self) -> list[SequenceHash]:
        """Hashes of the blocks that a prefill may take from the cache: all, but at least one token is computed."""
        if self.request.prefill_only:
            return self.hashes[: self.target // self.block_size]
        return self.hashes[: max_overlap_blocks(self.target, self.block_size)]

    @property
    def finish(self) -> FinishReason | None:
        """How it ended, or None while it goes on."""
        return self.ends_with if self.produced >= self.limit else None

    def draw(self) -> None:
        """Append at least the next token to `drawn`; called when every drawn one is produced."""
        raise NotImplementedError

    def next_token(self) -> int:
        """Produce one token."""
        if self.produced == len(self.drawn):
            self.draw()
        token = self.drawn[self.produced]
        self.produced += 1
        return token

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """Return the tokens of prompt and output at the positions `start .. stop - 1`, all of them drawn already."""
        prompt = self.request.token_ids
        assert prompt is not None
        if stop <= self.prompt_tokens:
            return prompt[start:stop]
        first = start - self.prompt_tokens
        generated = np.array(self.drawn[max(first, 0) : stop - self.prompt_tokens], dtype=np.uint32)
        return generated if first >= 0 else np.concatenate((prompt[start:], generated))

    def plan_quiet_steps(self) -> None:
        """Count the decode steps until one that must be looked at."""
        filled = (self.prompt_tokens + self.produced - 1) % self.block_size
        if filled == 0:
            self.quiet = 0  # the next step begins a block
            return
        self.quiet = max(
            0,
            min(
                self.block_size - 1 - filled, self.limit - self.produced - 1, len(self.drawn) - self.produced,
            ),
        )  # fmt: skip

    def name_block(self, index: int) -> tuple[SequenceHash, int, SequenceHash | None]:
        """Return (sequence hash, local hash, parent) of a full block; one that output filled is hashed here, once."""
        parent = self.hashes[index - 1] if index else None
        if index == len(self.hashes):
            local = self._hash_tokens(index)
            self.local_hashes.append(local)
            self.hashes.append(sequence_hashes((local,) if parent is None else (parent, local))[-1])
        return self.hashes[index], self.local_hashes[index], parent

    def first_output(self, token: int | None) -> Output:
        """Return the output of the step in which the prompt was computed."""
        return Output(
            self.key,
            token_ids=() if token is None else (token,),
            prefill_done=True,
            cached_tokens=self.cached_tokens or 0,
            prompt_tokens=self.prompt_tokens,
            finish=None if token is None else self.finish,
            logprobs=() if token is None else self.logprobs,
        )

    def _hash_tokens(self, index: int) -> int:
        request, size = self.request, self.block_size
        tokens = self.tokens(index * size, (index + 1) * size)
        return local_block_hashes(tokens, size, lora=request.lora, cache_namespace=request.cache_namespace)[0]
