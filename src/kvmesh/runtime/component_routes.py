"""Components at a gateway's doors, REST and gRPC: they come with their first instance and go with the last.

The gRPC door is for people and other languages, who need one address only; clients of the SDK call the instances.
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import cycle
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from kvmesh import telemetry
from kvmesh.core.roster import WorkerRecord, WorkerRole
from kvmesh.gateway.rest_routes import RestRoutes
from kvmesh.runtime.server import GrpcServer
from kvmesh.sdk.contract import decode_contract
from kvmesh.sdk.records import address_of, contract_text
from kvmesh.services.channels import Channels
from kvmesh.services.forwarded import ForwardedService
from kvmesh.services.owned_tasks import OwnedTasks
from kvmesh.services.peers import Peers
from kvmesh.services.signal import Signal

log = telemetry.logger(__name__)


class ComponentRoutes(grpc.GenericRpcHandler):
    """Keeps a gateway's doors as discovery has the components; to its gRPC server it is the handlers."""

    def __init__(self, *, peers: Peers, channels: Channels, rest: RestRoutes, server: GrpcServer) -> None:
        """Add to `rest` and `server`, from `start` on, what `peers` knows; made before `server` starts."""
        self._peers = peers
        self._channels = channels
        self._rest = rest
        self._server = server
        server.add_handlers(self)
        self._handlers: dict[str, Any] = {}
        """By path."""
        self._served: dict[str, str] = {}
        """Full names of services; to the contract by which each is served."""
        self._turn = cycle(range(1 << 16))
        self._changed = Signal()
        self._tasks = OwnedTasks()

    def start(self) -> None:
        """Begin to follow."""
        self._tasks.start(self._follow(), name="component-routes")

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
        contracts: dict[tuple[str, str], str] = {}
        for record in sorted(self._records(), key=lambda record: record.epoch):
            contracts[address_of(record)] = contract_text(record)  # the newest instance's
        live: set[str] = set()
        for address, text in sorted(contracts.items()):
            try:
                live.add(self._serve(address, text, taken=live))
            except ValueError as exc:  # somebody else's record: it must not take the others' routes away
                log.warning("component.refused", component="/".join(address), detail=str(exc))
        for name in self._served.keys() - live:
            del self._served[name]
            self._rest.remove(name)
            self._server.reflection.remove(name)
            self._server.health.set_serving(name, False)
            self._handlers = {
                path: handler for path, handler in self._handlers.items() if not path.startswith(f"/{name}/")
            }

    def _serve(self, address: tuple[str, str], text: str, *, taken: Collection[str]) -> str:
        service, comments = decode_contract(text)
        if service.full_name in taken:  # namespaces that differ by a dash only are one package in protobuf
            raise ValueError(f"{service.full_name} is another component's: rename its namespace")
        if self._served.get(service.full_name) != text:
            forwarded = ForwardedService(service, address=lambda: self._next(address), channels=self._channels)
            self._rest.add(service, forwarded, comments=comments)
            self._server.reflection.add(service.full_name, service.file.pool)
            self._server.health.set_serving(service.full_name, True)
            self._handlers |= _handlers(service, forwarded)
            self._served[service.full_name] = text
            log.info("component.routed", component="/".join(address))
        return str(service.full_name)

    def _next(self, address: tuple[str, str]) -> str | None:
        """Return where the next instance in turn is served; None = nowhere."""
        live: Sequence[WorkerRecord] = [record for record in self._records() if address_of(record) == address]
        ready = [record for record in live if not record.draining]
        return ready[next(self._turn) % len(ready)].address if ready else None

    def _records(self) -> list[WorkerRecord]:
        return [record for record in self._peers.roster.records(WorkerRole.COMPONENT) if contract_text(record)]


def _handlers(service: ServiceDescriptor, forwarded: ForwardedService) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in service.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        found[f"/{service.full_name}/{method.name}"] = make(
            getattr(forwarded, method.name), request.FromString, answer.SerializeToString
        )
    return found
