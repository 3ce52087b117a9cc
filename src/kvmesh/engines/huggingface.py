"""The huggingface engine: any causal language model of transformers that attends fully, its KV in blocks of ours.

torch computes, on a CPU or a GPU; the pool, the batch and the sampler are those of every paged engine, so prefix reuse,
events, eviction and handoffs are too. A prompt's chunk is a forward pass of its own; decoding requests of like length
share one. Tokens depend on the batch only by rounding: see `numpy_llama`.
"""

from collections.abc import Sequence

import numpy as np

from kvmesh.core.ids import SequenceHash
from kvmesh.engines.engine import EngineRequest, KvLayout
from kvmesh.engines.huggingface_kv import ORDER, BlockKv
from kvmesh.engines.huggingface_model import HuggingFaceModel, compute
from kvmesh.engines.huggingface_options import HuggingFaceOptions
from kvmesh.engines.numpy_llama_forward import Span
from kvmesh.engines.paged_engine import PagedEngine
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.engines.sampled_request import SampledRequest, TokenSampler

_ALWAYS_TOGETHER_TOKENS = 64
_MAX_PADDING = 2
"""Sequences up to so many times as long as the shortest, and a little more, decode in one pass."""


class HuggingFaceEngine(PagedEngine[SampledRequest]):
    """A transformers model behind the engine port; engines of one process share `model`."""

    def __init__(
        self, model: HuggingFaceModel, options: HuggingFaceOptions, *, allocate: Allocate = allocate_here
    ) -> None:
        """Start with an empty cache in a pool of `allocate`; `options.dtype` and `options.device` are the model's."""
        assert (options.dtype, options.device) == (model.dtype, model.device), "the model was loaded for others"
        super().__init__("huggingface", options, model=_BlockModel(model, options, allocate), has_logprobs=True)


class _BlockModel:
    """The model over one engine's KV memory."""

    def __init__(self, model: HuggingFaceModel, options: HuggingFaceOptions, allocate: Allocate) -> None:
        shape, size = model.shape, options.block_size
        self.memory = allocate(options.total_blocks, shape.block_bytes(size))
        self.vocab_size = model.vocab_size
        self.max_context_tokens = model.max_context_tokens
        self.eos_token_ids = options.eos_token_ids
        self.layout = KvLayout(
            dtype=model.dtype,
            layers=shape.layers,
            block_size=size,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            order=ORDER,
            model_fingerprint=model.fingerprint,
            bytes_per_block=self.memory.shape[1],
        )
        self._model = model
        self._kv = BlockKv(self.memory, shape, block_size=size, device=model.device, is_mirrored=model.device != "cpu")
        self._sampler = TokenSampler(eos_token_ids=options.eos_token_ids, block_size=size)

    def open(self, request: EngineRequest, *, limit: int, arrival: int) -> SampledRequest:
        return self._sampler.open(request, limit=limit, arrival=arrival)

    def compute_prompt(self, request: SampledRequest, *, stop: int) -> None:
        span = Span(request.tokens(request.computed, stop), request.computed, request.blocks)
        logits = compute(self._model, [span], self._kv)
        if stop == request.target and not request.request.prefill_only:
            self._sampler.draw([request], logits)

    def compute_decode(self, requests: Sequence[SampledRequest]) -> None:
        for group in _alike(requests):
            spans = [
                Span(np.array(request.drawn[-1:], dtype=np.uint32), _length(request), request.blocks)
                for request in group
            ]
            self._sampler.draw(group, compute(self._model, spans, self._kv))

    def seal(self, block: int, block_hash: SequenceHash) -> None:
        """Nothing to note: the KV is there."""

    def blank(self, blocks: Sequence[int]) -> None:
        self._kv.expect(blocks)

    def find_wrong(self, blocks: Sequence[int], block_hashes: Sequence[SequenceHash]) -> list[int]:
        """Find blocks of which a part never arrived, and blocks of zeros, which are memory that nobody has written."""
        return [index for index, block in enumerate(blocks) if not self._kv.is_whole(block)]

    def step_s(self, *, decode_sequences: int, decode_blocks: int, prefill_tokens: int) -> float:
        return 0.0


def _length(request: SampledRequest) -> int:
    """Return the tokens with KV."""
    return request.prompt_tokens + request.produced - 1


def _alike(requests: Sequence[SampledRequest]) -> list[list[SampledRequest]]:
    """Return groups of like length, so that little of a pass is padding."""
    groups: list[list[SampledRequest]] = []
    most = -1
    for request in sorted(requests, key=_length):
        if _length(request) > most:
            groups.append([])
            most = _length(request) * _MAX_PADDING + _ALWAYS_TOGETHER_TOKENS
        groups[-1].append(request)
    return groups
