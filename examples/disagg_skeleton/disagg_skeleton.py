"""The skeleton of a disaggregated deployment as a graph of components: kvmesh serve disagg_skeleton:Processor.

Processor -> Router (who has seen most of this prompt?) -> Processor -> that DecodeWorker -> PrefillWorker
"""

from collections import Counter
from collections.abc import AsyncIterator
from difflib import SequenceMatcher

from pydantic import BaseModel, Field

from kvmesh.sdk import (
    AggregatedMetrics,
    KvMetricsAggregator,
    KvMetricsPublisher,
    context,
    depends,
    endpoint,
    on_start,
    service,
)

NAMESPACE = "disagg-demo"
SLOTS = 16
LIKE = 0.6
"""From this likeness on, 0..1, two prompts are taken to begin alike; any two texts have some letters in common."""


class Request(BaseModel):
    """A prompt."""

    prompt: str
    request_id: str = Field(default="", description="The caller's own id, echoed.")


class Response(BaseModel):
    """An answer."""

    worker_output: str
    request_id: str


class Prefilled(BaseModel):
    """What a prefill worker hands over."""

    tokens: int
    worker_id: str


class Chosen(BaseModel):
    """Who is to answer."""

    worker_id: str
    similarity: float


@service(namespace=NAMESPACE)
class PrefillWorker:
    """Stands for a prefill engine."""

    @endpoint()
    async def generate(self, request: Request) -> Prefilled:
        """Prefill a prompt."""
        return Prefilled(tokens=len(request.prompt.split()), worker_id=context.worker_id)


@service(namespace=NAMESPACE, workers=2)
class DecodeWorker:
    """Stands for a decode engine; publishes its load."""

    prefill = depends(PrefillWorker)

    def __init__(self) -> None:
        self.publisher = KvMetricsPublisher()
        self.publisher.create_endpoint(context["component"])
        self.running = 0
        self._publish()

    @endpoint()
    async def generate(self, request: Request) -> AsyncIterator[Response]:
        """Answer a prompt, prefilled elsewhere."""
        self.running += 1
        self._publish()
        try:
            await self.prefill.generate(request)
            yield Response(
                worker_output=f"{request.prompt}_GeneratedBy_{context.worker_id}", request_id=request.request_id
            )
        finally:
            self.running -= 1
            self._publish()

    def _publish(self) -> None:
        self.publisher.publish(self.running, SLOTS, 0, 0, 0, self.running / SLOTS, 0.0)


@service(namespace=NAMESPACE)
class Router:
    """Chooses by load, and by the likeness of a prompt to what each worker answered last where that is enough."""

    worker = depends(DecodeWorker)

    def __init__(self) -> None:
        self.last_prompt: dict[str, str] = {}
        self.sent: Counter[str] = Counter()

    @on_start
    async def listen(self) -> None:
        """Begin to listen to the workers."""
        workers = context["runtime"].namespace(NAMESPACE).component("DecodeWorker")
        self.aggregator = KvMetricsAggregator(workers)

    @endpoint()
    async def route(self, request: Request) -> Chosen:
        """Return who should answer."""
        metrics = await self.aggregator.get_metrics()
        costs = self._cost_function(request.prompt, metrics)
        chosen = min(costs, key=lambda worker_id: (costs[worker_id], self.sent[worker_id], worker_id))
        self.sent[chosen] += 1
        likeness = self._likeness(chosen, request.prompt)
        self.last_prompt[chosen] = request.prompt
        return Chosen(worker_id=chosen, similarity=likeness)

    def _cost_function(self, prompt: str, metrics: AggregatedMetrics) -> dict[str, float]:
        costs = {}
        for one in metrics.endpoints:
            likeness = self._likeness(one.worker_id, prompt)
            costs[one.worker_id] = one.gpu_cache_usage_perc - (likeness if likeness >= LIKE else 0.0)
        return costs

    def _likeness(self, worker_id: str, prompt: str) -> float:
        return SequenceMatcher(None, self.last_prompt.get(worker_id, ""), prompt).ratio()


@service(namespace=NAMESPACE)
class Processor:
    """The entry: asks the router, then that worker."""

    router = depends(Router)
    worker = depends(DecodeWorker)

    @endpoint()
    async def generate(self, request: Request) -> AsyncIterator[Response]:
        """Answer a prompt."""
        chosen = await self.router.route(request)
        async for response in await self.worker.generate.direct(request, chosen.worker_id):
            yield response
