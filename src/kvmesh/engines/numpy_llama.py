"""The numpy_llama engine: a Llama model, read from a Hugging Face folder and computed in numpy, with a paged KV cache.

Correct before fast. The tokens of a greedy request do not depend on what else runs, on how its prompt is cut into
chunks, or on where its KV was computed, but for a near-tie of two logits: the rounding of a matrix product depends on
its shape. In float32 a near-tie is some 1e-5 wide, in float64 some 1e-14, which is never met.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from kvmesh.core.ids import SequenceHash
from kvmesh.engines.engine import EngineRequest, KvLayout
from kvmesh.engines.numpy_llama_forward import LlamaForward, Span
from kvmesh.engines.numpy_llama_options import NumpyLlamaOptions
from kvmesh.engines.numpy_llama_weights import Floats, LlamaWeights
from kvmesh.engines.paged_engine import PagedEngine
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.engines.sampled_request import SampledRequest, TokenSampler

_BLANK_BYTE = 0xFF
"""Bytes that no float of a KV cache consists of: as float32 and as float64 they are a NaN."""


class NumpyLlamaEngine(PagedEngine[SampledRequest]):
    """A Llama model behind the engine port; engines of one process share `weights`."""

    def __init__(
        self, weights: LlamaWeights, options: NumpyLlamaOptions | None = None, *, allocate: Allocate = allocate_here
    ) -> None:
        """Start with an empty cache in a pool of `allocate`; `options.dtype` is that of the weights."""
        options = options or NumpyLlamaOptions(dtype=weights.dtype.name)
        assert options.dtype == weights.dtype.name, f"the weights are {weights.dtype.name}"
        super().__init__("numpy_llama", options, model=_LlamaModel(weights, options, allocate), has_logprobs=True)


class _LlamaModel:
    """The weights over one engine's KV memory."""

    def __init__(self, weights: LlamaWeights, options: NumpyLlamaOptions, allocate: Allocate) -> None:
        config = weights.config
        block_shape = (config.layers, 2, options.block_size, config.kv_heads, config.head_dim)
        self.memory = allocate(options.total_blocks, prod(block_shape) * weights.dtype.itemsize)
        self._kv: Floats = self.memory.view(weights.dtype).reshape(options.total_blocks, *block_shape)
        self.vocab_size = config.vocab_size
        self.max_context_tokens = config.max_context_tokens
        self.eos_token_ids = options.eos_token_ids
        self.layout = KvLayout(
            dtype=weights.dtype.name,
            layers=config.layers,
            block_size=options.block_size,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            order="layer,kv,token,head,dim",
            model_fingerprint=weights.fingerprint,
            bytes_per_block=self.memory.shape[1],
        )
        self._forward = LlamaForward(weights)
        self._sampler = TokenSampler(eos_token_ids=options.eos_token_ids, block_size=options.block_size)

    def open(self, request: EngineRequest, *, limit: int, arrival: int) -> SampledRequest:
        return self._sampler.open(request, limit=limit, arrival=arrival)

    def compute_prompt(self, request: SampledRequest, *, stop: int) -> None:
        hidden = self._forward.compute(
            [Span(request.tokens(request.computed, stop), request.computed, request.blocks)], self._kv
        )
        if stop == request.target and not request.request.prefill_only:
            self._sampler.draw([request], self._forward.logits(hidden))

    def compute_decode(self, requests: Sequence[SampledRequest]) -> None:
        drawn = np.array([request.drawn[-1:] for request in requests], dtype=np.uint32)
        spans = [
            Span(token, request.prompt_tokens + request.produced - 1, request.blocks)
            for token, request in zip(drawn, requests, strict=True)
        ]
        self._sampler.draw(requests, self._forward.logits(self._forward.compute(spans, self._kv)))

    def seal(self, block: int, block_hash: SequenceHash) -> None:
        """Nothing to note: the KV is there."""

    def blank(self, blocks: Sequence[int]) -> None:
        self.memory[list(blocks)] = _BLANK_BYTE

    def find_wrong(self, blocks: Sequence[int], block_hashes: Sequence[SequenceHash]) -> list[int]:
        """Find blocks of which a part never arrived, and blocks of zeros, which are memory that nobody has written."""
        return [
            index
            for index, block in enumerate(blocks)
            if not np.isfinite(self._kv[block]).all() or not self.memory[block].any()
        ]

    def step_s(self, *, decode_sequences: int, decode_blocks: int, prefill_tokens: int) -> float:
        return 0.0
