"""All REST routes of a process: those of its own services, and those of services that come and go while it runs."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import ServiceDescriptor
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from kvmesh.gateway.routes import HttpRule, rules_of
from kvmesh.gateway.transcoder import CallBounds, RpcRoute

Servicer = object
"""Has a method for every annotated RPC, by its name, as an instance of a generated servicer class has."""
Comments = Mapping[str, str]
"""Text about a service, a method, a message, a field or an enum's value, by its full protobuf name."""


@dataclass(frozen=True, slots=True)
class _Service:
    descriptor: ServiceDescriptor
    servicer: Servicer
    comments: Comments


class RestRoutes(BaseRoute):
    """Every annotated method of the services added so far, the more specific path first."""

    def __init__(self, *, bounds: CallBounds) -> None:
        """Serve nothing yet."""
        self._bounds = bounds
        self._services: dict[str, _Service] = {}
        self._routes: list[RpcRoute] = []
        self.revision = 0
        """Grows with every change of the routes."""

    @property
    def rules(self) -> tuple[HttpRule, ...]:
        """What is served."""
        return tuple(route.rule for route in self._routes)

    @property
    def comments(self) -> dict[str, str]:
        """What the services' own comments say."""
        return {name: text for service in self._services.values() for name, text in service.comments.items()}

    def add(self, descriptor: ServiceDescriptor, servicer: Servicer, *, comments: Comments | None = None) -> None:
        """Serve a service from now on, in the place of one of the same full name.

        Its descriptor may be of any pool. Raises: ValueError for an annotation that cannot be served, or a verb and
        path of another service; then nothing has changed.
        """
        services = {**self._services, descriptor.full_name: _Service(descriptor, servicer, comments or {})}
        self._serve(services)

    def remove(self, full_name: str) -> None:
        """Serve a service no longer; its running calls go on. Idempotent."""
        if full_name in self._services:
            self._serve({name: service for name, service in self._services.items() if name != full_name})

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return PARTIAL where only the verb differs."""
        if scope["type"] != "http":
            return Match.NONE, {}
        raw_path, verb = scope["raw_path"].decode("latin-1"), _verb(scope)
        others: list[RpcRoute] = []
        for route in self._routes:
            path_values = route.rule.match(raw_path)
            if path_values is None:
                continue
            if route.rule.verb == verb:
                return Match.FULL, {"path_params": path_values, "endpoint": route.handle, "route": route}
            others.append(route)
        if not others:
            return Match.NONE, {}
        return Match.PARTIAL, {"path_params": {}, "endpoint": _refusal_of_verb(others), "route": others[0]}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the route that matched. Raises: what its method raises, until the reply has begun."""
        await scope["endpoint"](scope, receive, send)

    def _serve(self, services: dict[str, _Service]) -> None:
        self._routes = [
            RpcRoute(
                rule,
                getattr(services[rule.method.containing_service.full_name].servicer, rule.method.name),
                bounds=self._bounds,
            )
            for rule in rules_of(service.descriptor for service in services.values())
        ]
        self._services = services
        self.revision += 1


def _refusal_of_verb(routes: list[RpcRoute]) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    verbs = {route.rule.verb for route in routes}
    allowed = ", ".join(sorted(verbs | {"HEAD"} if "GET" in verbs else verbs))

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        raise HTTPException(405, headers={"Allow": allowed})

    return refuse


def _verb(scope: Scope) -> str:
    """Return the verb of the rule that is asked for: HEAD is a GET whose body the server keeps to itself."""
    return "GET" if scope["method"] == "HEAD" else str(scope["method"])
