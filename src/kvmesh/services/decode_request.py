"""From the contract's DecodeRequest and PrefillTask to what an engine reads."""

import numpy as np
import numpy.typing as npt

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.hashing import local_block_hashes, sequence_hashes, text_tokens
from kvmesh.core.ids import AttemptKey, RequestId
from kvmesh.engines.engine import EngineInfo, EngineRequest, PromptForm, Sampling
from kvmesh.v1 import decode_worker_pb2, generation_pb2, prefill_queue_pb2
from kvmesh.wire.validation import check_sampling, invalid

_PREFILL_SAMPLING = Sampling(max_tokens=1)


def attempt_key(request_id: str, attempt: int) -> AttemptKey:
    """Return the key of an attempt. Raises: FixRequestError(INVALID_FIELD) when either part is missing."""
    if not request_id:
        raise invalid("request_id", "required")
    if attempt < 1:
        raise invalid("attempt", "counts from 1")
    return AttemptKey(RequestId(request_id), attempt)


def to_engine_request(request: decode_worker_pb2.DecodeRequest, info: EngineInfo) -> tuple[EngineRequest, int]:
    """Return the engine's request and its prompt tokens. Raises: FixRequestError naming the field."""
    key = attempt_key(request.request_id, request.attempt)
    check_sampling(request.sampling)
    sampling = _to_sampling(request.sampling)
    _check_served(sampling, info)
    if request.rank:
        raise invalid("rank", f"this worker has no rank {request.rank}: its engine has rank 0 alone")
    if request.WhichOneof("input") == "text":
        return _text_request(key, request.text, info, sampling)
    return _token_request(key, request, info, sampling)


def to_prefill_request(task: prefill_queue_pb2.PrefillTask, info: EngineInfo) -> tuple[EngineRequest, int]:
    """Return the engine's prefill-only request and its prompt tokens. Raises: FixRequestError naming the field."""
    key = attempt_key(task.request_id, task.attempt)
    if task.WhichOneof("input") == "text":
        return _text_request(key, task.text, info, _PREFILL_SAMPLING, prefill_only=True)
    return _token_request(key, task, info, _PREFILL_SAMPLING, prefill_only=True)


def _to_sampling(sampling: generation_pb2.SamplingParams) -> Sampling:
    return Sampling(
        max_tokens=sampling.max_tokens or 1,
        temperature=sampling.temperature,
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.HasField("seed") else None,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        response_format=sampling.response_format,
    )


def _check_served(sampling: Sampling, info: EngineInfo) -> None:
    """Refuse by name what this worker's engine would not do: an answer without it would look as if it had been done."""
    if sampling.logprobs is not None and not info.has_logprobs:
        raise invalid("sampling.logprobs", f"not supported: the engine {info.name} knows none; leave it out")
    if sampling.response_format and not info.keeps_formats:
        raise invalid("sampling.response_format", f"not supported: the engine {info.name} keeps to none; leave it out")


def _text_request(
    key: AttemptKey, text: str, info: EngineInfo, sampling: Sampling, *, prefill_only: bool = False
) -> tuple[EngineRequest, int]:
    if PromptForm.TEXT not in info.accepts:
        raise invalid("text", "this worker accepts TOKENS: send token_ids")
    if not text:
        raise FixRequestError(Reason.EMPTY_PROMPT, "", field="text")
    return EngineRequest(key=key, sampling=sampling, text=text, prefill_only=prefill_only), len(text_tokens(text))


def _token_request(
    key: AttemptKey,
    request: decode_worker_pb2.DecodeRequest | prefill_queue_pb2.PrefillTask,
    info: EngineInfo,
    sampling: Sampling,
    *,
    prefill_only: bool = False,
) -> tuple[EngineRequest, int]:
    if PromptForm.TOKENS not in info.accepts:
        raise invalid("token_ids", "this worker accepts TEXT: send text")
    tokens: npt.NDArray[np.uint32] = np.array(request.token_ids.token_ids, dtype=np.uint32)
    if not len(tokens):
        raise FixRequestError(Reason.EMPTY_PROMPT, "", field="token_ids")
    if info.vocab_size and (highest := int(tokens.max())) >= info.vocab_size:
        raise invalid("token_ids", f"token {highest} is out of range: below the vocabulary's {info.vocab_size}")
    local = local_block_hashes(
        tokens, info.block_size, lora=request.lora or None, cache_namespace=request.cache_namespace or None
    )
    engine_request = EngineRequest(
        key=key,
        sampling=sampling,
        token_ids=tokens,
        block_hashes=sequence_hashes(local),
        local_hashes=local,
        prefill_only=prefill_only,
        lora=request.lora or None,
        cache_namespace=request.cache_namespace or None,
    )
    return engine_request, len(tokens)
