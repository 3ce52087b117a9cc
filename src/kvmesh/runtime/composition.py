"""The composition root: makes every role of a mesh from the settings. It alone names implementations."""

import socket
from functools import cached_property
from typing import assert_never

from kvmesh.core.admission import AdmissionRules
from kvmesh.core.approximate_index import ApproximateIndex
from kvmesh.core.eligibility import OverloadRules
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import WorkerId
from kvmesh.core.index_port import CacheIndex, IndexMode, NoIndex
from kvmesh.core.lease_limits import QueueLimits
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.core.remote_prefill import RemotePrefillRules
from kvmesh.core.roster import WorkerRole
from kvmesh.core.routing import RoutingRules
from kvmesh.discovery.discovery import Discovery
from kvmesh.runtime.decode_work import decode_work
from kvmesh.runtime.engine_registry import EnginePlan, plan_engine
from kvmesh.runtime.gateway_role import Doors, GatewayRole
from kvmesh.runtime.policy_loading import load_policy
from kvmesh.runtime.prefill_work import prefill_work
from kvmesh.runtime.processor_role import ProcessorRole, Tokenizers
from kvmesh.runtime.queue_role import QueueRole
from kvmesh.runtime.role import Listen
from kvmesh.runtime.router_role import RouterPart, RouterPlan, RouterRole
from kvmesh.runtime.settings import RouterSettings, Settings
from kvmesh.runtime.transport_registry import open_transports
from kvmesh.runtime.worker import Work, Worker, WorkerParts
from kvmesh.services.decision_log import DecisionLog
from kvmesh.services.local_calls import LocalServers
from kvmesh.transports.memory import MemoryNetwork


class Composition:
    """Makes the roles of one process; all of them share its discovery."""

    def __init__(
        self,
        settings: Settings,
        *,
        discovery: Discovery,
        network: MemoryNetwork | None = None,
        local: LocalServers | None = None,
        plan: EnginePlan | None = None,
    ) -> None:
        """Take `discovery`, which stays the caller's to close.

        `network` joins workers of this process, for the transport `memory`; None = there is only one. `local` joins its
        roles, for their streams; None = they talk over gRPC. `plan` brings engines of the caller's own in place of
        `engine.*`.
        """
        self._settings = settings
        self._discovery = discovery
        self._network = network
        self._local = local
        self._given_plan = plan
        self._checked_plan: RouterPlan | None = None

    @cached_property
    def plan(self) -> EnginePlan:
        """The engines. Raises: FixRequestError(INVALID_FIELD) naming the setting."""
        return self._given_plan or plan_engine(self._settings.engine)

    def check(self) -> None:
        """Check what the settings name, before anything starts. Raises: FixRequestError(INVALID_FIELD)."""
        self.plan.check(decode_workers=self._settings.mesh.decode)
        self._checked_plan = self.router_plan()

    def worker(self, role: WorkerRole, *, node: str, index: int, listen: Listen) -> Worker:
        """Make a decode or a prefill worker."""
        nothing_moves = self._network is not None and self._settings.mesh.prefill == 0  # and nobody else can join
        memory = open_transports(
            network=self._network,
            host=listen.host,
            advertised_host=listen.advertise or None,
            kinds=("memory",) if nothing_moves else self._settings.process.transports,
        )
        return Worker(
            worker_id=WorkerId(f"{node}/{role.value}/{index}"),
            role=role,
            models=(self.plan.model_name,),
            namespace=self._settings.namespace,
            engine=self.plan.build(node, index=index, allocate=memory.allocate),
            transports=memory.transports,
            discovery=self._discovery,
            waits=self._settings.waits,
            build=self._decode_work if role is WorkerRole.DECODE else self._prefill_work,
            listen=listen,
            labels=self._settings.mesh.labels_of(node),
            local=self._local,
        )

    def queue(self, *, node: str, index: int, listen: Listen) -> QueueRole:
        """Make a prefill queue."""
        return QueueRole(
            worker_id=WorkerId(f"{node}/{WorkerRole.QUEUE.value}/{index}"),
            namespace=self._settings.namespace,
            limits=_queue_limits(self._settings),
            discovery=self._discovery,
            listen=listen,
            drain_s=self._settings.waits.drain_s,
        )

    def router(self, *, node: str, index: int, listen: Listen) -> RouterRole:
        """Make a router of its own process."""
        return RouterRole(
            self.router_plan(),
            worker_id=WorkerId(f"{node}/{WorkerRole.ROUTER.value}/{index}"),
            namespace=self._settings.namespace,
            discovery=self._discovery,
            listen=listen,
            local=self._local,
        )

    def processor(self, *, node: str, index: int, listen: Listen) -> ProcessorRole:
        """Make a processor of its own process, with its router unless that is separate."""
        return ProcessorRole(
            node=node,
            index=index,
            router=self._router_part(),
            tokenizers=self._tokenizers(),
            waits=self._settings.waits,
            merge_within_s=self._settings.output.merge_s,
            namespace=self._settings.namespace,
            discovery=self._discovery,
            listen=listen,
            local=self._local,
        )

    def gateway(self, *, node: str, index: int, grpc_flag: str = "--grpc-port") -> GatewayRole:
        """Make a frontend, with its processor and its router unless they are separate.

        `grpc_flag` is the option that chose its gRPC port.
        """
        settings = self._settings
        is_processor_here = settings.mesh.processor == "inside"
        return GatewayRole(
            name=f"{node}/frontend/{index}",
            discovery=self._discovery,
            namespace=settings.namespace,
            router=self._router_part() if is_processor_here else None,
            tokenizers=self._tokenizers() if is_processor_here else None,
            doors=Doors(
                grpc=Listen(settings.grpc.host, settings.grpc.port),
                http=Listen(settings.http.host, settings.http.port),
                max_body_bytes=settings.http.max_body_bytes,
                max_request_bytes=settings.grpc.max_request_bytes,
                grpc_flag=grpc_flag,
            ),
            waits=settings.waits,
            merge_within_s=settings.output.merge_s,
            local=self._local,
        )

    def router_plan(self) -> RouterPlan:
        """Return how one router chooses, its policy new. Raises: FixRequestError(INVALID_FIELD) naming the setting."""
        if self._checked_plan is not None:  # a policy may be anybody's: it is not made once more for nothing
            plan, self._checked_plan = self._checked_plan, None
            return plan
        router = self._settings.router
        return RouterPlan(
            policy=load_policy(router),
            rules=RoutingRules(
                overload=_overload_rules(router),
                remote_prefill=self._remote_prefill_rules,
                stale_after_s=router.stale_after_s,
                session_ttl_s=router.session_ttl_s,
                index_mode=router.index,
            ),
            reservation_ttl_s=router.reservation_ttl_s,
            waits=self._settings.waits,
            admission=_admission_rules(router),
            index=_index(router),
            decision_log=_decision_log(router),
            seed=router.seed,
        )

    def _router_part(self) -> RouterPart | None:
        if self._settings.mesh.router == "separate":
            return None
        return RouterPart(
            self.router_plan(), namespace=self._settings.namespace, discovery=self._discovery, local=self._local
        )

    def _tokenizers(self) -> Tokenizers:
        return {self.plan.model_name: self.plan.tokenizer}

    def _decode_work(self, parts: WorkerParts) -> Work:
        remote = self._settings.remote_prefill
        build = decode_work(
            rules=self._remote_prefill_rules,
            required=remote.required,
            direct=remote.mode == "direct",
            checksums=remote.checksums,
        )
        return build(parts)

    def _prefill_work(self, parts: WorkerParts) -> Work:
        remote = self._settings.remote_prefill
        build = prefill_work(
            pulls=remote.mode == "queue", max_direct_tasks=remote.max_direct_tasks, checksums=remote.checksums
        )
        return build(parts)

    @cached_property
    def _remote_prefill_rules(self) -> RemotePrefillRules:
        remote = self._settings.remote_prefill
        minimum = remote.min_uncached_tokens
        return RemotePrefillRules(
            min_uncached_tokens=self.plan.min_uncached_tokens if minimum is None else minimum,
            min_prompt_tokens=remote.min_prompt_tokens,
            max_queue_depth=remote.max_queue_depth,
        )


