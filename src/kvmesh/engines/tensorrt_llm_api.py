"""The names of TensorRT-LLM that its engine uses, imported only when it is made; and its handoff as bytes.

They are its LLM API's (`tensorrt_llm.LLM`, PyTorch backend). The package is in no extra of ours: it lives in an
environment of its own, next to its CUDA, and this program is installed into that.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import orjson

from kvmesh.core.errors import FixRequestError, NotServedError, Reason
from kvmesh.engines.engine import EngineHandoff

_STATE_FIELDS = ("ctx_request_id", "draft_tokens", "disagg_request_id", "ctx_dp_rank", "ctx_info_endpoint")
"""What of DisaggregatedParams goes from prefill to decode beside tokens and opaque state; releases differ in them."""


@dataclass(frozen=True, slots=True)
class TensorRtLlmApi:
    """Classes of the package, by their names there."""

    LLM: Any
    SamplingParams: Any
    KvCacheConfig: Any
    CacheTransceiverConfig: Any
    DisaggregatedParams: Any


def load_api(load: Callable[[str], Any] = import_module) -> TensorRtLlmApi:
    """Import the package. Raises: NotServedError(UNIMPLEMENTED) naming what to install."""
    try:
        package, llmapi = load("tensorrt_llm"), load("tensorrt_llm.llmapi")
        return TensorRtLlmApi(
            LLM=package.LLM,
            SamplingParams=package.SamplingParams,
            KvCacheConfig=llmapi.KvCacheConfig,
            CacheTransceiverConfig=llmapi.CacheTransceiverConfig,
            DisaggregatedParams=llmapi.DisaggregatedParams,
        )
    except (ImportError, OSError, RuntimeError, AttributeError) as exc:  # missing, or without its CUDA, or too old
        raise NotServedError(
            Reason.UNIMPLEMENTED,
            "engine unavailable: tensorrt_llm needs the TensorRT-LLM package (1.0 or later) and its CUDA, in an "
            "environment that has them: pip install kvmesh into NVIDIA's tensorrt-llm container, or tensorrt-llm from "
            f"NVIDIA's index into this one ({type(exc).__name__}: {exc})",
        ) from exc


def pack_handoff(params: Any) -> EngineHandoff:
    """Write what a context_only request ended with."""
    fields = {name: value for name in _STATE_FIELDS if (value := getattr(params, name, None)) is not None}
    if params.opaque_state is not None:
        fields["opaque_state"] = base64.b64encode(params.opaque_state).decode()
    return EngineHandoff(orjson.dumps(fields), tuple(params.first_gen_tokens or ()))


def unpack_handoff(handoff: EngineHandoff, api: TensorRtLlmApi) -> Any:
    """Return the params of the generation_only request that goes on. Raises: FixRequestError(KV_TRANSFER_FAILED)."""
    try:
        fields = orjson.loads(handoff.state)
        if "opaque_state" in fields:
            fields["opaque_state"] = base64.b64decode(fields["opaque_state"], validate=True)
        return api.DisaggregatedParams(
            request_type="generation_only", first_gen_tokens=list(handoff.first_tokens), **fields
        )
    except (ValueError, TypeError) as exc:
        raise FixRequestError(
            Reason.KV_TRANSFER_FAILED, f"engine_state is none of this engine's: {exc}", field="handoff.engine_state"
        ) from exc
