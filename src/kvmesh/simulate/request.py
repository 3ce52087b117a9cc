"""One request of a virtual engine: what it holds and how far it is."""

from dataclasses import dataclass, field

from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.core.ids import SequenceHash


@dataclass(slots=True, eq=False)
class VirtualRequest:
    """The state of one request; its engine owns the blocks in `blocks`.

    A token sampled has no KV until the next step, so a decoding request that produced n tokens has KV for
    `prompt_tokens + n - 1`.
    """

    number: int
    """Its row in the trace."""
    prompt_tokens: int
    output_tokens: int
    """0 = its prefill alone: the blocks before the last token, for another engine to go on with."""
    hashes: list[SequenceHash]
    """Of its full blocks so far."""
    arrival: int = 0
    """Orders the requests of an engine by age."""
    blocks: list[int] = field(default_factory=list)
    """Held in the pool, in sequence order; the first `sealed` of them are in the prefix cache."""
    sealed: int = 0
    computed: int = 0
    """While prefilling: tokens with KV, those of the step that runs included."""
    produced: int = 0
    """Output tokens, as of step `counted_at` while it decodes."""
    counted_at: int = 0
    mark: int = 0
    """While decoding: the count of steps at which a block begins or the output ends."""
    cached_tokens: int | None = None
    """Found in the cache when it was first admitted."""
    pinned: list[int] = field(default_factory=list)
    """Blocks that were brought for it, held until it is admitted."""

    @property
    def is_prefill_only(self) -> bool:
        """Tell whether another engine goes on with it."""
        return not self.output_tokens

    def target(self, block_size: int) -> int:
        """Return the tokens that its prefill computes; more than the prompt if it was preempted while decoding."""
        if self.is_prefill_only:
            return max_overlap_blocks(self.prompt_tokens, block_size) * block_size
        return self.prompt_tokens + self.produced

    def reusable(self, block_size: int) -> list[SequenceHash]:
        """Return the hashes of the blocks it may take from the cache: all, but at least one token is computed."""
        if self.is_prefill_only:
            return self.hashes[: self.target(block_size) // block_size]
        return self.hashes[: max_overlap_blocks(self.target(block_size), block_size)]