def connect_discovery(settings: Settings) -> Discovery:
    """Open the store that `discovery.store` names. Raises: FixRequestError(INVALID_FIELD) where it has no address."""
    endpoints = settings.discovery.endpoints
    if not endpoints:
        raise FixRequestError(
            Reason.INVALID_FIELD,
            f"{settings.discovery.store!r} reaches no other process: name the cluster, --discovery etcd://HOST:PORT",
            field="discovery.store",
        )
    from kvmesh.discovery.etcd import EtcdDiscovery  # noqa: PLC0415  # only where processes are separate

    return EtcdDiscovery(endpoints, ttl_s=settings.discovery.ttl_s)


def node_name(settings: Settings) -> str:
    """Return the name of this node: the setting, or the host's."""
    return settings.process.node or socket.gethostname()


def _overload_rules(settings: RouterSettings) -> OverloadRules:
    return OverloadRules(
        max_block_usage=settings.max_block_usage,
        max_prefill_tokens=settings.max_prefill_tokens,
        max_requests_per_slot=settings.max_requests_per_slot,
        max_waiting_requests=settings.max_waiting_requests,
    )


def _admission_rules(settings: RouterSettings) -> AdmissionRules:
    return AdmissionRules(
        wait_s=settings.admission_wait_s,
        order=settings.admission_order,
        max_waiting=settings.admission_max_waiting,
        ageing_s=settings.admission_ageing_s,
    )


def _index(settings: RouterSettings) -> CacheIndex:
    match settings.index:
        case IndexMode.EVENTS:
            return PrefixIndex(max_pairs=settings.index_max_pairs)
        case IndexMode.APPROXIMATE:
            return ApproximateIndex(ttl_s=settings.approximate_ttl_s, max_pairs=settings.index_max_pairs)
        case IndexMode.OFF:
            return NoIndex()
    assert_never(settings.index)


def _decision_log(settings: RouterSettings) -> DecisionLog | None:
    if settings.decision_log is None:
        return None
    return DecisionLog(
        settings.decision_log,
        max_bytes=int(settings.decision_log_max_mb * 1e6),
        policy_settings=settings.of_the_policy(),
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
