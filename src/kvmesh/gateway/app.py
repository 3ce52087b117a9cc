"""The HTTP door put together: REST, the OpenAI API, and what operators probe."""

from collections.abc import Callable, Sequence

from google.protobuf.descriptor import ServiceDescriptor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from kvmesh import telemetry
from kvmesh.core.waits import Waits
from kvmesh.gateway.api_document import api_document_routes
from kvmesh.gateway.dashboard import dashboard_routes
from kvmesh.gateway.openai_api import openai_routes
from kvmesh.gateway.request_frame import RequestFrame
from kvmesh.gateway.rest_routes import RestRoutes, Servicer
from kvmesh.gateway.transcoder import CallBounds
from kvmesh.wire.generation import Generator

DEFAULT_MAX_BODY_BYTES = 8 * 1024 * 1024
_DEFAULT_WAITS = Waits()


class HttpApp(RequestFrame):
    """The app as the server calls it, and what it serves by REST."""

    def __init__(self, app: ASGIApp, *, rest: RestRoutes) -> None:
        """Surround `app`, of which `rest` is a part."""
        super().__init__(app)
        self.rest = rest
        """Add to it what comes while the process runs."""


def create_app(
    *,
    services: Sequence[tuple[ServiceDescriptor, Servicer]],
    generator: Generator,
    unready_reason: Callable[[], str | None],
    exposition: Callable[[], bytes] = telemetry.exposition,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    request_timeout_s: float = _DEFAULT_WAITS.request_s,
    client_write_s: float = _DEFAULT_WAITS.client_write_s,
) -> HttpApp:
    """Return the app that serves the annotated methods of `services` and the OpenAI API on `generator`.

    `unready_reason` says why the process should get no requests now, None when it should; `request_timeout_s` bounds
    unary calls whose client sets no deadline, `client_write_s` each write of a stream whose client does not read.
    Raises: ValueError for an annotation that cannot be served.
    """

    bounds = CallBounds(
        max_body_bytes=max_body_bytes, request_timeout_s=request_timeout_s, client_write_s=client_write_s
    )
    rest = RestRoutes(bounds=bounds)
    for descriptor, servicer in services:
        rest.add(descriptor, servicer)

    async def healthz(request: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    async def readyz(request: Request) -> Response:
        why = unready_reason()
        return Response(f"{why or 'ready'}\n", status_code=503 if why else 200, media_type="text/plain")

    async def metrics(request: Request) -> Response:
        return Response(exposition(), headers={"content-type": telemetry.CONTENT_TYPE_LATEST})

    # A bare router: each layer of a Starlette app would be passed by every token of every stream.
    router = Router(
        [
            *openai_routes(generator, max_body_bytes=max_body_bytes, client_write_s=client_write_s),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            *api_document_routes(rest),
            *dashboard_routes(),
            rest,
        ],
        redirect_slashes=False,
    )
    return HttpApp(router, rest=rest)
