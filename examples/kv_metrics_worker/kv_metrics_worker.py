"""A component that publishes the load and the cache of its engine. Serve it: kvmesh serve kv_metrics_worker:Watcher."""

from collections.abc import AsyncIterator

from pydantic import BaseModel, Field

from kvmesh.sdk import (
    KvEventPublisher,
    KvIndexer,
    KvMetricsAggregator,
    KvMetricsPublisher,
    context,
    depends,
    endpoint,
    on_start,
    service,
)

BLOCK_SIZE = 4
SLOTS = 8
POOL_BLOCKS = 256


class Prompt(BaseModel):
    """What to continue."""

    tokens: list[int]


class Token(BaseModel):
    """One token of the answer."""

    token: int


class Sight(BaseModel):
    """What a watcher sees of the workers."""

    running: dict[str, int] = Field(description="Requests that run, by worker.")
    cached_blocks: dict[str, int] = Field(description="Leading blocks of the prompt that are cached, by worker.")


@service(namespace="your_namespace")
class YourWorker:
    """Echoes tokens, as an engine with a KV cache would generate them."""

    def __init__(self) -> None:
        component = context["component"]
        self.metrics_publisher = KvMetricsPublisher()
        self.metrics_publisher.create_endpoint(component)
        self.kv_publisher = KvEventPublisher(component, BLOCK_SIZE)
        self.running = 0
        self.used_blocks = 0
        self.publish_metrics()

    def publish_metrics(self) -> None:
        """Say the seven figures as they are now."""
        self.metrics_publisher.publish(
            self.running,
            SLOTS,
            self.used_blocks,
            POOL_BLOCKS,
            0,
            self.used_blocks / POOL_BLOCKS,
            0.0,
        )

    @endpoint()
    async def generate(self, request: Prompt) -> AsyncIterator[Token]:
        """Stream the prompt's tokens back."""
        self.running += 1
        self.used_blocks += len(self.kv_publisher.stored(request.tokens))
        self.publish_metrics()
        try:
            for token in request.tokens:
                yield Token(token=token)
        finally:
            self.running -= 1
            self.publish_metrics()


@service(namespace="your_namespace")
class Watcher:
    """Looks at the workers as a router does."""

    worker = depends(YourWorker)

    @on_start
    async def listen(self) -> None:
        """Begin to listen to the workers."""
        workers = context["runtime"].namespace("your_namespace").component("YourWorker")
        self.metrics = KvMetricsAggregator(workers)
        self.indexer = KvIndexer(workers, BLOCK_SIZE)

    @endpoint()
    async def look(self, request: Prompt) -> Sight:
        """Say how busy each worker is, and what it has of the prompt."""
        metrics = await self.metrics.get_metrics()
        overlap = await self.indexer.find_matches_for_request(request.tokens, 0)
        return Sight(
            running={one.worker_id: one.request_active_slots for one in metrics.endpoints},
            cached_blocks=dict(overlap.scores),
        )
