"""Engines by name: what the composition root makes of the `engine.*` settings."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.suggestions import suggestion
from kvmesh.engines.engine import Engine
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.models import SPEAKS
from kvmesh.runtime.settings import EngineSettings
from kvmesh.tokenizing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kvmesh.engines.huggingface_model import HuggingFaceModel
    from kvmesh.engines.openai_upstream import OpenEvents
    from kvmesh.engines.openai_upstream_options import OpenAiUpstreamOptions


class BuildEngine(Protocol):
    """Makes one engine."""

    def __call__(self, node: str, *, index: int = 0, allocate: Allocate = allocate_here) -> Engine:
        """Make the engine of a worker on `node`; its KV pool, if it has one, is what `allocate` returns.

        `index` is the worker's, from 0, among those of its role.
        """


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """How to make the engines of one mesh, all alike, and what the processor needs to know of them."""

    model_name: str
    tokenizer: Tokenizer | None
    """None: the engine reads text."""
    min_uncached_tokens: int
    """From how many uncached tokens on a prefill goes remote, where the settings leave it open."""
    build: BuildEngine
    decode_workers: int | None = None
    """For how many decode workers of a mesh there are engines; None: any number."""

    def check(self, *, decode_workers: int) -> None:
        """Raises: FixRequestError(INVALID_FIELD) if these engines are for another number of decode workers."""
        if self.decode_workers not in (None, decode_workers):
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"there are engines for --decode {self.decode_workers}, and not for {decode_workers}: "
                "each decode worker needs an upstream of its own, url=FIRST,SECOND,...",
                field="mesh.decode",
            )


def plan_engine(settings: EngineSettings) -> EnginePlan:
    """Check the settings and return the plan. Raises: FixRequestError(INVALID_FIELD) naming the setting."""
    planner = _PLANNERS.get(settings.name)
    if planner is None:
        raise FixRequestError(
            Reason.INVALID_FIELD,
            f"no engine is named {settings.name!r}; {suggestion(settings.name, _PLANNERS)}",
            field="engine.name",
        )
    return planner(settings)


def _plan_echo(settings: EngineSettings) -> EnginePlan:
    from kvmesh.engines import echo  # noqa: PLC0415  # an engine is imported when it is chosen

    if settings.model is not None:
        raise FixRequestError(
            Reason.INVALID_FIELD, "echo reads text and takes no model: use --engine simulated", field="engine.model"
        )
    options = echo.parse(_with_speedup(settings, "echo"))
    return EnginePlan(
        model_name=settings.model_name or "echo",
        tokenizer=None,
        min_uncached_tokens=1,  # so that the walk-through's short prompts go remote
        build=lambda node, *, index=0, allocate=allocate_here: echo.EchoEngine(node_name=node, options=options),
    )


def _plan_simulated(settings: EngineSettings) -> EnginePlan:
    from kvmesh.engines import simulated, simulated_options  # noqa: PLC0415  # as above

    tokenizer = _load_tokenizer(settings.model)
    given = _with_speedup(settings, "simulated")
    options = simulated_options.parse({**_defaults(tokenizer), **given})
    return EnginePlan(
        model_name=settings.model_name or (settings.model.resolve().name if settings.model else "simulated"),
        tokenizer=tokenizer,
        min_uncached_tokens=256,
        build=lambda node, *, index=0, allocate=allocate_here: simulated.SimulatedEngine(options, allocate=allocate),
    )


def _plan_numpy_llama(settings: EngineSettings) -> EnginePlan:
    from kvmesh.engines import numpy_llama, numpy_llama_config, numpy_llama_options, numpy_llama_weights  # noqa: PLC0415  # as above

    folder = settings.model or SPEAKS
    tokenizer = _load_tokenizer(folder)
    config = numpy_llama_config.LlamaConfig.read(folder)
    numpy_llama_weights.check_weight_files(folder)
    defaults = {name: text for name, text in _defaults(tokenizer).items() if name in _OF_A_REAL_MODEL}
    if settings.model is None:
        defaults |= _OF_SPEAKS
    options = numpy_llama_options.parse({**defaults, **_with_speedup(settings, "numpy_llama")})

    @cache  # all engines of one process share the weights, and a process without engines loads none
    def weights() -> numpy_llama_weights.LlamaWeights:
        return numpy_llama_weights.load_weights(folder, dtype=options.dtype)

    return EnginePlan(
        model_name=settings.model_name or folder.resolve().name,
        tokenizer=tokenizer,
        min_uncached_tokens=1 if config.parameters < _TINY_PARAMETERS else 256,
        build=lambda node, *, index=0, allocate=allocate_here: numpy_llama.NumpyLlamaEngine(
            weights(), options, allocate=allocate
        ),
    )


def _plan_huggingface(settings: EngineSettings) -> EnginePlan:
    from kvmesh.engines import huggingface_folder, huggingface_options  # noqa: PLC0415  # as above

    folder = settings.model
    if folder is None:
        raise FixRequestError(
            Reason.INVALID_FIELD,
            "huggingface needs a model: --model DIR, e.g. one that `kvmesh model make-tiny DIR` writes",
            field="engine.model",
        )
    weights_bytes = huggingface_folder.check_folder(folder)
    tokenizer = _load_tokenizer(folder)
    defaults = {name: text for name, text in _defaults(tokenizer).items() if name in _OF_A_REAL_MODEL}
    options = huggingface_options.parse({**defaults, **_with_speedup(settings, "huggingface")})

    @cache  # all engines of one process share the model; a process without engines loads neither it nor torch
    def model() -> "HuggingFaceModel":
        huggingface_folder.require_packages()
        from kvmesh.engines import huggingface_model  # noqa: PLC0415  # imports torch

        return huggingface_model.load_model(folder, dtype=options.dtype, device=options.device, threads=options.threads)

    def build(node: str, *, index: int = 0, allocate: Allocate = allocate_here) -> Engine:
        loaded = model()
        from kvmesh.engines import huggingface  # noqa: PLC0415  # imports torch

        return huggingface.HuggingFaceEngine(loaded, options, allocate=allocate)

    return EnginePlan(
        model_name=settings.model_name or folder.resolve().name,
        tokenizer=tokenizer,
        min_uncached_tokens=1 if weights_bytes < _TINY_BYTES else 256,
        build=build,
    )


def _plan_openai_upstream(settings: EngineSettings) -> EnginePlan:
    from kvmesh.engines import openai_upstream, openai_upstream_models, openai_upstream_options  # noqa: PLC0415  # as above

    options = openai_upstream_options.parse(_with_speedup(settings, "openai_upstream"))
    api_key = _api_key(options.api_key_env)
    tokenizer = _load_tokenizer(settings.model) if settings.model is not None else None
    if tokenizer is None and options.prompts == "tokens":
        raise FixRequestError(
            Reason.INVALID_FIELD,
            "prompts=tokens needs the upstream's own tokenizer: --model DIR, the folder of its model",
            field="engine.model",
        )
    name = settings.model_name or options.model
    if not name:
        name, _ = openai_upstream_models.choose_model(options, url=options.urls[0], api_key=api_key)

    def build(node: str, *, index: int = 0, allocate: Allocate = allocate_here) -> Engine:
        if len(options.urls) == 1:
            index = 0  # a process of its own may be told its own alone
        if index >= len(options.urls):
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"names {len(options.urls)} upstreams, and none for the worker of index {index} on {node}",
                field="engine.options.url",
            )
        return openai_upstream.OpenAiUpstreamEngine(
            options,
            url=options.urls[index],
            api_key=api_key,
            vocab_size=tokenizer.vocab_size if tokenizer is not None else 0,
            open_events=_upstream_events(options, index) if options.kv_events else None,
        )

    return EnginePlan(
        model_name=name,
        tokenizer=tokenizer,
        min_uncached_tokens=0,  # never: the upstream does its own prefills, and hands over no KV
        build=build,
        decode_workers=len(options.urls),
    )


def _plan_tensorrt_llm(settings: EngineSettings) -> EnginePlan:
    from kvmesh.engines import tensorrt_llm, tensorrt_llm_options  # noqa: PLC0415  # as above

    model = settings.model
    if model is None:
        raise FixRequestError(
            Reason.INVALID_FIELD,
            "tensorrt_llm needs a model: --model DIR, its Hugging Face folder",
            field="engine.model",
        )
    tokenizer = _load_tokenizer(model)
    defaults = {name: text for name, text in _defaults(tokenizer).items() if name == "max_context_tokens"}
    options = tensorrt_llm_options.parse({**defaults, **_with_speedup(settings, "tensorrt_llm")})
    return EnginePlan(
        model_name=settings.model_name or model.resolve().name,
        tokenizer=tokenizer,
        min_uncached_tokens=0 if options.transceiver == "none" else 256,
        build=lambda node, *, index=0, allocate=allocate_here: tensorrt_llm.TensorRtLlmEngine(
            options, model=model, vocab_size=tokenizer.vocab_size
        ),
    )


def _upstream_events(options: "OpenAiUpstreamOptions", index: int) -> "OpenEvents":
    from kvmesh.services.vllm_events import require_packages  # noqa: PLC0415  # only for upstreams that tell events
    from kvmesh.services.vllm_source import VllmEventSource  # noqa: PLC0415  # as above

    require_packages()
    endpoint, replay_endpoint = options.event_endpoints(index)
    return lambda publish: VllmEventSource(
        endpoint=endpoint,
        publish=publish,
        block_size=options.block_size,
        replay_endpoint=replay_endpoint,
        topic=options.kv_events_topic,
    )


def _api_key(variable: str) -> str | None:
    """Return the key that an environment variable holds; settings and flags are read by others, and so no place for it.

    Raises: FixRequestError(INVALID_FIELD) if a variable is named that is not set.
    """
    if not variable:
        return None
    key = os.environ.get(variable)
    if not key:
        raise FixRequestError(
            Reason.INVALID_FIELD, f"the environment variable {variable} is not set", field="engine.options.api_key_env"
        )
    return key


_TINY_PARAMETERS = 50_000_000
"""A prefill of a model below this costs less than the handoff of its KV: it goes remote to be seen, not to save."""
_TINY_BYTES = 2 * _TINY_PARAMETERS
_OF_SPEAKS = {"block_size": "4"}
"""So that a prompt of five tokens has a full block to move."""
_OF_A_REAL_MODEL = frozenset({"eos_token_ids", "max_context_tokens"})
"""What a tokenizer's folder says that the model's own configuration may not."""
_PLANNERS: Mapping[str, Callable[[EngineSettings], EnginePlan]] = {
    "echo": _plan_echo,
    "simulated": _plan_simulated,
    "numpy_llama": _plan_numpy_llama,
    "huggingface": _plan_huggingface,
    "openai_upstream": _plan_openai_upstream,
    "tensorrt_llm": _plan_tensorrt_llm,
}


def _with_speedup(settings: EngineSettings, engine: str) -> dict[str, str]:
    options = dict(settings.options)
    if settings.speedup is not None:
        if engine != "simulated":
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"{engine} models no time: --speedup is for --engine simulated",
                field="engine.speedup",
            )
        options["speedup"] = repr(settings.speedup)
    return options


def _load_tokenizer(folder: Path | None) -> Tokenizer:
    if folder is None:
        from kvmesh.tokenizing.byte_tokenizer import ByteTokenizer  # noqa: PLC0415  # one of the two

        return ByteTokenizer()
    from kvmesh.tokenizing.folder_tokenizer import FolderTokenizer  # noqa: PLC0415  # one of the two

    return FolderTokenizer.load(folder)


def _defaults(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the engine's options that follow from the tokenizer, unless given."""
    defaults = {"vocab_size": str(tokenizer.vocab_size)}
    if tokenizer.eos_token_ids:
        defaults["eos_token_ids"] = ",".join(map(str, tokenizer.eos_token_ids))
    if tokenizer.max_context_tokens is not None:
        defaults["max_context_tokens"] = str(tokenizer.max_context_tokens)
    printable = getattr(tokenizer, "printable_ids", None)
    if printable is not None:
        defaults["output_token_ids"] = f"{printable[0]}-{printable[1] - 1}"
    return defaults
