"""Components at a gateway's doors, REST and gRPC: they come with their first instance and go with the last.

The gRPC door is for people and other languages, who need one address only; clients of the SDK call the instances.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from kvmesh import telemetry
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.gateway.rest_routes import RestRoutes
from kvmesh.gateway.routes import rules_of
from kvmesh.runtime.server import GrpcServer
from kvmesh.sdk.contract import decode_contract, rest_path
from kvmesh.sdk.records import address_of, contract_text
from kvmesh.services.channels import Channels
from kvmesh.services.forwarded import ForwardedService
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.running_calls import RunningCalls
from kvmesh.services.signal import Signal

log = telemetry.logger(__name__)


_Address = tuple[str, str]
"""Namespace and name of a component."""


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    """A contract that a component may be served by; one object for as long as any instance has it."""

    address: _Address
    service: ServiceDescriptor
    comments: Mapping[str, str]


class ComponentRoutes(grpc.GenericRpcHandler):
    """Keeps a gateway's doors as discovery has the components; to its gRPC server it is the handlers."""

    def __init__(
        self, *, peers: Peers, channels: Channels, rest: RestRoutes, server: GrpcServer, request_s: float
    ) -> None:
        """Add to `rest` and `server`, from `start` on, what `peers` knows; made before `server` starts.

        `request_s` bounds a call whose client set no deadline.
        """
        self._peers = peers
        self._channels = channels
        self._rest = rest
        self._server = server
        self._request_s = request_s
        server.add_handlers(self)
        self._handlers: dict[str, Any] = {}
        """By path."""
        self._read: dict[tuple[_Address, str], _Offer | None] = {}
        """By what the instances of discovery say; None = refused."""
        self._served: dict[str, _Offer] = {}
        """By full name of the service."""
        self._refusals: frozenset[tuple[_Address, str]] = frozenset()
        """Components that cannot be served as things are, and why: each is logged once."""
        self._calls = RunningCalls()
        self._turn = cycle(range(1 << 16))
        self._changed = Signal()
        self._tasks = OwnedTasks()

    def start(self) -> None:
        """Begin to follow."""
        self._tasks.start(self._follow(), name="component-routes")

    async def drain(self, timeout_s: float) -> None:
        """Take no new calls of components, and let what runs end within `timeout_s`."""
        await self._calls.drain(timeout_s)

    async def aclose(self) -> None:
        """Stop following."""
        await self._tasks.aclose()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a component's method; None where it is nobody's."""
        return self._handlers.get(handler_call_details.method)

    async def wait_routed(self, full_names: Iterable[str]) -> None:
        """Wait until these services are served; not bounded here."""
        while not self._served.keys() >= set(full_names):
            await self._changed.wait()

    async def _follow(self) -> None:
        while True:
            self._refresh()
            self._changed.fire()
            await self._peers.changed()

    def _refresh(self) -> None:
        refusals: set[tuple[_Address, str]] = set()
        chosen = self._choose(refusals)
        for name in self._served.keys() - chosen.keys():
            self._remove(name)
        for name, offer in sorted(chosen.items()):
            if self._served.get(name) is not offer:
                try:
                    self._serve(name, offer)
                except ValueError as exc:  # somebody else's record: it must not take the others' routes away
                    refusals.add((offer.address, str(exc)))
        for address, why in sorted(refusals - self._refusals):
            log.warning("component.refused", component="/".join(address), detail=why)
        self._refusals = frozenset(refusals)

    def _choose(self, refusals: set[tuple[_Address, str]]) -> dict[str, _Offer]:
        """Return what is to be served, by name: of each component the contract of its newest instance.

        Namespaces that differ by case, or by dash and underscore, are one package in protobuf: who has the name keeps
        it for as long as it runs.
        """
        offers = self._offers()
        addresses = {offer.address for offer in offers}
        holders = {name: offer.address for name, offer in self._served.items() if offer.address in addresses}
        chosen: dict[str, _Offer] = {}
        for offer in offers:
            name = offer.service.full_name
            holder = holders.setdefault(name, offer.address)
            if holder == offer.address:
                chosen[name] = offer
            else:
                refusals.add((offer.address, f"{name} is that of {'/'.join(holder)}: rename one of the namespaces"))
        return chosen

    def _offers(self) -> list[_Offer]:
        """Return the contracts that can be served, by the epochs of the instances that say them."""
        read: dict[tuple[_Address, str], _Offer | None] = {}
        records = self._peers.roster.records(WorkerRole.COMPONENT)
        for record in sorted(records, key=lambda record: record.epoch):
            said = _said(record)
            if not said[1]:
                continue
            offer = self._read[said] if said in self._read else _read_offer(*said)
            read.pop(said, None)  # the newest instance that says it counts
            read[said] = offer
        self._read = read
        return [offer for offer in read.values() if offer is not None]

    def _serve(self, name: str, offer: _Offer) -> None:
        forwarded = ForwardedService(
            offer.service,
            address=lambda: self._next(offer.address),
            channels=self._channels,
            request_s=self._request_s,
            calls=self._calls,
        )
        self._rest.add(offer.service, forwarded, comments=offer.comments)
        self._server.reflection.add(name, offer.service.file.pool)
        self._server.health.set_serving(name, True)
        self._handlers = self._handlers_of_others(name) | _handlers(offer.service, forwarded)
        self._served[name] = offer
        log.info("component.routed", component="/".join(offer.address))

    def _remove(self, name: str) -> None:
        del self._served[name]
        self._rest.remove(name)
        self._server.reflection.remove(name)
        self._server.health.set_serving(name, False)
        self._handlers = self._handlers_of_others(name)

    def _handlers_of_others(self, name: str) -> dict[str, Any]:
        return {path: handler for path, handler in self._handlers.items() if not path.startswith(f"/{name}/")}

    def _next(self, address: _Address) -> str | None:
        """Return where the next instance in turn is served; None = nowhere."""
        ready = [
            record
            for record in self._peers.roster.records(WorkerRole.COMPONENT)
            if not record.draining and address_of(record) == address and self._read.get(_said(record)) is not None
        ]
        return ready[next(self._turn) % len(ready)].address if ready else None


def _said(record: WorkerRecord) -> tuple[_Address, str]:
    return address_of(record), contract_text(record)


def _read_offer(address: _Address, text: str) -> _Offer | None:
    """Return what a record offers; None, logged, where that is not the component that it says it is."""
    try:
        service, comments = decode_contract(text)
        _check(address, service)
    except ValueError as exc:  # anybody may write a record: it must take nobody's name and no path of others
        log.warning("component.refused", component="/".join(address), detail=str(exc))
        return None
    return _Offer(address, service, comments)


def _check(address: _Address, service: ServiceDescriptor) -> None:
    """Raises: ValueError for a service that is not this component's, or a path outside of the component's own."""
    namespace, component = address
    package, space, part, name = (*service.full_name.split("."), "", "", "", "")[:4]
    is_own = (package, space, name) == ("sdk", namespace.replace("-", "_").lower(), component)
    if not is_own or part.replace("_", "") != component.replace("_", "").lower() or service.full_name.count(".") != 3:
        raise ValueError(f"{service.full_name} is not the service of this component")
    paths = rest_path(namespace, component, "")
    for rule in rules_of([service]):
        if not rule.template.startswith(paths):
            raise ValueError(f"{service.full_name} asks for {rule.template}, which is not below {paths}")
    if any(method.client_streaming for method in service.methods):
        raise ValueError(f"{service.full_name} has a method that takes a stream")


def _handlers(service: ServiceDescriptor, forwarded: ForwardedService) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in service.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        found[f"/{service.full_name}/{method.name}"] = make(
            getattr(forwarded, method.name), request.FromString, answer.SerializeToString
        )
    return found
