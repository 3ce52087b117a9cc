"""The composition root: a whole mesh in this process, its roles talking gRPC to each other over loopback.

It alone names implementations. What it starts, it stops, in this order: the gateway, so that nothing new comes and what
runs can end; then the workers, then the queue; then what they shared.
"""

import asyncio
from collections.abc import Awaitable, Callable

from kvmesh import telemetry
from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.core.ids import WorkerId
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.policies.kv_aware import CostKnobs, KvAware
from kvmesh.core.policies.policy import Policy, build_policy
from kvmesh.core.remote_prefill import RemotePrefillRules
from kvmesh.core.roster import WorkerRole
from kvmesh.core.routing import RoutingRules
from kvmesh.discovery.memory import MemoryDiscovery
from kvmesh.runtime.decode_work import decode_work
from kvmesh.runtime.engine_registry import EnginePlan, plan_engine
from kvmesh.runtime.gateway_role import GatewayRole
from kvmesh.runtime.prefill_work import PrefillWork
from kvmesh.runtime.queue_role import QueueRole
from kvmesh.runtime.settings import RouterSettings, Settings
from kvmesh.runtime.worker import Work, Worker, WorkerParts
from kvmesh.transports.memory import MemoryNetwork, MemoryTransport
from kvmesh.v1 import frontend_pb2

log = telemetry.logger(__name__)

_LOOPBACK = "127.0.0.1"
_READY_S = 10.0


class Mesh:
    """Every role of a mesh in one process."""

    def __init__(self, settings: Settings, *, plan: EnginePlan | None = None) -> None:
        """Check what the settings name; `plan` brings engines of the caller's own in place of `engine.*`.

        Raises: FixRequestError(INVALID_FIELD) naming the setting and the fix.
        """
        self._settings = settings
        self._plan = plan or plan_engine(settings.engine)
        self._rules = _remote_prefill_rules(settings, default_min_uncached=self._plan.min_uncached_tokens)
        self._discovery = MemoryDiscovery()
        self._network = MemoryNetwork()
        mesh = settings.mesh
        self._workers = [
            self._worker(mesh.node_name(index), WorkerRole.DECODE, index, self._decode_work)
            for index in range(mesh.decode)
        ] + [
            self._worker(mesh.node_name(mesh.decode + index), WorkerRole.PREFILL, index, PrefillWork)
            for index in range(mesh.prefill)
        ]
        self._queue = QueueRole(
            worker_id=WorkerId(f"{mesh.node_name(0)}/queue/0"),
            namespace=settings.namespace,
            limits=_queue_limits(settings),
            discovery=self._discovery,
        )
        self._gateway = GatewayRole(
            discovery=self._discovery,
            namespace=settings.namespace,
            policy=_policy(settings.router),
            rules=RoutingRules(remote_prefill=self._rules, stale_after_s=settings.router.stale_after_s),
            reservation_ttl_s=settings.router.reservation_ttl_s,
            seed=settings.router.seed,
            tokenizers={self._plan.model_name: self._plan.tokenizer},
            waits=settings.waits,
            max_body_bytes=settings.http.max_body_bytes,
        )
        self._stops: list[Callable[[], Awaitable[None]]] = []

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP door, once started."""
        return self._gateway.http_address

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC door, once started."""
        return self._gateway.grpc_address

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers: decode, then prefill."""
        return tuple(self._workers)

    @property
    def gateway(self) -> GatewayRole:
        """What clients reach."""
        return self._gateway

    async def start(self) -> None:
        """Serve; returns when the first request can be taken.

        Raises: PortTakenError, TryElsewhereError(NO_WORKERS); what was started until then is ended by `stop`.
        """
        settings = self._settings
        self._stops.append(self._gateway.stop)
        await self._gateway.start(
            grpc_host=settings.grpc.host,
            grpc_port=settings.grpc.port,
            http_host=settings.http.host,
            http_port=settings.http.port,
        )
        self._stops.append(lambda: self._queue.stop(settings.waits.drain_s))
        await self._queue.start(_LOOPBACK)
        for worker in self._workers:
            self._stops.append(worker.stop)
            await worker.start(_LOOPBACK)
        try:
            async with asyncio.timeout(_READY_S):
                await self._gateway.wait_ready()
                await asyncio.gather(*(worker.wait_ready() for worker in self._workers))
        except TimeoutError as exc:
            raise TryElsewhereError(
                Reason.NO_WORKERS, f"the workers did not come up within {_READY_S:g} s: see the log above"
            ) from exc

    def topology(self) -> frontend_pb2.Topology:
        """Return the mesh as the gateway knows it now."""
        return self._gateway.topology()

    async def stop(self) -> None:
        """End gracefully, each part within the drain's bound; also after a start that failed. Idempotent."""
        stops, self._stops = self._stops, []
        if stops:
            gateway, *others = stops
            await gateway()
            queue, *workers = others or [_nothing]
            await asyncio.gather(*(stop() for stop in workers))
            await queue()
        await self._discovery.aclose()

    def _worker(self, node: str, role: WorkerRole, index: int, build: Callable[[WorkerParts], Work]) -> Worker:
        return Worker(
            worker_id=WorkerId(f"{node}/{role.value}/{index}"),
            role=role,
            models=(self._plan.model_name,),
            namespace=self._settings.namespace,
            engine=self._plan.build(node),
            transport=MemoryTransport(self._network),
            discovery=self._discovery,
            waits=self._settings.waits,
            build=build,
        )

    def _decode_work(self, parts: WorkerParts) -> Work:
        return decode_work(rules=self._rules, required=self._settings.remote_prefill.required)(parts)


async def _nothing() -> None:
    """Stop what was never started."""


def _policy(settings: RouterSettings) -> Policy:
    if settings.policy == KvAware.name:
        knobs = CostKnobs(
            overlap_credit=settings.overlap_credit,
            prefill_scale=settings.prefill_scale,
            request_weight=settings.request_weight,
            temperature=settings.temperature,
        )
        return KvAware(knobs)
    return build_policy(settings.policy)


def _remote_prefill_rules(settings: Settings, *, default_min_uncached: int) -> RemotePrefillRules:
    remote = settings.remote_prefill
    minimum = remote.min_uncached_tokens
    return RemotePrefillRules(
        min_uncached_tokens=default_min_uncached if minimum is None else minimum,
        min_prompt_tokens=remote.min_prompt_tokens,
        max_queue_depth=remote.max_queue_depth,
    )


def _queue_limits(settings: Settings) -> QueueLimits:
    queue = settings.queue
    return QueueLimits(
        max_depth=queue.max_depth,
        lease_ttl_s=queue.lease_ttl_s,
        max_attempts=queue.max_attempts,
        backoff_base_s=queue.backoff_base_s,
        backoff_cap_s=queue.backoff_cap_s,
        max_skips=queue.max_skips,
    )
