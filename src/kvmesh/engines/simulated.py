"""The simulated engine: KV blocks, batches and times as a real engine has them, and no model.

It keeps the books of a paged KV cache block by block, emits the events of one, takes the time that `SimulatedOptions`
says, and answers with tokens that depend on the prompt and the seed alone. Each block has some bytes of real memory
with the block's sequence hash written all over it, so that an import can tell whether the right bytes arrived.
"""

from collections.abc import Sequence

import numpy as np

from kvmesh.core.ids import SequenceHash
from kvmesh.engines.engine import EngineRequest, KvLayout
from kvmesh.engines.paged_engine import PagedEngine
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.engines.simulated_options import SimulatedOptions
from kvmesh.engines.simulated_request import SimulatedRequest
from kvmesh.engines.simulated_tokens import OutputTokens

_WORD = np.dtype("<u8")


class SimulatedEngine(PagedEngine[SimulatedRequest]):
    """An engine without a model, exact in blocks; see the port for what each method owes."""

    def __init__(self, options: SimulatedOptions | None = None, *, allocate: Allocate = allocate_here) -> None:
        """Start with an empty cache in a pool of `allocate`."""
        options = options or SimulatedOptions()
        super().__init__("simulated", options, model=_SimulatedModel(options, allocate), is_brief=True)


class _SimulatedModel:
    """Writes hashes for KV, and knows what a step would have cost."""

    def __init__(self, options: SimulatedOptions, allocate: Allocate) -> None:
        self.memory = allocate(options.total_blocks, options.block_bytes)
        self.vocab_size = options.vocab_size
        self.max_context_tokens = options.max_context_tokens
        self.eos_token_ids = options.eos_token_ids
        self.layout = KvLayout(
            dtype="uint64",
            layers=1,
            block_size=options.block_size,
            kv_heads=1,
            head_dim=options.block_bytes // _WORD.itemsize,
            order="block,word",
            model_fingerprint="simulated",
            bytes_per_block=options.block_bytes,
        )
        self._words = self.memory.view(_WORD)
        self._tokens = OutputTokens(options)
        self._cost = options.step_cost
        self._speedup = options.speedup

    def open(self, request: EngineRequest, *, limit: int, arrival: int) -> SimulatedRequest:
        return SimulatedRequest(
            request, tokens=self._tokens, block_size=self.layout.block_size, limit=limit, arrival=arrival
        )

    def compute_prompt(self, request: SimulatedRequest, *, stop: int) -> None:
        """Nothing to compute: a block's content is written when it is sealed."""

    def compute_decode(self, requests: Sequence[SimulatedRequest]) -> None:
        """Nothing to compute."""

    def seal(self, block: int, block_hash: SequenceHash) -> None:
        self._words[block] = block_hash

    def blank(self, blocks: Sequence[int]) -> None:
        self._words[list(blocks)] = 0

    def find_wrong(self, blocks: Sequence[int], block_hashes: Sequence[SequenceHash]) -> list[int]:
        expected = np.array(block_hashes, dtype=_WORD)
        wrong: list[int] = np.flatnonzero((self._words[list(blocks)] != expected[:, np.newaxis]).any(axis=1)).tolist()
        return wrong

    def step_s(self, *, decode_sequences: int, decode_blocks: int, prefill_tokens: int) -> float:
        if not self._speedup:
            return 0.0
        step_s = self._cost.step_s(
            decode_sequences=decode_sequences, decode_blocks=decode_blocks, prefill_tokens=prefill_tokens
        )
        return step_s / self._speedup
