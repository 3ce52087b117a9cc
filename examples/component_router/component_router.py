"""A router that is a component, with a cost function of its own. Serve it: kvmesh serve component_router:Router."""

from collections.abc import AsyncIterator, Mapping

from pydantic import BaseModel

from kvmesh.sdk import (
    AggregatedMetrics,
    KvEventPublisher,
    KvIndexer,
    KvMetricsAggregator,
    KvMetricsPublisher,
    OverlapScores,
    context,
    depends,
    endpoint,
    on_start,
    service,
)

BLOCK_SIZE = 4
SLOTS = 8
POOL_BLOCKS = 256


class Tokens(BaseModel):
    """A prompt."""

    tokens: list[int]


class WorkerId(BaseModel):
    """Who should take it, and why."""

    worker_id: str
    costs: dict[str, float]


class Answer(BaseModel):
    """Who took it."""

    worker_id: str
    cached_blocks: int


@service(namespace="your_namespace", workers=2)
class Worker:
    """Remembers prompts, and says so."""

    def __init__(self) -> None:
        component = context["component"]
        self.metrics = KvMetricsPublisher()
        self.metrics.create_endpoint(component)
        self.events = KvEventPublisher(component, BLOCK_SIZE)
        self.cached: set[int] = set()
        self._publish()

    @endpoint()
    async def generate(self, request: Tokens) -> Answer:
        """Take a prompt into the cache."""
        hashes = self.events.stored(request.tokens)
        found = sum(block in self.cached for block in hashes)
        self.cached.update(hashes)
        self._publish()
        return Answer(worker_id=context.worker_id, cached_blocks=found)

    def _publish(self) -> None:
        used = len(self.cached)
        self.metrics.publish(0, SLOTS, used, POOL_BLOCKS, 0, used / POOL_BLOCKS, 0.0)


@service(namespace="your_namespace")
class Router:
    """Chooses a worker for a prompt, and can send it there."""

    worker = depends(Worker)

    @on_start
    async def listen(self) -> None:
        """Begin to listen to the workers."""
        workers = context["runtime"].namespace("your_namespace").component("Worker")
        self.indexer = KvIndexer(workers, BLOCK_SIZE)
        self.aggregator = KvMetricsAggregator(workers)

    @endpoint()
    async def route(self, request: Tokens) -> WorkerId:
        """Return who has the least cost."""
        return await self._choose(request)

    @endpoint()
    async def generate(self, request: Tokens) -> AsyncIterator[Answer]:
        """Send the prompt to who has the least cost."""
        chosen = await self._choose(request)
        async for answer in await self.worker.generate.direct(request, chosen.worker_id):
            yield answer

    async def _choose(self, request: Tokens) -> WorkerId:
        scores = await self.indexer.find_matches_for_request(request.tokens, 0)
        metrics = await self.aggregator.get_metrics()
        costs = self._cost_function(scores, metrics, len(request.tokens))
        return WorkerId(worker_id=min(costs, key=lambda worker_id: (costs[worker_id], worker_id)), costs=dict(costs))

    def _cost_function(
        self, scores: OverlapScores, metrics: AggregatedMetrics, token_length: int
    ) -> Mapping[str, float]:
        """Blocks still to compute, plus the share of its pool and of its slots that a worker has in use."""
        blocks = max(token_length // BLOCK_SIZE, 1)
        return {
            one.worker_id: (blocks - scores.scores.get(one.worker_id, 0)) / blocks
            + one.gpu_cache_usage_perc
            + one.request_active_slots / one.request_total_slots
            for one in metrics.endpoints
        }
