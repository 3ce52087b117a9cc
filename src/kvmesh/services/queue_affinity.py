"""Which prefill worker a queued task suits best: the one that holds most of its prompt."""

from collections.abc import Callable, Sequence

from kvmesh.core.ids import SequenceHash, WorkerId

BlockHashes = tuple[SequenceHash, ...]
CachedBlocks = Callable[[WorkerId, BlockHashes], int]
"""Leading blocks of a sequence that a prefill worker holds."""


class QueueAffinity:
    """What the workers hold, as the queue asks for it; None wherever that is not known and order alone decides."""

    def __init__(self, cached_blocks: CachedBlocks | None) -> None:
        """Without `cached_blocks` nothing is known."""
        self._cached_blocks = cached_blocks

    def held_by(self, worker_id: WorkerId) -> Callable[[BlockHashes], int] | None:
        """Return how much this worker holds of a prompt."""
        cached_blocks = self._cached_blocks
        return None if cached_blocks is None else lambda hashes: cached_blocks(worker_id, hashes)

    def ranking(self, prompts: Sequence[BlockHashes]) -> Callable[[WorkerId], int] | None:
        """Return how well a waiting worker suits new tasks: the best asks first, and the task is its own."""
        cached_blocks = self._cached_blocks
        if cached_blocks is None:
            return None
        return lambda worker_id: max(cached_blocks(worker_id, hashes) for hashes in prompts)
