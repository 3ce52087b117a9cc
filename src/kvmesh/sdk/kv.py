"""KV-aware routing in a component: what workers publish, and what a router of one's own asks."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.hashing import local_block_hashes, sequence_hashes
from kvmesh.core.ids import SequenceHash, WorkerRank
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.engines.engine import EngineLoad
from kvmesh.sdk.handles import Component
from kvmesh.sdk.publications import Publications

_FIRST_REPORTS_S = 1.0


@dataclass(frozen=True, slots=True)
class EndpointMetrics:
    """What one instance published last: the seven figures."""

    worker_id: str
    request_active_slots: int
    """Requests that run."""
    request_total_slots: int
    """Requests that it runs at once."""
    kv_active_blocks: int
    """Blocks that running requests hold."""
    kv_total_blocks: int
    """Blocks of the pool."""
    num_requests_waiting: int
    gpu_cache_usage_perc: float
    """Share of the pool in use, 0..1."""
    gpu_prefix_cache_hit_rate: float
    """Cached prompt tokens over prompt tokens, 0..1."""
    age_s: float = 0.0
    """Since it was said; an instance repeats itself every second."""


@dataclass(frozen=True, slots=True)
class AggregatedMetrics:
    """The figures of every instance of a component that publishes them."""

    endpoints: tuple[EndpointMetrics, ...] = ()
    """By worker id."""


@dataclass(frozen=True, slots=True)
class OverlapScores:
    """Leading blocks of a prompt that are cached, by worker id; who has none is left out."""

    scores: Mapping[str, int]


class KvMetricsPublisher:
    """Publishes the seven figures of the instance that makes it."""

    def __init__(self) -> None:
        self._publications: Publications | None = None

    def create_endpoint(self, component: Component) -> None:
        """Serve the figures beside the component's endpoints; call it in `__init__` or `on_start`.

        Raises: RuntimeError unless the component is served here, and later than that.
        """
        publications = _publications_of(component)
        publications.use()
        self._publications = publications

    def publish(  # noqa: PLR0917  # the guide's figures, in its order
        self,
        request_active_slots: int,
        request_total_slots: int,
        kv_active_blocks: int,
        kv_total_blocks: int,
        num_requests_waiting: int,
        gpu_cache_usage_perc: float,
        gpu_prefix_cache_hit_rate: float,
    ) -> None:
        """Say the figures as they are now; from any thread. Raises: RuntimeError before `create_endpoint`."""
        if self._publications is None:
            raise RuntimeError("nobody could hear it: call create_endpoint(context['component']) first")
        self._publications.say_load(
            EngineLoad(
                active_requests=request_active_slots,
                max_requests=request_total_slots,
                active_blocks=kv_active_blocks,
                total_blocks=kv_total_blocks,
                waiting_requests=num_requests_waiting,
                cache_usage=gpu_cache_usage_perc,
                prefix_hit_rate=gpu_prefix_cache_hit_rate,
            )
        )


class KvEventPublisher:
    """Publishes which blocks of tokens the instance that makes it has cached."""

    def __init__(self, component: Component, block_size: int) -> None:
        """Serve the events beside the component's endpoints; make it in `__init__` or `on_start`.

        Raises: RuntimeError unless the component is served here, and later than that;
        FixRequestError(INVALID_FIELD) `block_size`.
        """
        if block_size < 1:
            raise FixRequestError(Reason.INVALID_FIELD, f"block_size {block_size} is below 1", field="block_size")
        self._block_size = block_size
        self._publications = _publications_of(component)
        self._publications.use(block_size=block_size)

    def stored(self, tokens: Sequence[int], lora_id: int = 0) -> tuple[int, ...]:
        """Say that every full block of a prompt is cached; return their hashes. From any thread."""
        local = local_block_hashes(np.array(tokens, dtype=np.uint32), self._block_size, lora=_lora(lora_id))
        hashes = sequence_hashes(local)
        self._publications.say_kv([BlocksStored(None, hashes, tuple(local))])
        return hashes

    def removed(self, block_hashes: Sequence[int]) -> None:
        """Say that blocks are gone, the last of a prompt first. From any thread."""
        self._publications.say_kv([BlocksRemoved(tuple(map(SequenceHash, block_hashes)))])

    def cleared(self) -> None:
        """Say that nothing is cached any more. From any thread."""
        self._publications.say_kv([CacheCleared()])


class KvMetricsAggregator:
    """Collects the figures of a component's instances, which publish them with a `KvMetricsPublisher`.

    The mesh's own workers are components too: `namespace("default").component("decode")`.
    """

    def __init__(self, component: Component) -> None:
        """Begin to listen; ends with the runtime."""
        self._watch = component.runtime.watch(component.namespace, component.name)
        self._first_until = asyncio.get_running_loop().time() + _FIRST_REPORTS_S

    async def get_metrics(self) -> AggregatedMetrics:
        """Return the figures that are known; in the first second of the aggregator it waits for everybody's."""
        await self._watch.wait_reported(self._first_until)
        return AggregatedMetrics(
            tuple(
                EndpointMetrics(
                    worker_id=worker.worker.worker_id,
                    request_active_slots=report.active_requests,
                    request_total_slots=report.max_requests,
                    kv_active_blocks=report.active_blocks,
                    kv_total_blocks=report.total_blocks,
                    num_requests_waiting=report.waiting_requests,
                    gpu_cache_usage_perc=report.cache_usage,
                    gpu_prefix_cache_hit_rate=report.prefix_hit_rate,
                    age_s=worker.load_age_s,
                )
                for worker in self._watch.workers()
                if (report := worker.report) is not None
            )
        )


class KvIndexer:
    """Finds which instances of a component hold a prompt's prefix, by the events that they publish."""

    def __init__(self, component: Component, block_size: int) -> None:
        """Begin to listen; ends with the runtime. `block_size` must be the instances' own."""
        self._watch = component.runtime.watch(component.namespace, component.name)
        self._block_size = block_size

    def block_size(self) -> int:
        """Return the tokens in a block."""
        return self._block_size

    async def find_matches_for_request(self, tokens: Sequence[int], lora_id: int = 0) -> OverlapScores:
        """Return the leading cached blocks of a prompt per worker id, as they are known now; it waits for nobody.

        Raises: FixRequestError(INVALID_FIELD) naming an instance whose blocks are of another size.
        """
        for worker in self._watch.workers():
            size = worker.record.block_size
            if worker.indexed_blocks and size != self._block_size:
                why = f"block_size {self._block_size}: {worker.worker.worker_id} has blocks of {size} tokens"
                raise FixRequestError(Reason.INVALID_FIELD, why, field="block_size")
        prompt = PromptBlocks.of_tokens(np.array(tokens, dtype=np.uint32), self._block_size, lora=_lora(lora_id))
        scores: dict[str, int] = {}
        matches: Mapping[WorkerRank, int] = self._watch.index.match(prompt)
        for rank, depth in matches.items():
            scores[rank.worker_id] = max(depth, scores.get(rank.worker_id, 0))
        return OverlapScores(scores)


def _publications_of(component: Component) -> Publications:
    publications = component.runtime.publications
    if publications is None:
        raise RuntimeError(
            f"{component.namespace}/{component.name} is not served here: publish from its own instance, "
            "with context['component']"
        )
    return publications


def _lora(lora_id: int) -> str | None:
    return str(lora_id) if lora_id else None
